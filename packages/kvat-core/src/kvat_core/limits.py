"""Pure: does a candidate keep the limits of the profile? They are feasibility, never score.

Each scenario has to keep each limit. What varies from call to call is judged by two rules, and neither trusts a
point estimate:

- A median is kept if the whole 95 % interval over launches keeps it, the one that the plan prints.
- Another percentile p is kept if so few of n calls violate it that this would be improbable (5 %) were the share of
  violations 1 - p: BinomCDF(violations; n, 1 - p) ≤ 0.05, the rule for early stopping of MLPerf Inference. It is
  failed if so many do that the same holds of the other tail.

In between a limit is undecided. One launch decides nothing, as it does not tell how much launches differ.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

from scipy.special import bdtr, bdtrc

from kvat_core import context, stats
from kvat_core.bounds import BY_NAME, CONTEXT, PEAKS, TIMED, Bound
from kvat_core.run import Run
from kvat_core.schema import (
    Cell,
    Kept,
    Limit,
    LimitResult,
    Limits,
    ModelShape,
    NearMiss,
    Resources,
    Sample,
)

CONFIDENCE = 0.95
"""That a percentile said to be kept, or not to be, is so; one-sided."""
MEMORY_MARGIN = 0.02
"""Peaks of two processes may differ by this share; a peak that is nearer to its limit is undecided."""
MEDIAN = 50.0
CLOSEST = 3
"""Candidates that a plan names where nothing is feasible."""
_TO_WORST: tuple[Kept, ...] = ("pass", "undecided", "fail")


@dataclass(frozen=True)
class _Finding:
    """What was seen of a limit, in one scenario or in none."""

    verdict: Kept
    observed: float | None
    lacks: str = ""
    """Why it is undecided, where it is."""
    scenario: str | None = None


_UNMEASURED = _Finding("undecided", None, lacks="it was not measured")
_ONE_LAUNCH = "one launch does not tell how much launches differ"


def results(run: Run, candidate_id: str) -> tuple[LimitResult, ...]:
    """Each limit of the profile, judged by all that was measured of a candidate so far."""
    limits = run.header.profile.limits
    found: list[LimitResult] = []
    for bound, peak_of in PEAKS:
        if (most := getattr(limits, bound.name)) is not None:
            found.append(_result(bound, most, None, _peak(run, candidate_id, most, peak_of)))
    for bound, metric in TIMED:
        if (limit := getattr(limits, bound.name)) is not None:
            finding = _timed(run, candidate_id, bound, limit, metric)
            found.append(_result(bound, limit.value, limit.percentile, finding))
    if (least := limits.min_context_tokens) is not None:
        found.append(_result(CONTEXT, least, None, _context(run, candidate_id, least)))
    return tuple(found)


def misses(run: Run, candidate_id: str) -> str | None:
    """Which limits a candidate fails and by how much, in words; None where none is shown to be failed."""
    return " and ".join(one.reason for one in results(run, candidate_id) if one.verdict == "fail") or None


def apparent_miss(run: Run, candidate_id: str) -> float:
    """By what share a candidate seems to miss its limits, by all that was observed or predicted; 0 = it keeps them.

    Decides nothing: it tells of whom more should be seen.
    """
    limits, predicted = run.header.profile.limits, run.entry(candidate_id).predicted_peak_bytes
    most = limits.max_device_bytes or limits.max_host_bytes
    missed = [predicted / most - 1] if most and predicted else []
    for one in results(run, candidate_id):
        if one.observed is not None:
            missed.append(BY_NAME[one.name].miss(one.observed, one.limit))
    return max(0.0, *missed) if missed else 0.0


def judged(run: Run, candidate_ids: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of some candidates that fail no limit; and those of these that keep all for sure, or all if none does."""
    verdicts = {name: {one.verdict for one in results(run, name)} for name in candidate_ids}
    fail_none = [name for name, kinds in verdicts.items() if "fail" not in kinds]
    return fail_none, [name for name in fail_none if verdicts[name] <= {"pass"}] or fail_none


