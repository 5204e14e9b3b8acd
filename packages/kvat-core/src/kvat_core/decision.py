"""Pure: the journal → winner, verdict, equivalents and confidence.

A decision is about a difference: candidates are compared as paired ratios over the same
blocks. What cannot be told apart is treated as equal, and the simplest of the equal wins,
which is the incumbent wherever it is among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvat_core import limits, scoring, screening, stats
from kvat_core.field import Field
from kvat_core.run import MAX_REJECTED, Run
from kvat_core.schema import Confidence, Ratio, Ratios, Verdict

MEMORY_STEP = 0.02
"""Log of a ratio of peaks within which two count as equal."""
MAX_PROBABILITY = 0.99
"""A run of a few launches on one machine is never surer than this."""


@dataclass(frozen=True)
class Decision:
    """What a run decided, and how sure it is."""

    winner: str
    verdict: Verdict
    equivalents: tuple[str, ...]
    ratios: Ratios | None
    confidence: Confidence
    scores: dict[str, Ratio]
    """Score ÷ reference of every measured candidate, eligible or not."""


def decide(run: Run) -> Decision | None:
    """The decision that the journal supports; None when no measured candidate is eligible."""
    field = Field(run) if run.candidates else None
    if field is None or not field.eligible:
        return None
    incumbent = run.incumbent
    if incumbent in run.live and incumbent not in field.utilities:
        return None  # a run that was cut before it knew what to compare with
    reference = field.reference or field.leader
    winner, verdict = _choose(field, incumbent, field.leader)
    return Decision(
        winner=winner,
        verdict=verdict,
        equivalents=_equivalents(field, winner),
        ratios=_ratios(field, winner, incumbent) if incumbent in field.utilities else None,
        confidence=_confidence(field, winner),
        scores=_screened_scores(run) | {name: field.compare(name, reference).ratio() for name in field.utilities},
    )


def _choose(field: Field, incumbent: str, leader: str) -> tuple[str, Verdict]:
    near = field.near(leader)
    if incumbent not in field.preferred:
        chosen = _plainest(field.run, near)
        return chosen, "better" if limits.keeps_all(field.run, chosen) else "undecided"
    better = [name for name in near if field.shown_better(name, incumbent)]
    if better:
        return _plainest(field.run, better), "better"
    ahead = field.claimed(field.fastest, incumbent)
    return incumbent, "undecided" if ahead.mean >= math.log1p(field.epsilon) or ahead.n < 2 else "tie"


def _equivalents(field: Field, winner: str) -> tuple[str, ...]:
    """Eligible candidates that are shown neither worse than the winner nor better; of a single launch nothing is."""
    return tuple(
        name
        for name in field.eligible
        if name != winner
        and field.compare(name, winner).error is not None
        and not field.shown_worse(name, winner)
        and not field.shown_worse(winner, name)
    )


def _plainest(run: Run, names: Sequence[str]) -> str:
    """Who is taken of equals: no failure, lossless, less memory where it matters (in steps of 2 %), no compilation,
    simplest.
    """
    peaks = scoring.compared_peaks(run)
    failed = {one.cell.candidate for one in run.timing_failures}
    place = {entry.candidate.id: rank for rank, entry in enumerate(run.candidates)}

    def key(name: str) -> tuple[bool, bool, int, bool, int, int]:
        candidate = run.entry(name).candidate
        memory_steps = round(math.log(peaks[name]) / MEMORY_STEP) if name in peaks else 0
        return name in failed, candidate.lossy, memory_steps, candidate.compiles, candidate.complexity, place[name]

    return min(names, key=key)


def _ratios(field: Field, winner: str, incumbent: str) -> Ratios:
    return Ratios(
        score=field.claimed(winner, incumbent).ratio(),
        ttft=field.claimed(winner, incumbent, "ttft").ratio(),
        decode=field.claimed(winner, incumbent, "decode").ratio(),
    )


def _screened_scores(run: Run) -> dict[str, Ratio]:
    """What screening has seen, in one launch each."""
    if not run.before_the_blocks or not scoring.screened(run, [run.incumbent])[run.incumbent].score:
        return {}
    found = screening.standing(run, [name for name in run.live if run.alias_of(name) is None])
    return {name: stats.Comparison(ahead, None, 0.0, 1).ratio() for name, ahead in found.items()}


def _passed_over(field: Field, winner: str) -> dict[str, stats.Comparison]:
    """What screening alone has seen, and could win, against the winner."""
    run, reference = field.run, field.reference or winner
    raced = {name: field.mean(name, reference) for name in field.utilities}
    found = screening.passed_over(run, field.compare(winner, reference), raced, reference)
    return {name: seen for name, seen in found.items() if scoring.may_win(run, name)}


def _unmeasured(run: Run) -> list[str]:
    return [
        name
        for name in run.live
        if run.alias_of(name) is None and scoring.may_win(run, name) and not scoring.complete_rounds(run, name)
    ]


def _confidence(field: Field, winner: str) -> Confidence:
    """Probability that no candidate that may win, raced or passed over after screening, beats the winner by over ε."""
    run = field.run
    threshold = math.log1p(field.epsilon)
    raced = [field.compare(name, winner) for name in field.eligible if name != winner]
    passed_over = _passed_over(field, winner)
    # A run that was cut short may not have come to all; of these nothing is known.
    unknown = [] if run.before_the_blocks else [stats.compare([]) for _ in _unmeasured(run)]
    none_seen = stats.probability_of_none_above(
        [*raced, *passed_over.values(), *unknown], threshold, f"{run.header.seed}/{winner}"
    )
    none_unseen = 1 - screening.chance_of_better_unseen(run, threshold) if run.before_the_blocks else 1.0
    probability = min(MAX_PROBABILITY, none_seen * none_unseen)
    blocks = len(field.utilities[winner].score)
    steady = all(run.rejected_share(name) <= MAX_REJECTED for name in {winner, run.incumbent})
    level: Literal["high", "medium", "low"] = "low"
    if steady and probability >= 0.95 and blocks >= 6:
        level = "high"
    elif steady and probability >= 0.80 and blocks >= 2:
        level = "medium"
    return Confidence(level=level, probability=probability, noise_floor=field.noise_floor, epsilon=field.epsilon)
