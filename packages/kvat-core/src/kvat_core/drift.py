"""Pure: how much the machine itself changed during a run, as what runs today shows it again and again."""

from __future__ import annotations

import math

from kvat_core import scoring
from kvat_core.run import Run
from kvat_core.schema import Drift

LEAST_LAUNCHES = 5
"""Of what runs today, from which a trend is told."""


def drift(run: Run) -> Drift | None:
    """Trend of the score of what runs today over all its launches; None where there are too few.

    Theil-Sen: the median slope between any two launches, with its interval, which a few bad launches do not move
    (Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968).
    """
    today = run.incumbent
    if today not in run.live:
        return None
    launches = scoring.speeds_in_order(run, today)
    if len(launches) < LEAST_LAUNCHES:
        return None
    from scipy.stats import theilslopes  # takes half a second to import, and only a plan asks

    found = theilslopes(launches, alpha=0.95)
    steps = len(launches) - 1
    return Drift(
        value=math.exp(found.slope * steps),
        low=math.exp(found.low_slope * steps),
        high=math.exp(found.high_slope * steps),
        launches=len(launches),
    )
