"""Decide again from a journal, for the same traffic or for another profile, without measuring; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvat_core import lock, outputs, private, profiles, prompts
from kvat_core.errors import AllFailed, NothingFeasible, UsageError
from kvat_core.journal import journal_sha256, read_journal
from kvat_core.limits import impossible
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import Header, JournalRef, Limits, Plan, Profile, PromptSource

LIMITS_NOTE = "the limits are those that were asked for now, not of the run"
_BEGINNING = b'{"seq":'
"""Of each record; a file that begins otherwise is none that was damaged, but something else."""
_OF_THE_RUN = ("prompt", "launches", "samples", "warmup")
"""What of a profile says how to measure, and so stays what it was."""


def decide_again(journal: Path | str, profile: Profile | str | None = None, limits: Limits | None = None) -> Plan:
    """The plan that a journal gives.

    Args:
        journal: of a run, finished or not; it is read only.
        profile: traffic and weights to decide for instead of the run's own: a preset, a JSON file or an object. How it
            was measured stays as it was, and where the profile asks for something else, a note in the plan says so.
        limits: those that are set replace the profile's.

    Raises:
        UsageError: the journal cannot be read, holds no run or is being written, or lacks a shape of the profile; or
            a limit is one that no candidate can keep, or be judged by.
        JournalDamaged: it does not verify.
        AllFailed: every candidate failed.
        NotDecided: what was measured so far does not suffice.
        NothingFeasible: some have figures, but none of those may be recommended.
    """
    journal = Path(journal)
    run, sha256 = _read(journal)
    if profile is not None:
        run = _asked_for(profiles.load_profile(profile) if isinstance(profile, str) else profile, run, journal)
    if limits is not None and (wanted := run.header.profile.limits.replaced_by(limits)) != run.header.profile.limits:
        run = _noted(run.asked(run.header.profile.model_copy(update={"limits": wanted})), [LIMITS_NOTE])
    if reason := impossible(run.header.profile.limits, run.header.shape, run.header.target.device):
        raise UsageError(reason)
    try:
        return make_plan(run, JournalRef(file=journal.name, sha256=sha256, samples=len(run.samples)))
    except (AllFailed, NothingFeasible) as error:
        raise type(error)(f"{error}; {journal} tells of each") from error


def _read(journal: Path) -> tuple[Run, str]:
    """The run that is in a journal, and the digest of its file."""
    being_written = f"{journal} is being written; decide again when its run has ended"
    if lock.is_held(journal.parent / outputs.LOCK):
        raise UsageError(being_written)
    try:
        with journal.open("rb") as file:
            if not file.read(len(_BEGINNING)) == _BEGINNING:
                raise ValueError
        sha256 = journal_sha256(journal)
        run = Run.from_events(read_journal(journal))
        changed = journal_sha256(journal) != sha256
    except OSError as error:
        raise UsageError(f"cannot read journal {journal}: {error.strerror}; name the journal.jsonl of a run") from error
    except ValueError as error:
        raise UsageError(f"{journal} holds no run; name the journal.jsonl of one") from error
    if changed:
        raise UsageError(being_written)  # by a run elsewhere, whose lock tells nothing here
    return run, sha256


def _asked_for(profile: Profile, run: Run, journal: Path) -> Run:
    """The run under the profile's question."""
    measured, shape = run.header.profile, run.header.shape
    fitted, notes = profiles.fit(
        profile.redacted(),
        preset=profile in profiles.presets().values(),
        contexts=(),
        batches=(),
        shortest_prompt_tokens=None,
        max_context_tokens=shape.max_context_tokens,
    )
    if missing := [one.key for one in fitted.scenarios if one.key not in run.scenarios]:
        raise UsageError(
            f"{journal} does not hold {', '.join(missing)} of profile {profile.name}, only "
            f"{', '.join(run.scenarios)}; name a profile of these, or measure that one with kvat tune"
        )
    kept = {name: getattr(measured, name) for name in _OF_THE_RUN}
    if other := [name for name, value in kept.items() if getattr(fitted, name) != value]:
        notes = (
            *notes,
            f"as in the run, and not as in profile {profile.name}, for nothing was measured anew: {', '.join(other)}",
        )
    if "prompt" not in other and not _is_text_of(profile.prompt, run.header):
        notes = (
            *notes,
            f"the prompts are the run's: their text is not that of profile {profile.name}, or cannot be told",
        )
    if fitted.limits != measured.limits:
        notes = (*notes, f"the limits are those of profile {profile.name}, not of the run")
    asked = run.asked(fitted.model_copy(update=kept))
    asked.header = asked.header.model_copy(
        update={"notes": tuple(note for note in run.header.notes if note != profiles.DEFAULT_NOTE)}
    )
    return _noted(asked, [note for note in notes if note not in run.header.notes])


def _noted(run: Run, notes: Sequence[str]) -> Run:
    """The run with more notes."""
    run.header = run.header.model_copy(update={"notes": (*run.header.notes, *notes)})
    return run


def _is_text_of(source: PromptSource, header: Header) -> bool:
    """Whether a profile's own prompts are known to be those that were measured; what comes with kvat is named."""
    if source.kind == "preset":
        return True
    try:
        text = prompts.resolve(source).value or ""
    except UsageError:
        return False
    return header.prompt_digest is not None and private.digest_if_known(text) == header.prompt_digest
