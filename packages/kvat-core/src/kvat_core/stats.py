"""Pure statistics over launches. The launch is the unit of replication: tokens of one call are not independent.

Everything is computed on logarithms, so that intervals belong to ratios and never cross zero (Kalibera & Jones,
"Quantifying performance changes with effect size confidence intervals").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from scipy.special import stdtr, stdtrit

from kvat_core.schema import Estimate, Ratio

LEVEL = 0.95
"""Two-sided confidence of every interval that kvat prints."""
MOST_BORROWED = 10.0
"""Degrees of freedom that a comparison borrows from others at most: a candidate may be noisier than they are."""
DRAWS = 10_000
"""Of which a probability over several candidates is made."""


@dataclass(frozen=True)
class Spread:
    """Variance of one paired log ratio, estimated from several pairs, and what it is worth."""

    variance: float
    df: float


@dataclass(frozen=True)
class Comparison:
    """How far one candidate is ahead of another: mean of paired log ratios, and how well it is known."""

    mean: float
    error: float | None
    """Standard error of the mean; None where nothing is known of the spread."""
    df: float
    n: int
    """Paired blocks."""

    def low(self, level: float = 0.5 + LEVEL / 2) -> float | None:
        """Lower bound of the difference at a one-sided level."""
        return None if self.error is None else self.mean - float(stdtrit(self.df, level)) * self.error

    def high(self, level: float = 0.5 + LEVEL / 2) -> float | None:
        """Upper bound of the difference at a one-sided level."""
        return None if self.error is None else self.mean + float(stdtrit(self.df, level)) * self.error

    def probability_above(self, threshold: float) -> float:
        """Probability that the true difference is above a threshold; without a spread the mean decides, or nothing."""
        if self.error is None:
            return 0.5
        if self.error == 0:
            return 1.0 if self.mean >= threshold else 0.0
        return float(stdtr(self.df, (self.mean - threshold) / self.error))

    def ratio(self) -> Ratio:
        """The difference as a ratio with its interval."""
        low, high = self.low(), self.high()
        return Ratio(
            value=math.exp(self.mean),
            low=None if low is None else math.exp(low),
            high=None if high is None else math.exp(high),
            n=self.n,
        )


def compare(log_ratios: Sequence[float], borrowed: Spread | None = None) -> Comparison:
    """Mean of paired log ratios, with a standard error that moderates their own spread by that of other pairs.

    A few blocks tell little of their spread. Taken together with what others show, as so many more degrees of freedom,
    they tell more (Smyth, "Linear models and empirical Bayes methods", 2004, equation for the moderated t). Without any
    block nothing is known.
    """
    n = len(log_ratios)
    if n == 0:
        return Comparison(0.0, None, 0.0, 0)
    own = _variance(log_ratios) if n > 1 else 0.0
    lent, taken = (min(borrowed.df, MOST_BORROWED), borrowed.variance) if borrowed else (0.0, 0.0)
    df = n - 1 + lent
    if df == 0:
        return Comparison(fmean(log_ratios), None, 0.0, n)
    return Comparison(fmean(log_ratios), math.sqrt(((n - 1) * own + lent * taken) / df / n), df, n)


def pooled(pairs: Sequence[Sequence[float]]) -> Spread | None:
    """Spread of paired log ratios over pairs of candidates; None where no pair has two blocks.

    Pairs share candidates and are not independent. Of k candidates in b blocks all pairs have the mean variance of
    a randomised block design's residuals, twice, which has (k - 1)(b - 1) degrees of freedom.
    """
    usable = [pair for pair in pairs if len(pair) > 1]
    if not usable:
        return None
    candidates = (1 + math.sqrt(1 + 8 * len(usable))) / 2
    blocks = fmean(len(pair) for pair in usable)
    return Spread(fmean(_variance(pair) for pair in usable), (candidates - 1) * (blocks - 1))


def without(spread: Spread, pair: Sequence[float]) -> Spread | None:
    """What a pooled spread tells besides one of its pairs, whose blocks count as its own; None = nothing."""
    own_df = len(pair) - 1
    if own_df < 1:
        return spread
    df = spread.df - own_df
    if df <= 0:
        return None
    return Spread(max(0.0, (spread.df * spread.variance - own_df * _variance(pair)) / df), df)


def allowance_for_few(df: float) -> float:
    """By how much a standard deviation is to be enlarged that is known from few degrees of freedom only.

    So that twice of it is exceeded by chance as rarely as twice of one that is known: t(df) ÷ t(∞), both two-sided at
    the level of all intervals.
    """
    return float(stdtrit(df, 0.5 + LEVEL / 2) / stdtrit(math.inf, 0.5 + LEVEL / 2))


def launch_spread(logs_in_order: Sequence[float]) -> float:
    """Standard deviation of equal launches from those of one candidate alone, whatever drift there is between them.

    By differences of neighbours, in which a slow drift cancels out (von Neumann's mean square successive difference).
    """
    steps = [after - before for before, after in itertools.pairwise(logs_in_order)]
    return math.sqrt(fmean(step * step for step in steps) / 2) if steps else 0.0


def probability_of_none_above(rivals: Sequence[Comparison], threshold: float, seed: str) -> float:
    """Probability that no rival is ahead by more than a threshold, all taken together.

    Draws of a multivariate t. The rivals are compared with the same candidate, whose own noise is half of each
    difference: so their differences are correlated by a half.
    """
    sure = [rival for rival in rivals if not rival.error]
    if any(rival.probability_above(threshold) > 0.5 for rival in sure):
        return 0.0
    open_ = [rival for rival in rivals if rival.error and rival.probability_above(threshold) > 1e-6]
    known = math.prod(1 - rival.probability_above(threshold) for rival in sure if rival.error is None)
    if not open_:
        return known
    source = np.random.default_rng([ord(one) for one in seed])
    df = min(rival.df for rival in open_)
    scale = np.sqrt(df / source.chisquare(df, DRAWS))
    common = source.standard_normal(DRAWS)
    none_above = np.ones(DRAWS, dtype=bool)
    for rival in open_:
        noise = math.sqrt(0.5) * (common + source.standard_normal(DRAWS)) * scale
        none_above &= rival.mean + (rival.error or 0.0) * noise <= threshold
    return known * float(none_above.mean())


def t_half_width(values: Sequence[float]) -> float | None:
    """Half width of the t interval of the mean; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * math.sqrt(_variance(values) / n)


def estimate(launch_values: Sequence[float]) -> Estimate:
    """Median of positive launch values with the t interval of their logarithms.

    With one launch nothing is known of the spread, and the interval is the point itself; `n` says so.
    """
    logs = [math.log(value) for value in launch_values]
    centre, half = fmean(logs), t_half_width(logs) or 0.0
    middle = median(launch_values)
    return Estimate(
        median=middle,
        low=min(middle, math.exp(centre - half)),
        high=max(middle, math.exp(centre + half)),
        n=len(logs),
    )


def _variance(values: Sequence[float]) -> float:
    """Of a sample of at least two. In floats: exact fractions take most of a decision's time, and tell nothing more."""
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
