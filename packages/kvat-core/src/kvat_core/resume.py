"""Is it the same run? Only then may a journal be continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvat_core.schema import CandidateEntry, Cell, Header, Recipe, digest

_VOLATILE = {"created", "probe_s", "notes", "request"}
"""Fields of a header that may differ between two starts of the same run."""
_SHOWN = 4
"""Differences that are named; more are counted."""
_UNKNOWN_TEXT = "whether the prompt text is the same cannot be told, because the key that tells could not be kept"


def request_digest(header: Header, entries: Sequence[CandidateEntry], recipes: Mapping[Cell, Recipe]) -> str:
    """Digest of all that decides what is measured: the request, the machine, the model, and every recipe."""
    decisive = {
        "header": header.model_dump(mode="json", exclude=_VOLATILE),
        "candidates": [[entry.candidate.id, entry.incumbent] for entry in entries],
        "recipes": {f"{cell.candidate} {cell.scenario}": recipe.key for cell, recipe in recipes.items()},
    }
    return digest(decisive, 32)


def difference(before: Header, now: Header) -> str | None:
    """What keeps a run from being the continuation of another one, in words; None = nothing does."""
    if before.request == now.request:
        return _UNKNOWN_TEXT if now.profile.prompt.kind != "preset" and now.prompt_digest is None else None
    old, new = (dict(_flat(header.model_dump(mode="json", exclude=_VOLATILE))) for header in (before, now))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if not names:
        return "the candidates, or what is done for them, differ"
    shown = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:_SHOWN]]
    rest = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "; ".join(shown + rest)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
