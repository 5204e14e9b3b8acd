"""Numbers as text: SI units, and as many digits as the interval supports. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvat_core.schema import Estimate, Ratio

NOTHING = "–"
"""Shown where there is no number."""

_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZE_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def time(estimate: Estimate) -> str:
    """Seconds with their interval, e.g. ``12.3 ms [12.1, 12.6]``."""
    return _time(estimate.median, estimate.low, estimate.high)


def seconds(value: float) -> str:
    """A measured time without an interval, e.g. ``12.3 ms``."""
    return _time(value, None, None)


def rate(estimate: Estimate) -> str:
    """Tokens per second with their interval, e.g. ``41.2 tok/s [40.9, 41.5]``."""
    return _with_interval(estimate.median, estimate.low, estimate.high, " tok/s")


def tokens_per_second(value: float) -> str:
    """A measured rate without an interval, e.g. ``41.2 tok/s``."""
    return _with_interval(value, None, None, " tok/s")


def ratio(value: Ratio | None) -> str:
    """A ratio with its interval, e.g. ``1.41× [1.37, 1.45]``; two decimals at least, as 1 % may matter."""
    if value is None:
        return NOTHING
    return _with_interval(value.value, value.low, value.high, "×", least_decimals=2)


def size(count: int | None) -> str:
    """Bytes in the largest binary unit that they fill, e.g. ``1.41 GiB``."""
    if count is None:
        return NOTHING
    for scale, unit in _SIZE_UNITS:
        if _rounded(count / scale) >= 1:
            return f"{_fixed(count / scale, _decimals(count / scale))} {unit}"
    return f"{count} B"


def nats(value: float | None) -> str:
    """A divergence, in nats; a dash where it is not known."""
    return NOTHING if value is None else f"{value:.2g}"


def agreement(share: float | None) -> str:
    """A share of equal choices, e.g. ``98.9 %``; rounded down, so that none seems to keep a limit that it misses."""
    return NOTHING if share is None else f"{math.floor(round(share * 1000, 6)) / 10:.1f} %"


def percent(share: float) -> str:
    """A share of one, e.g. ``2.4 %``; whole numbers from 10 % on."""
    value = share * 100
    return f"{value:.0f} %" if abs(value) >= 9.95 or value == 0 else f"{value:.1f} %"


def duration(wall_s: float) -> str:
    """Wall time for a person, e.g. ``4.2 s``, ``1 min 12 s``, ``2 h 03 min``."""
    if wall_s < 9.95:
        return f"{wall_s:.1f} s"
    whole = round(wall_s)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(wall_s / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: float) -> str:
    """A plain number without needless zeros, e.g. a weight: ``2`` or ``0.5``."""
    return f"{value:.3g}"


def _time(value: float, low: float | None, high: float | None) -> str:
    scale, unit = next((pair for pair in _TIME_UNITS if _rounded(value) >= pair[0]), _TIME_UNITS[-1])
    if low is None or high is None:
        return _with_interval(value / scale, None, None, f" {unit}")
    return _with_interval(value / scale, low / scale, high / scale, f" {unit}")


def _with_interval(value: float, low: float | None, high: float | None, unit: str, least_decimals: int = 0) -> str:
    if low is None or high is None or math.isclose(low, high, rel_tol=1e-9):
        return f"{_fixed(value, max(least_decimals, _decimals(value)))}{unit}"
    decimals = max(least_decimals, min(_interval_decimals(high - low), _decimals(value, digits=4)))
    return f"{_fixed(value, decimals)}{unit} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def _interval_decimals(width: float) -> int:
    """Decimals that show an interval of this width with one significant digit, with two where that is 1 to 3."""
    if not math.isfinite(width) or width <= 0:
        return 2
    exponent = math.floor(math.log10(width))
    leading = width / 10**exponent
    return max(0, (1 if leading < 4 else 0) - exponent)


def _decimals(value: float, digits: int = 3) -> int:
    """Decimals that show this many significant digits."""
    if not math.isfinite(value) or value == 0:
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(_rounded(value)))))


def _rounded(value: float) -> float:
    """Rounded to three significant digits, so that 999.96 ms is taken for what it will be shown as: 1 s."""
    return float(f"{value:.3g}")


def _fixed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}"