def keeps_all(run: Run, candidate_id: str) -> bool:
    """Whether a candidate is shown to keep each limit."""
    return all(one.verdict == "pass" for one in results(run, candidate_id))


def undecided(found: Sequence[LimitResult]) -> str | None:
    """Which of a candidate's limits are undecided, and what they lack, in words."""
    return " and ".join(one.reason for one in found if one.verdict == "undecided") or None


def closest(run: Run, candidate_ids: Iterable[str]) -> tuple[NearMiss, ...]:
    """Of candidates that all fail a limit, those whose largest relative miss is smallest, the first first."""
    labels = {entry.candidate.id: entry.candidate.label for entry in run.candidates}
    near = [
        NearMiss(id=name, label=labels[name], misses=failed)
        for name in candidate_ids
        if (failed := tuple(one for one in results(run, name) if one.verdict == "fail"))
    ]
    return tuple(sorted(near, key=lambda one: max(miss.missed_by or 0.0 for miss in one.misses))[:CLOSEST])


def limits_memory(limits: Limits) -> bool:
    """Whether the peak of every candidate has to be known."""
    return limits.max_device_bytes is not None or limits.max_host_bytes is not None


def impossible(limits: Limits, shape: ModelShape, device: str) -> str | None:
    """Which limit no candidate can keep, or none can be judged by, whatever is measured; None = no such."""
    holds, least = shape.max_context_tokens, limits.min_context_tokens
    if least is not None and holds is not None and holds < least:
        return f"the model holds {holds} tokens, fewer than the limit of {least} (--min-context); ask for less"
    if limits.max_device_bytes is not None and device == "cpu":
        return "device cpu has no memory of its own to limit (--max-vram); limit the host's with --max-ram"
    return None


def binomial_verdict(calls: int, violations: int, percentile: float) -> Kept:
    """Whether at least `percentile` % of all calls keep a limit that some of those made violate."""
    may_violate = 1 - percentile / 100
    if bdtr(violations, calls, may_violate) <= 1 - CONFIDENCE:
        return "pass"
    # bdtrc(k) is the probability of more than k.
    if violations and bdtrc(violations - 1, calls, may_violate) <= 1 - CONFIDENCE:
        return "fail"
    return "undecided"


@cache
def calls_needed(violations: int, percentile: float, confidence: float) -> int:
    """The smallest number of calls in which so many violations still pass."""
    may_violate = 1 - percentile / 100

    def enough(calls: int) -> bool:
        return bool(bdtr(violations, calls, may_violate) <= 1 - confidence)

    most = violations + 1
    while not enough(most):
        most *= 2
    return violations + 1 + bisect_left(range(violations + 1, most), True, key=enough)


def _peak(run: Run, candidate_id: str, most: float, peak_of: Callable[[Resources], int | None]) -> _Finding:
    """By the largest peak in a process of the candidate's own."""
    cells = [run.original(Cell(candidate=candidate_id, scenario=key)) for key in run.scenarios]
    own = [run.own_memory[cell] for cell in cells if cell in run.own_memory]
    peaks = [peak for one in own if (peak := peak_of(one)) is not None]
    if not peaks:
        return _Finding("undecided", None, lacks="its peak is not known")
    peak = max(peaks)
    if peak > most:
        return _Finding("fail", peak)
    if peak * (1 + MEMORY_MARGIN) <= most:
        return _Finding("pass", peak)
    return _Finding("undecided", peak, lacks=f"peaks of two processes may differ by {_percent(MEMORY_MARGIN)}")


def _timed(run: Run, candidate_id: str, bound: Bound, limit: Limit, metric: Callable[[Sample], float]) -> _Finding:
    """In the scenario that is furthest from keeping the limit."""
    judge = _by_median if limit.percentile == MEDIAN else _by_count
    findings = []
    for key in run.scenarios:
        rounds = run.blocks_of(Cell(candidate=candidate_id, scenario=key))
        launches = [[metric(sample) for sample in samples] for _, samples in sorted(rounds.items())]
        findings.append(replace(judge(launches, bound, limit), scenario=key))
    return max(findings, key=lambda one: (_TO_WORST.index(one.verdict), _distance(bound, limit, one)))


