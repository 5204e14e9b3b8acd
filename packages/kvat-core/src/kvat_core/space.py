"""Knobs and policy → candidates, each exclusion with its reason. Knows no knob by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvat_core.errors import UsageError
from kvat_core.schema import SPACES, Candidate, CandidateEntry, Knob, KnobValue, Space, digest

Settings = dict[str, str]
SAME_RECIPE = "has the same recipe as"
"""Start of the reason for which one of two candidates that would do the same is excluded."""


def enumerate_candidates(
    knobs: Sequence[Knob],
    space: Space,
    *,
    pinned: Mapping[str, str],
    excluded: Sequence[tuple[str, str]],
    incumbent: Mapping[str, str],
    check: Callable[[Mapping[str, str]], str | None],
) -> list[CandidateEntry]:
    """All candidates of a space, the incumbent first.

    Args:
        pinned: knob → value that every candidate has, the incumbent too.
        excluded: knob and value that no challenger may have.
        incumbent: knob → value of what the user runs today, where it is not the engine's default.
        check: the engine's reason why a combination is impossible, or None.

    Raises:
        UsageError: an unknown knob or value, an incumbent that is itself impossible, or exclusions that leave
            nothing to compare it with.
    """
    by_name = {knob.name: knob for knob in knobs}
    for name, value in [*pinned.items(), *excluded, *incumbent.items()]:
        _known(by_name, name, value)
    _not_contradictory(pinned, excluded)
    today = _normal(by_name, {knob.name: knob.default for knob in knobs} | {**incumbent, **pinned})
    for option, wanted in (("--set", pinned), ("--incumbent", incumbent)):
        _not_lost(by_name, option, wanted, today)
    reason = _impossible(by_name, today) or check(today)
    if reason is not None:
        raise UsageError(
            f"the incumbent ({_settings_text(today)}) cannot run here: {reason}; "
            "choose another with --incumbent or --set"
        )
    entries = {digest(today): CandidateEntry(candidate=_candidate(by_name, today, today), incumbent=True)}
    for settings in _combinations(knobs, by_name, space, pinned):
        exclusion = _impossible(by_name, settings) or _by_user(settings, excluded) or check(settings)
        entry = CandidateEntry(candidate=_candidate(by_name, settings, today), exclusion=exclusion)
        entries.setdefault(entry.candidate.id, entry)
    _some_left([entry for entry in entries.values() if not entry.incumbent], excluded)
    return list(entries.values())


def _known(by_name: Mapping[str, Knob], name: str, value: str) -> None:
    if name not in by_name:
        raise UsageError(f"unknown knob {name!r}; this engine has {', '.join(by_name)}")
    if by_name[name].value(value) is None:
        values = ", ".join(one.name for one in by_name[name].values)
        raise UsageError(f"unknown value {value!r} of {name}; it can be {values}")


def _not_lost(by_name: Mapping[str, Knob], option: str, wanted: Mapping[str, str], today: Settings) -> None:
    """Refuse a value that was asked for and that the incumbent does not have."""
    lost = next((name for name, value in wanted.items() if today[name] != value), None)
    if lost is None:
        return
    when = by_name[lost].when
    if all(today[other] in values for other, values in when.items()):
        raise UsageError(f"{option} {lost}={wanted[lost]} contradicts --set {lost}={today[lost]}; leave one out")
    needs = " and ".join(f"{other} in {'/'.join(values)}" for other, values in when.items())
    raise UsageError(f"{option} {lost}={wanted[lost]} has no effect on the incumbent: it needs {needs}; set that too")


def _not_contradictory(pinned: Mapping[str, str], excluded: Sequence[tuple[str, str]]) -> None:
    both = next((f"{name}={value}" for name, value in excluded if pinned.get(name) == value), None)
    if both is not None:
        raise UsageError(f"--exclude {both} contradicts --set {both}; leave one out")


def _some_left(challengers: Sequence[CandidateEntry], excluded: Sequence[tuple[str, str]]) -> None:
    """Refuse a run that could not end in anything but "keep what you run", because the user excluded all else."""
    takes_part = any(_by_user(entry.candidate.settings, excluded) for entry in challengers)
    if takes_part and all(entry.exclusion is not None for entry in challengers):
        named = " ".join(f"--exclude {name}={value}" for name, value in excluded)
        raise UsageError(
            f"no candidate is left beside what runs today: {named} takes out all others that can run here; "
            "exclude less, or widen --space"
        )


def _combinations(
    knobs: Sequence[Knob], by_name: Mapping[str, Knob], space: Space, pinned: Mapping[str, str]
) -> list[Settings]:
    """Distinct combinations of the values that the space holds, inactive knobs at their default."""
    reach = SPACES.index(space)
    choices = [
        [pinned[knob.name]]
        if knob.name in pinned
        else [value.name for value in knob.values if SPACES.index(value.space) <= reach]
        for knob in knobs
    ]
    found: dict[str, Settings] = {}
    for values in itertools.product(*choices):
        settings = _normal(by_name, dict(zip((knob.name for knob in knobs), values, strict=True)))
        if all(settings[name] == value for name, value in pinned.items()):
            found.setdefault(digest(settings), settings)
    return list(found.values())


def _normal(by_name: Mapping[str, Knob], settings: Settings) -> Settings:
    """The same settings with every inactive knob at its default, in the knobs' order."""
    normal: Settings = {}
    for name, knob in by_name.items():
        active = all(settings[other] in values for other, values in knob.when.items())
        normal[name] = settings[name] if active else knob.default
    return normal


def _impossible(by_name: Mapping[str, Knob], settings: Settings) -> str | None:
    for name, value in settings.items():
        reason = _value(by_name, name, value).unavailable
        if reason is not None:
            return f"{name}={value}: {reason}"
    return None


def _by_user(settings: Settings, excluded: Sequence[tuple[str, str]]) -> str | None:
    hit = next((f"{name}={value}" for name, value in excluded if settings[name] == value), None)
    return hit and f"{hit} was excluded by request"


def claims_to_be_exact(knobs: Iterable[Knob], settings: Settings, reference: Mapping[str, str]) -> bool:
    """Whether settings lose nothing beside those of their reference: each lossy value of theirs is one of it too."""
    by_name = {knob.name: knob for knob in knobs}
    return not any(
        _value(by_name, name, value).lossy and reference.get(name) != value for name, value in settings.items()
    )


def _candidate(by_name: Mapping[str, Knob], settings: Settings, incumbent: Settings) -> Candidate:
    values = {name: _value(by_name, name, value) for name, value in settings.items()}
    return Candidate(
        id=digest(settings),
        label=_label(by_name, settings),
        settings=settings,
        # What the user runs already is accepted; only a further loss needs a judgement.
        lossy=any(value.lossy and settings[name] != incumbent[name] for name, value in values.items()),
        compiles=any(value.compiles for value in values.values()),
        complexity=sum(value.simplicity for value in values.values()),
    )


def _label(by_name: Mapping[str, Knob], settings: Settings) -> str:
    """The values that differ from the engine's defaults; "default" where none does."""
    changed = [f"{name}={value}" for name, value in settings.items() if value != by_name[name].default]
    return " ".join(changed) or "default"


def _settings_text(settings: Settings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _value(by_name: Mapping[str, Knob], name: str, value: str) -> KnobValue:
    found = by_name[name].value(value)
    assert found is not None, f"{name}={value}"
    return found
