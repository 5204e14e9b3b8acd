"""Is it the same run? Only then may a journal be continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvat_core.run import Run
from kvat_core.schema import CandidateEntry, Header, digest

_VOLATILE = {"created", "probe_s", "notes", "request", "ceilings"}
"""Fields of a header that may differ between two starts of the same run."""
_SHOWN = 4
"""Differences that are named; more are counted."""
_TEXT = "the text of the prompts differs, or the key that it is known by was lost"
_UNKNOWN_TEXT = "whether the prompt text is the same cannot be told, because the key that tells could not be kept"


def request_digest(header: Header, entries: Sequence[CandidateEntry]) -> str:
    """Digest of the request, the machine and the model, and of the candidates that there are."""
    decisive = {
        "header": header.model_dump(mode="json", exclude=_VOLATILE),
        "candidates": [[entry.candidate.id, entry.incumbent] for entry in entries],
    }
    return digest(decisive, 32)


def difference(run: Run, header: Header, entries: Sequence[CandidateEntry]) -> str | None:
    """What keeps a new start from being the continuation of a run, in words; None = nothing does.

    What was excluded stays so, whatever fits into memory now. A challenger that was tried has to be what it was, unless
    the run is complete.

    Args:
        run: the one in the journal.
        header: of the new start.
        entries: candidates of the new start.
    """
    if run.header.request != header.request:
        found = _differing_fields(run.header, header) or [_other_candidates(run, entries)]
    else:
        found = list(_changed_candidates(run, entries))
        if header.profile.prompt.kind != "preset" and header.prompt_digest is None:
            found.append(_UNKNOWN_TEXT)
    rest = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "; ".join(found[:_SHOWN] + rest) or None


def _differing_fields(before: Header, now: Header) -> list[str]:
    old, new = (dict(_flat(one.model_dump(mode="json", exclude=_VOLATILE))) for one in (before, now))
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [
        _TEXT if name == "prompt_digest" else f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in _decisive(names)
    ]


def _decisive(names: Sequence[str]) -> list[str]:
    """Without what differs only because the engine, or the profile as a whole, is another one."""
    if "engine" in names:
        return ["engine"]
    if "profile.name" in names:
        return [name for name in names if name == "profile.name" or not name.startswith("profile.")]
    return list(names)


def _other_candidates(run: Run, entries: Sequence[CandidateEntry]) -> str:
    """How candidates differ that the same request has brought about."""
    now = next(entry.candidate for entry in entries if entry.incumbent)
    if run.candidates and run.incumbent != now.id:
        return f"what runs today is {now.label} now"
    return "the candidates that there are differ"


def _changed_candidates(run: Run, entries: Sequence[CandidateEntry]) -> Iterator[str]:
    """Candidates that were tried and cannot be tried in the same way now: memory may be shorter."""
    known = {} if run.end is not None else {entry.candidate.id: entry for entry in run.candidates}
    for entry in entries:
        old = known.get(entry.candidate.id)
        if old is None or old.exclusion is not None or old.recipes == entry.recipes:
            continue
        label = entry.candidate.label
        if entry.recipes is None:
            yield f"before, {label} was tried; now it is excluded ({entry.exclusion})"
        else:
            yield f"what is done for {label} differs"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
