"""What `kvat tune --dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import indent
from typing import TYPE_CHECKING

from kvat_cli.columns import columns
from kvat_core.bounds import CONTEXT, PEAKS, TIMED
from kvat_core.schema import SPACES, Limit
from kvat_core.space import SAME_RECIPE
from kvat_report import numbers
from kvat_report.labels import some_of

if TYPE_CHECKING:
    from kvat_core.preview import DryRun, Prospect
    from kvat_core.schema import Knob, Limits, Scenario, Space

_SHOWN = 50
"""Lines about single candidates; a full space has thousands."""
_HEADINGS = ("candidate", "load", "peak without libraries", "TTFT at least", "decode at most")


def print_dry_run(found: DryRun) -> None:
    """Candidates, exclusions, limits, launches and what is known of the time."""
    print(f"{found.model} on {found.device} with {found.engine}, profile {found.profile.name}: nothing was measured.")
    largest = max(found.profile.scenarios, key=lambda scenario: scenario.total_tokens * scenario.batch_size)
    title = f"Candidates, what runs today first, with bounds in {largest.key}:"
    _print_first(title, [_row(candidate, largest) for candidate in found.candidates], _HEADINGS)
    acting = [knob for knob in found.knobs if _can_act(knob, found.knobs)]
    _print_block("Values of each knob:", [(knob.name, _values(knob, found.space)) for knob in acting])
    _print_block("Cannot run here:", [row for knob in found.knobs for row in _unavailable(knob)])
    _print_block("Excluded:", list(_exclusions(found)))
    _print_block("Limits:", [(condition,) for condition in _conditions(found.profile.limits)])
    _print_first("Cannot keep them:", [(one.label, miss) for one in found.candidates for miss in one.misses])
    _print_block("Launches and time:", [(line,) for line in _effort(found)])
    _print_block("Notes:", [(note,) for note in found.notes])


def _print_block(title: str, rows: Sequence[Sequence[str]]) -> None:
    if rows:
        print(f"\n{title}\n{indent(columns(rows), '  ')}")


def _print_first(title: str, rows: Sequence[Sequence[str]], *heading: Sequence[str]) -> None:
    _print_block(title, [*heading, *rows[:_SHOWN]])
    if (more := len(rows) - _SHOWN) > 0:
        print(f"  and {more} more, all of which --json names")


def _row(candidate: Prospect, scenario: Scenario) -> tuple[str, ...]:
    bounds = candidate.bounds.get(scenario.key)
    return (
        candidate.label,
        ", ".join(map(str, candidate.loads)),
        numbers.size(candidate.predicted_peak_bytes),
        numbers.NOTHING if bounds is None else numbers.seconds(bounds.ttft_s),
        numbers.NOTHING if bounds is None else numbers.tokens_per_second(bounds.decode_tps),
    )


def _can_act(knob: Knob, knobs: Sequence[Knob]) -> bool:
    """Whether what a knob needs of the others can run here: without a quantised cache, none of its options matters."""
    values = {(other.name, value.name): value for other in knobs for value in other.values}
    needed = ([values[name, choice] for choice in names] for name, names in knob.when.items())
    return all(any(value.unavailable is None for value in options) for options in needed)


def _values(knob: Knob, space: Space) -> str:
    """Those that can run; in brackets those that only a wider space tries."""
    reach = SPACES.index(space)
    shown = (
        value.name if SPACES.index(value.space) <= reach else f"({value.name})"
        for value in knob.values
        if value.unavailable is None
    )
    return ", ".join(shown)


def _unavailable(knob: Knob) -> Iterator[tuple[str, str]]:
    for value in knob.values:
        if value.unavailable is not None:
            yield f"{knob.name}={value.name}", value.unavailable


def _exclusions(found: DryRun) -> Iterator[tuple[str, str]]:
    """What is excluded for another reason than a single value that cannot run, which is told by value."""
    told = tuple(f"{name}: " for knob in found.knobs for name, _ in _unavailable(knob))
    others = [one for one in found.excluded if not one.reason.startswith(told)]
    same = [one for one in others if one.reason.startswith(SAME_RECIPE)]
    for one in others:
        if one not in same:
            yield some_of(one.labels), one.reason
    if same:
        yield some_of([label for one in same for label in one.labels]), "would be done exactly as another candidate"


def _conditions(limits: Limits) -> Iterator[str]:
    for bound in (*(peak for peak, _ in PEAKS), *(timed for timed, _ in TIMED), CONTEXT):
        limit = getattr(limits, bound.name)
        if isinstance(limit, Limit):
            yield bound.condition(limit.value, limit.percentile)
        elif limit is not None:
            yield bound.condition(limit, None)
    if limits.allow_lossy:
        yield "what loses output is recommended, however much it loses, unless it is broken"
    elif limits.max_kl_nats is not None:
        yield f"KL from the reference ≤ {limits.max_kl_nats:g} nats"


def _effort(found: DryRun) -> Iterator[str]:
    """Figures that can be answered for, which a forecast of the time cannot."""
    yield (
        f"about {found.launches} launches with --search {found.search} if nothing fails; "
        f"to measure every candidate once takes {found.loads}"
    )
    if found.one_call_each_s is not None:
        yield (
            "one call of every candidate in every scenario takes "
            f"{numbers.duration(found.one_call_each_s)} at least, loading apart"
        )
    if found.budget_s is None:
        yield "how long it takes is not known before the first launch; --budget limits it"
    else:
        yield f"it ends after {numbers.duration(found.budget_s)}, with what has been measured by then"
