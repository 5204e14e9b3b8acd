"""Pure: the journal → the longest context of a candidate: predicted, then found by trials at full length.

A trial is a process of its own that prefills a prompt and decodes `OUTPUT_TOKENS` more, `CALLS` times in a row: the
later calls find the heap that the first one left. The first trial aims at what is predicted to fit, without a
prediction at twice what has run; then lengths double until one fails, and the gap is halved on a logarithmic scale
until it is `TOLERANCE` wide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kvat_core.run import Run
from kvat_core.schema import BoundedBy, Cell, ContextMethod, ContextTrial, LaunchOrder, MaxContext, Scenario

OUTPUT_TOKENS = 32
"""Decoded after the prompt of a trial: prefill is not all that has to fit."""
TOLERANCE = 0.01
"""Relative gap between what passed and what failed at which the search ends."""
CALLS = 3
"""In a row, in one process, that a length has to pass."""
RESERVE = 0.03
"""Share that is kept back where something else than a fixed length bounds the context."""
LONGEST_PREFILL_S = 120.0
"""Lengths that must take the incumbent longer to prefill, at its rate for shorter prompts, are not tried."""
EXPECTED: dict[str, BoundedBy] = {"oom_device": "device_memory", "oom_host": "host_memory", "timeout": "time"}
"""Kinds of failure that bound a context, and what then does; any other one is to be told."""


@dataclass(frozen=True)
class Reach:
    """Between which lengths to search, in tokens of prompt and output together."""

    held: int
    """The longest scenario that was measured, and so needs no trial; 0 = none."""
    most: int | None
    """What is not exceeded; None = nobody knows."""
    most_by: BoundedBy
    predicted: int | None = None
    """The longest that is predicted to fit, up to `most`."""


def next_length(reach: Reach, trials: Sequence[ContextTrial]) -> int | None:
    """Where to look between what passed and what failed, or may; None when the longest is known."""
    passed, failed = _bracket(reach, trials)
    if failed is not None:
        near_enough = failed - passed <= max(1, TOLERANCE * passed)
        return None if near_enough else min(max(math.isqrt(passed * failed), passed + 1), failed - 1)
    if reach.most is not None and passed >= reach.most:
        return None
    aim = reach.predicted if reach.predicted is not None and reach.predicted > passed else 2 * passed
    return aim if reach.most is None else min(aim, reach.most)


def longest(reach: Reach, trials: Sequence[ContextTrial]) -> MaxContext | None:
    """What the trials have shown; None as long as another one is due, or if nothing has run."""
    passed, failed = _bracket(reach, trials)
    if passed == 0 or next_length(reach, trials) is not None:
        return None
    if failed is None:
        return _max_context(passed, "probed", reach.most_by)
    kind = next(trial.failure.kind for trial in trials if trial.failure and trial.tokens == failed)
    return _max_context(passed, "probed", EXPECTED.get(kind, "failure"))


def predicted_tokens(most: int, fits: Callable[[int], bool | None]) -> int | None:
    """The longest context that is predicted to fit, at most `most`; None = no prediction, or nothing fits.

    Args:
        fits: whether so many tokens do, monotonous; None where it cannot be told.
    """
    if fits(most) is None:
        return None
    return bisect_left(range(1, most + 1), True, key=lambda tokens: not fits(tokens)) or None


def scenario(tokens: int) -> Scenario:
    """The call of a trial."""
    output_tokens = max(2, min(OUTPUT_TOKENS, tokens - 1))
    return Scenario(prompt_tokens=max(1, tokens - output_tokens), output_tokens=output_tokens)


# Of a run


def to_try(run: Run, candidate_id: str) -> int | None:
    """The next length to try of a candidate; None where nothing is to be tried, or enough is known."""
    reach = _reach(run, candidate_id)
    return None if reach is None or reach.held == 0 else next_length(reach, _trials(run, candidate_id))


def measured(run: Run, candidate_id: str) -> MaxContext | None:
    """Longest context of a candidate as trials have shown it; None if they have not, or not yet."""
    reach = _reach(run, candidate_id)
    return None if reach is None else longest(reach, _trials(run, candidate_id))


def known(run: Run, candidate_id: str) -> MaxContext | None:
    """The same, or what is predicted; None where that is unknown, too."""
    found, predicted = measured(run, candidate_id), run.entry(candidate_id).predicted_context_tokens
    if found is not None or predicted is None:
        return found
    most, bounded_by = _bound(run)
    if most is None or predicted < most:
        bounded_by = "host_memory" if run.header.machine.device_memory_bytes is None else "device_memory"
    tokens = max(predicted if most is None else min(predicted, most), held_tokens(run, candidate_id))
    return _max_context(tokens, "predicted", bounded_by)


def trial_s(run: Run, order: LaunchOrder) -> float:
    """What a launch for a trial takes at least, seconds: a load like those before it, and its calls at a known rate."""
    cell = order.cells[0]
    loads_s = [one.start_s + one.load_s for one in run.loaded]
    tps = _prefill_tps(run, cell.candidate)
    calls_s = 0.0 if tps is None else CALLS * Scenario.of_key(cell.scenario).total_tokens / tps
    return calls_s + (fmean(loads_s) if loads_s else 0.0)


def _trials(run: Run, candidate_id: str) -> list[ContextTrial]:
    name = run.alias_of(candidate_id) or candidate_id
    return [trial for trial in run.context_trials if trial.candidate == name]


def _reach(run: Run, candidate_id: str) -> Reach | None:
    """Where to search for a candidate; None in a run that does not ask for it."""
    if run.header.longest_context is None:
        return None
    most, most_by = _bound(run)
    return Reach(held_tokens(run, candidate_id), most, most_by, run.entry(candidate_id).predicted_context_tokens)


def _bound(run: Run) -> tuple[int | None, BoundedBy]:
    """What no candidate is to exceed, and why: one for all, so that no speed counts as length."""
    wanted = run.header.longest_context
    if wanted is None:
        return run.header.shape.max_context_tokens, "model"
    tps = _prefill_tps(run, run.incumbent)
    in_time = None if tps is None else int(tps * LONGEST_PREFILL_S)
    if in_time is not None and (wanted.up_to_tokens is None or in_time < wanted.up_to_tokens):
        return in_time, "time"
    return wanted.up_to_tokens, wanted.by


def held_tokens(run: Run, candidate_id: str) -> int:
    """Of the longest scenario that was measured; 0 = none."""
    return max((scenario.total_tokens for scenario in _held(run, candidate_id)), default=0)


def _held(run: Run, candidate_id: str) -> list[Scenario]:
    """Scenarios that were measured."""
    cells = (Cell(candidate=candidate_id, scenario=key) for key in run.scenarios)
    return [run.scenarios[cell.scenario] for cell in cells if run.samples_of(cell)]


def _prefill_tps(run: Run, candidate_id: str) -> float | None:
    """Prompt tokens per second in the longest scenario measured; longer prompts are no faster."""
    longest_one = max(_held(run, candidate_id), key=lambda one: one.prompt_tokens, default=None)
    if longest_one is None:
        return None
    rounds = run.medians_of(Cell(candidate=candidate_id, scenario=longest_one.key))
    ttft_s = median(figures.ttft_s for figures in rounds.values())
    return longest_one.prompt_tokens * longest_one.batch_size / ttft_s


# Arithmetic


def _bracket(reach: Reach, trials: Sequence[ContextTrial]) -> tuple[int, int | None]:
    """The longest that passed of all below the shortest that failed, and that one."""
    failed = min((trial.tokens for trial in trials if trial.failure is not None), default=None)
    passed = (trial.tokens for trial in trials if failed is None or trial.tokens < failed)
    return max((reach.held, *passed)), failed


def _max_context(tokens: int, method: ContextMethod, bounded_by: BoundedBy) -> MaxContext:
    reserve = 0.0 if bounded_by in ("model", "user") else RESERVE
    return MaxContext(tokens=tokens, safe_tokens=int(tokens * (1 - reserve)), method=method, bounded_by=bounded_by)
