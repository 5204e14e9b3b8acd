"""What this machine can do at most: measured once, and kept in the user's cache for later runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvat_core import outputs, user_folders
from kvat_core.errors import CannotWrite
from kvat_core.schema import Ceilings, Machine, digest

Measure = Callable[[Sequence[str]], "Ceilings | None"]
"""From dtypes to ceilings."""


def kept(
    machine: Machine, engine: str, versions: Mapping[str, str], dtypes: Sequence[str], measure: Measure
) -> Ceilings | None:
    """The ceilings of earlier runs in the same circumstances, or those that are measured now, and then kept.

    Args:
        machine: its fingerprint holds device and threads.
        engine: name of the one that measures.
        versions: of what it measures with.
        dtypes: whose arithmetic rate is wanted; a new one is measured together with those of before.
        measure: called where not all is kept; where it gives None, what is kept has to do.
    """
    path = _path(f"ceilings-{digest([machine.fingerprint, engine, dict(versions)], 16)}.json")
    known = None if path is None else _read(path)
    rates = {} if known is None else known.gemm_flop_per_s
    if known is not None and rates.keys() >= set(dtypes):
        return known
    measured = measure(sorted({*dtypes, *rates}))
    if measured is None:
        return known
    if path is not None:
        _keep(path, measured)
    return measured


def _path(name: str) -> Path | None:
    """None for a user without home."""
    try:
        return user_folders.cache_home() / "kvat" / name
    except RuntimeError:
        return None


def _read(path: Path) -> Ceilings | None:
    """None where there is nothing, or nothing that can be used: then it is measured again."""
    try:
        return Ceilings.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _keep(path: Path, measured: Ceilings) -> None:
    """A cache that cannot be written costs the next run some seconds, and this one nothing."""
    with contextlib.suppress(OSError, CannotWrite):
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs.write_files(path.parent, {path.name: measured.model_dump_json(indent=1) + "\n"})