def _distance(bound: Bound, limit: Limit, finding: _Finding) -> float:
    return -math.inf if finding.observed is None else bound.miss(finding.observed, limit.value)


def _by_median(launches: Sequence[Sequence[float]], bound: Bound, limit: Limit) -> _Finding:
    if not launches:
        return _UNMEASURED
    found = stats.estimate([median(calls) for calls in launches])
    best, worst = (found.low, found.high) if bound.at_most else (found.high, found.low)
    if len(launches) < 2:
        return _Finding("undecided", found.median, lacks=_ONE_LAUNCH)
    if bound.keeps(worst, limit.value):
        return _Finding("pass", found.median)
    if not bound.keeps(best, limit.value):
        return _Finding("fail", found.median)
    interval = f"{bound.shown(found.low)} to {bound.shown(found.high)}"
    return _Finding("undecided", found.median, lacks=f"95 % interval over {found.n} launches: {interval}")


def _by_count(launches: Sequence[Sequence[float]], bound: Bound, limit: Limit) -> _Finding:
    calls = sorted((call for launch in launches for call in launch), reverse=not bound.at_most)
    if not calls:
        return _UNMEASURED
    observed = calls[math.ceil(limit.percentile * len(calls) / 100) - 1]
    if len(launches) < 2:
        return _Finding("undecided", observed, lacks=_ONE_LAUNCH)
    violations = sum(not bound.keeps(call, limit.value) for call in calls)
    needed = calls_needed(violations, limit.percentile, CONFIDENCE)
    lacks = f"violated by {violations} of {len(calls)} calls; to pass with that it takes {needed} calls"
    return _Finding(binomial_verdict(len(calls), violations, limit.percentile), observed, lacks)


def _context(run: Run, candidate_id: str, least: int) -> _Finding:
    """By what the model can hold at all, by trials of lengths, and by the longest of the scenarios."""
    holds = run.header.shape.max_context_tokens
    if holds is not None and holds < least:
        return _Finding("fail", holds)
    if (longest := context.measured(run, candidate_id)) is not None:
        if longest.tokens >= least:
            return _Finding("pass", longest.tokens)
        if longest.bounded_by in ("device_memory", "host_memory", "failure", "model"):
            return _Finding("fail", longest.tokens)
        return _Finding("undecided", longest.tokens, lacks="longer was not tried")
    cells = {key: Cell(candidate=candidate_id, scenario=key) for key in run.scenarios}
    held = [scenario.total_tokens for key, scenario in run.scenarios.items() if run.samples_of(cells[key])]
    if held and max(held) >= least:
        return _Finding("pass", max(held))
    return _Finding("undecided", max(held, default=None), lacks="nothing longer was tried")


def _result(bound: Bound, limit: float, percentile: float | None, finding: _Finding) -> LimitResult:
    seen = "" if finding.observed is None else f": {bound.shown(finding.observed)}"
    where = "" if finding.scenario is None else f" in {finding.scenario}"
    condition = bound.condition(limit, percentile)
    missed_by = None
    if finding.verdict == "fail" and finding.observed is not None:
        missed_by = bound.miss(finding.observed, limit)
        reason = f"misses {condition} by {_percent(missed_by)}{seen}{where}"
    elif finding.verdict == "pass":
        reason = f"keeps {condition}{seen}{where}"
    else:
        reason = f"may keep {condition}{seen}{where} ({finding.lacks})"
    return LimitResult(
        name=bound.name,
        limit=limit,
        percentile=percentile,
        scenario=finding.scenario,
        observed=finding.observed,
        verdict=finding.verdict,
        missed_by=missed_by,
        reason=reason,
    )


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %" if share < 0.1 else f"{share * 100:.0f} %"
