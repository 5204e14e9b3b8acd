"""Pure: utilities → winner, verdict, equivalents and confidence.

A decision is about a difference: candidates are compared as paired ratios over the same
blocks. What cannot be told apart is treated as equal, and the simplest of the equal wins,
which is the incumbent wherever it is among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from kvat_core import limits, scoring, stats
from kvat_core.run import MAX_REJECTED, Run
from kvat_core.schema import Confidence, Ratio, Ratios, Verdict

MIN_DIFFERENCE = 0.01
"""No difference below 1 % is ever claimed."""
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


class _Field:
    """The measured candidates, compared pairwise."""

    def __init__(self, run: Run) -> None:
        self.run = run
        measured = [
            candidate
            for candidate in run.live
            if run.alias_of(candidate) is None and scoring.complete_rounds(run, candidate)
        ]
        self.utilities = scoring.utilities(run, measured)
        self.eligible = limits.preferred(
            run, [name for name in self.utilities if scoring.ineligible_reason(run, name) is None]
        )
        self.noise_floor = self._noise_floor()
        self.epsilon = max(MIN_DIFFERENCE, 2 * self.noise_floor)

    def _noise_floor(self) -> float:
        if not self.utilities:
            return 0.0
        common = sorted(set.intersection(*(set(utility.score) for utility in self.utilities.values())))
        return stats.noise_floor([[utility.score[number] for number in common] for utility in self.utilities.values()])

    def log_ratios(self, over: str, under: str, kind: Literal["score", "ttft", "decode"] = "score") -> list[float]:
        """Log of over ÷ under in each block that both have."""
        numerator = getattr(self.utilities[over], kind)
        denominator = getattr(self.utilities[under], kind)
        return [numerator[number] - denominator[number] for number in sorted(numerator.keys() & denominator.keys())]

    def mean(self, candidate: str, over: str) -> float:
        """Best estimate of a candidate's log score ratio to another one."""
        return fmean(self.log_ratios(candidate, over))

    def equivalents(self, winner: str) -> tuple[str, ...]:
        """Eligible candidates that are shown neither worse than the winner nor better."""
        return tuple(
            name
            for name in self.eligible
            if name != winner and not self.shown_worse(name, winner) and not self.shown_worse(winner, name)
        )

    def shown_worse(self, candidate: str, than: str) -> bool:
        """Whether a candidate is worse for sure, and by more than ε perhaps."""
        ratio = stats.ratio(self.log_ratios(candidate, than))
        if ratio.low is None or ratio.high is None:
            return False
        return ratio.high < 1 and ratio.low < 1 - self.epsilon

    def shown_better(self, candidate: str, than: str) -> bool:
        """Whether a candidate is better for sure, and by more than ε at its best estimate."""
        ratio = stats.ratio(self.log_ratios(candidate, than))
        return ratio.low is not None and ratio.low > 1 and ratio.value >= 1 + self.epsilon


def decide(run: Run) -> Decision | None:
    """The decision that the journal supports; None when no measured candidate is eligible."""
    field = _Field(run)
    if not field.eligible:
        return None
    incumbent = run.incumbent
    if incumbent in run.live and incumbent not in field.utilities:
        return None  # a run that was cut before it knew what to compare with
    reference = incumbent if incumbent in field.utilities else field.eligible[0]
    leader = max(field.eligible, key=lambda name: field.mean(name, reference))
    winner, verdict = _choose(field, incumbent, leader)
    return Decision(
        winner=winner,
        verdict=verdict,
        equivalents=field.equivalents(winner),
        ratios=_ratios(field, winner, incumbent) if incumbent in field.utilities else None,
        confidence=_confidence(field, winner),
        scores={name: stats.ratio(field.log_ratios(name, reference)) for name in field.utilities},
    )


def _choose(field: _Field, incumbent: str, leader: str) -> tuple[str, Verdict]:
    # As good as the leader: by the best estimate, and not only because the interval is wide.
    near = [
        name
        for name in field.eligible
        if field.mean(leader, name) <= math.log1p(field.epsilon) and not field.shown_worse(name, leader)
    ]
    if incumbent not in field.eligible:
        return min(near, key=lambda name: _plainness(field.run, name)), "better"
    behind = field.shown_worse(incumbent, leader)
    better = [name for name in near if field.shown_better(name, incumbent)]
    if behind and better:
        return min(better, key=lambda name: _plainness(field.run, name)), "better"
    apart = behind or field.mean(leader, incumbent) >= math.log1p(field.epsilon)
    enough = len(field.log_ratios(leader, incumbent)) >= 2
    return incumbent, "undecided" if apart or not enough else "tie"


def _plainness(run: Run, candidate_id: str) -> tuple[int, int, int, int]:
    """Tie-break, less is better: memory that matters (in steps of 2 %), no compilation, simpler values, order."""
    index, entry = next(pair for pair in enumerate(run.candidates) if pair[1].candidate.id == candidate_id)
    memory_steps = round(scoring.memory_log(run, candidate_id) / 0.02)
    return memory_steps, int(entry.candidate.compiles), entry.candidate.complexity, index


def _ratios(field: _Field, winner: str, incumbent: str) -> Ratios:
    return Ratios(
        score=stats.ratio(field.log_ratios(winner, incumbent)),
        ttft=stats.ratio(field.log_ratios(winner, incumbent, "ttft")),
        decode=stats.ratio(field.log_ratios(winner, incumbent, "decode")),
    )


def _confidence(field: _Field, winner: str) -> Confidence:
    """Lower bound (Bonferroni) of the probability that no eligible rival beats the winner by more than ε."""
    threshold = math.log1p(field.epsilon)
    rivals = [name for name in field.eligible if name != winner]
    doubt = sum(stats.probability_above(field.log_ratios(rival, winner), threshold) for rival in rivals)
    probability = min(MAX_PROBABILITY, max(0.0, 1.0 - doubt))
    blocks = len(field.utilities[winner].score)
    steady = all(field.run.rejected_share(name) <= MAX_REJECTED for name in {winner, field.run.incumbent})
    level: Literal["high", "medium", "low"] = "low"
    if steady and probability >= 0.95 and blocks >= 6:
        level = "high"
    elif steady and probability >= 0.80 and blocks >= 2:
        level = "medium"
    return Confidence(level=level, probability=probability, noise_floor=field.noise_floor, epsilon=field.epsilon)
