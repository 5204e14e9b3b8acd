"""Is it the same run? Only then may a journal be continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from kvat_core.journal import read_journal
from kvat_core.run import Run
from kvat_core.schema import CandidateEntry, Cell, Header, Recipe, digest

_VOLATILE = {"created", "probe_s", "notes", "request"}
"""Fields of a header that may differ between two starts of the same run."""
_SHOWN = 4
"""Differences that are named; more are counted."""
_TEXT = "the text of the prompts differs, or the key that it is known by was lost"
_UNKNOWN_TEXT = "whether the prompt text is the same cannot be told, because the key that tells could not be kept"


def request_digest(header: Header, entries: Sequence[CandidateEntry], recipes: Mapping[Cell, Recipe]) -> str:
    """Digest of all that decides what is measured: the request, the machine, the model, and every recipe."""
    decisive = {
        "header": header.model_dump(mode="json", exclude=_VOLATILE),
        "candidates": [[entry.candidate.id, entry.incumbent] for entry in entries],
        "recipes": {f"{cell.candidate} {cell.scenario}": recipe.key for cell, recipe in recipes.items()},
    }
    return digest(decisive, 32)


def exclusions(journal: Path) -> dict[str, str]:
    """Why the run in a journal has excluded candidates, by their ids; nothing if it cannot be read.

    They stay excluded: what did not fit the memory that was free then may fit now, and would change the run.

    Raises:
        JournalDamaged: a line up to the last candidate does not verify.
    """
    found: dict[str, str] = {}
    with suppress(OSError):
        for event in islice(read_journal(journal), 1, None):
            if not isinstance(event, CandidateEntry):
                break
            if event.exclusion is not None:
                found[event.candidate.id] = event.exclusion
    return found


def difference(run: Run, header: Header, entries: Sequence[CandidateEntry]) -> str | None:
    """What keeps a new start from being the continuation of a run, in words; None = nothing does.

    Args:
        run: the one in the journal.
        header: of the new start.
        entries: candidates of the new start.
    """
    if run.header.request == header.request:
        return _UNKNOWN_TEXT if header.profile.prompt.kind != "preset" and header.prompt_digest is None else None
    old, new = (dict(_flat(one.model_dump(mode="json", exclude=_VOLATILE))) for one in (run.header, header))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    found = [
        _TEXT if name == "prompt_digest" else f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in _decisive(names)
    ]
    found = found or list(_changed_candidates(run.candidates, entries)) or ["what is done for the candidates differs"]
    rest = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "; ".join(found[:_SHOWN] + rest)


def _decisive(names: Sequence[str]) -> list[str]:
    """Without what differs only because the engine, or the profile as a whole, is another one."""
    if "engine" in names:
        return ["engine"]
    if "profile.name" in names:
        return [name for name in names if name == "profile.name" or not name.startswith("profile.")]
    return list(names)


def _changed_candidates(before: Sequence[CandidateEntry], now: Sequence[CandidateEntry]) -> Iterator[str]:
    """Candidates that were tried and are not any more, or the other way round: memory may be shorter now."""
    known = {entry.candidate.id: entry for entry in before}
    for entry in now:
        old = known.get(entry.candidate.id)
        if old is not None and (old.exclusion is None) != (entry.exclusion is None):
            yield f"before, {entry.candidate.label} {_fate(old)}; now it {_fate(entry)}"
        if old is not None and entry.incumbent and not old.incumbent:
            yield f"what runs today is {entry.candidate.label} now"


def _fate(entry: CandidateEntry) -> str:
    return "is tried" if entry.exclusion is None else f"is excluded ({entry.exclusion})"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
