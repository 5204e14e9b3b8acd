"""Pure statistics over launches. The launch is the unit of replication: tokens of one call are not independent.

Intervals are Student's t on logarithms, so that they belong to ratios and never cross zero
(Kalibera & Jones, "Quantifying performance changes with effect size confidence intervals").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from scipy.special import stdtr, stdtrit

from kvat_core.schema import Estimate, Ratio

LEVEL = 0.95
"""Two-sided confidence of every interval that kvat prints."""


def t_half_width(values: Sequence[float]) -> float | None:
    """Half width of the t interval of the mean; None with fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * stdev(values) / math.sqrt(n)


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


def ratio(log_ratios: Sequence[float]) -> Ratio:
    """Geometric mean of paired ratios, given as logarithms per block, with its t interval."""
    centre, half = fmean(log_ratios), t_half_width(log_ratios)
    return Ratio(
        value=math.exp(centre),
        low=None if half is None else math.exp(centre - half),
        high=None if half is None else math.exp(centre + half),
        n=len(log_ratios),
    )


def probability_above(log_ratios: Sequence[float], threshold: float) -> float:
    """Probability that the true log ratio is above a threshold, by the t distribution of the mean.

    One block decides nothing (0.5); without any spread the mean decides.
    """
    if len(log_ratios) < 2:
        return 0.5
    distance = fmean(log_ratios) - threshold
    error = stdev(log_ratios) / math.sqrt(len(log_ratios))
    if error == 0:
        return 1.0 if distance >= 0 else 0.0
    return float(stdtr(len(log_ratios) - 1, distance / error))


def noise_floor(log_values: Sequence[Sequence[float]]) -> float:
    """Relative spread between launches of one candidate, block effects removed.

    Args:
        log_values: one row per candidate, one column per block, complete.

    Returns:
        Standard deviation of what is left when candidate and block means are taken out
        (randomised complete block design, (k-1)(b-1) degrees of freedom); with a single
        candidate, the spread of its launches; 0 with a single block.
    """
    rows, blocks = len(log_values), len(log_values[0]) if log_values else 0
    if blocks < 2:
        return 0.0
    if rows == 1:
        return stdev(log_values[0])
    row_means = [fmean(row) for row in log_values]
    block_means = [fmean(row[block] for row in log_values) for block in range(blocks)]
    grand = fmean(row_means)
    squares = sum(
        (log_values[row][block] - row_means[row] - block_means[block] + grand) ** 2
        for row in range(rows)
        for block in range(blocks)
    )
    return math.sqrt(squares / ((rows - 1) * (blocks - 1)))
