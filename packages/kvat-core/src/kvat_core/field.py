"""Pure: the measured candidates of a run, compared pairwise over the blocks that they share."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Literal

from kvat_core import limits, scoring, stats
from kvat_core.run import Run
from kvat_core.scoring import Utility
from kvat_core.stats import Comparison, Spread

MIN_DIFFERENCE = 0.01
"""No difference below 1 % is ever claimed."""
ALPHA = 0.05
"""Probability with which anything wrong may be claimed of candidates that are equal."""
LEAST_FRESH = 2
"""Blocks after the choice from which they alone are what is claimed."""
LOOKS = 4
"""Times that a run-off is looked at: after each two of its blocks."""

Kind = Literal["score", "ttft", "decode"]


class Field:
    """The candidates with figures, and what can be said of any two of them.

    Whatever is said of two depends on them, on what runs today, and on those that can still win, never on one that is
    plainly worse: to try something bad changes no decision.

    Args:
        run: the journal so far.
        until: last block that counts; None = all.
    """

    def __init__(self, run: Run, until: int | None = None) -> None:
        self.run = run
        measured = [name for name in run.live if run.alias_of(name) is None and scoring.complete_rounds(run, name)]
        every = scoring.utilities(run, measured)
        self.utilities = _comparable(every if until is None else _cut(every, until), run.incumbent)
        """Of all that share a block with what runs today, or else with the one that has most."""
        fit = [name for name in self.utilities if scoring.unfit_reason(run, name) is None]
        self.eligible, self.preferred = limits.judged(run, fit)
        """Who fails no limit, and takes part in all statistics; and who of these is chosen from."""

    @cached_property
    def reference(self) -> str | None:
        """What the others are compared with: what runs today, or the first of those that have most blocks."""
        today = self.run.incumbent
        most = max(self.utilities, key=lambda name: len(self.utilities[name].score), default=None)
        return today if today in self.utilities else most

    @cached_property
    def leader(self) -> str:
        """The candidate to choose with the best estimate, among those with the most blocks."""
        return self._best_of(self.preferred)

    @cached_property
    def fastest(self) -> str:
        """The same of all that are eligible, of whom some may not keep a limit."""
        return self._best_of(self.eligible)

    def _best_of(self, names: list[str]) -> str:
        most = max(len(self.utilities[name].score) for name in names)
        as_many = [name for name in names if self._has_almost(name, most)]
        return max(as_many, key=lambda name: self.mean(name, self.reference or name))

    def _has_almost(self, name: str, blocks: int) -> bool:
        """Whether a candidate has so many blocks, or one less: nothing hangs on where a run was cut in a block."""
        return len(self.utilities[name].score) >= blocks - 1

    @cached_property
    def contenders(self) -> list[str]:
        """Eligible candidates that their own figures do not show to be worse than the leader."""
        return [
            name
            for name in self.eligible
            if name == self.leader or not _is_below(stats.compare(self.log_ratios(name, self.leader)), 0.0)
        ]

    def log_ratios(self, over: str, under: str, kind: Kind = "score", *, fresh: bool = False) -> list[float]:
        """Log of over ÷ under in each block that both have, or in the fresh ones among them."""
        numerator = getattr(self.utilities[over], kind)
        denominator = getattr(self.utilities[under], kind)
        common = sorted(numerator.keys() & denominator.keys())
        return [
            numerator[number] - denominator[number]
            for number in common
            if not fresh or number in self.run.after_the_choice
        ]

    def mean(self, over: str, under: str) -> float:
        """Best estimate of a log score ratio; of two that never met, through what they are compared with."""
        logs = self.log_ratios(over, under)
        if logs or self.reference in (None, over, under):
            return fmean(logs) if logs else 0.0
        return self.mean(over, self.reference) - self.mean(under, self.reference)

    def compare(self, over: str, under: str, kind: Kind = "score") -> Comparison:
        """One candidate against another, in the blocks that both have; itself it equals exactly."""
        if over == under:
            return Comparison(0.0, 0.0, math.inf, len(self.utilities[over].score))
        logs = self.log_ratios(over, under, kind)
        return stats.compare(logs, self._lent(over, under, kind, logs))

    def claimed(self, over: str, under: str, kind: Kind = "score") -> Comparison:
        """The same for what is claimed: by the fresh blocks alone, where there are some.

        What looked best in the blocks that chose it was lucky in part, and so looks better than it is.
        """
        fresh = self.log_ratios(over, under, kind, fresh=True)
        if over == under or len(fresh) < LEAST_FRESH:
            return self.compare(over, under, kind)
        return stats.compare(fresh, self._lent(over, under, kind, fresh))

    def _lent(self, over: str, under: str, kind: Kind, own: list[float]) -> Spread | None:
        """What other pairs tell of the spread of this one: those in the same launch, or in different ones."""
        together = self._share_launches(over, under)
        known = self._spreads(kind)
        alike = known[together]
        if alike is None:
            return known[not together]
        return stats.without(alike, own) if {over, under} <= self._steady else alike

    @cached_property
    def _steady(self) -> set[str]:
        """Whose pairs tell of the spread: those that can still win, and what runs today."""
        return {*self.contenders, *({self.run.incumbent} & self.utilities.keys())}

    def _spreads(self, kind: Kind) -> dict[bool, Spread | None]:
        if kind not in self._pooled:
            names = sorted(self._steady)
            pairs = [(self._share_launches(*pair), self.log_ratios(*pair, kind)) for pair in combinations(names, 2)]
            self._pooled[kind] = {
                together: stats.pooled([logs for shared, logs in pairs if shared == together])
                for together in (True, False)
            }
        return self._pooled[kind]

    @cached_property
    def _pooled(self) -> dict[Kind, dict[bool, Spread | None]]:
        return {}

    def _share_launches(self, over: str, under: str) -> bool:
        """Whether two were in one launch in at least half of their blocks; where a run is resumed, it may be cut."""
        one, other = self.utilities[over].launch, self.utilities[under].launch
        common = one.keys() & other.keys()
        return 2 * sum(one[number] == other[number] for number in common) >= len(common)

    @cached_property
    def noise_floor(self) -> float | None:
        """Relative spread between launches of one candidate, larger where it is known from few of them.

        None = not known, from fewer than two.
        """
        spreads = self._spreads("score")
        known = spreads[False] or spreads[True]
        if known is not None:
            return math.sqrt(known.variance / 2) * stats.allowance_for_few(known.df)
        launches = self.incumbent_in_order
        return stats.launch_spread(launches) * stats.allowance_for_few(len(launches) - 1) if len(launches) > 1 else None

    @property
    def incumbent_in_order(self) -> list[float]:
        """Log score of what runs today in all its launches, in order, without memory."""
        today = self.run.incumbent
        return scoring.speeds_in_order(self.run, today) if today in self.run.live else []

    @property
    def epsilon(self) -> float:
        """Relative difference below which nothing is claimed."""
        return max(MIN_DIFFERENCE, 2 * (self.noise_floor or 0.0))

    def shown_worse(self, candidate: str, than: str) -> bool:
        """Whether a candidate is worse for sure, and by more than ε perhaps."""
        found = self.compare(candidate, than)
        low = found.low()
        return _is_below(found, 0.0) and low is not None and low < -math.log1p(self.epsilon)

    def shown_better(self, candidate: str, than: str) -> bool:
        """Whether the best of several candidates is better for sure, and by more than ε at its best estimate.

        It was picked as the best of those that can win, so the test is corrected for their number (Bonferroni). It has
        to be better in what is claimed, too, at which a run-off looks again and again: corrected for that as well.
        """
        rivals = max(1, len([name for name in self.contenders if name != than]))
        found, claim = self.compare(candidate, than), self.claimed(candidate, than)
        least = found.low(1 - ALPHA / 2 / rivals), claim.low(1 - ALPHA / 2 / LOOKS)
        return all(low is not None and low > 0 for low in least) and claim.mean >= math.log1p(self.epsilon)

    def near(self, candidate: str) -> list[str]:
        """Candidates to choose from as good as this one by the best estimate, and not only for a wide interval.

        Within one standard error of it (Breiman et al., "Classification and Regression Trees", 1984), or within half
        of what may ever be claimed.
        """
        return [name for name in self.preferred if name == candidate or self._is_near(name, candidate)]

    def _is_near(self, name: str, candidate: str) -> bool:
        if not self._has_almost(name, len(self.utilities[candidate].score)):
            return False  # dropped before, and less is known of it
        behind = self.compare(candidate, name)
        return behind.mean <= max(MIN_DIFFERENCE / 2, behind.error or 0.0) and not self.shown_worse(name, candidate)


def _is_below(found: Comparison, limit: float) -> bool:
    high = found.high()
    return high is not None and high < limit


def _comparable(utilities: dict[str, Utility], today: str) -> dict[str, Utility]:
    """Those that share a block with what runs today, where that has any, or else with the one that has most."""
    if not utilities:
        return {}
    anchor = today if today in utilities else max(utilities, key=lambda name: len(utilities[name].score))
    blocks = utilities[anchor].score.keys()
    return {name: one for name, one in utilities.items() if one.score.keys() & blocks}


def _cut(utilities: dict[str, Utility], until: int) -> dict[str, Utility]:
    """Without the blocks after one, and without those who have none up to it."""
    cut = {name: one.up_to(until) for name, one in utilities.items()}
    return {name: one for name, one in cut.items() if one.score}
