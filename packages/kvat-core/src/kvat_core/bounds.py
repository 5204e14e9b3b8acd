"""What each limit of a profile bounds: the quantity, from which side, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from kvat_core import metrics
from kvat_core.schema import LimitName, Resources, Sample


@dataclass(frozen=True)
class Bound:
    """What a limit of the profile bounds, and from which side."""

    name: LimitName
    what: str
    unit: str
    """Of its values: s, B, tok/s or tokens."""
    at_most: bool = True
    """Whether values above the limit violate it; otherwise those below."""

    def keeps(self, value: float, limit: float) -> bool:
        """Whether a value is at the limit or better."""
        return value <= limit if self.at_most else value >= limit

    def miss(self, value: float, limit: float) -> float:
        """Relative distance beyond the limit; negative for what keeps it."""
        return (value - limit if self.at_most else limit - value) / limit

    def condition(self, limit: float, percentile: float | None) -> str:
        """The limit in words, e.g. ``TTFT p95 ≤ 300 ms``."""
        share = f" p{percentile:g}" if percentile is not None else ""
        return f"{self.what}{share} {'≤' if self.at_most else '≥'} {self.shown(limit)}"

    def shown(self, value: float) -> str:
        """A value with its unit, in the one that suits its size."""
        unit = self.unit
        if unit == "B":
            value, unit = value / 2**20, "MiB"
        elif unit == "s" and value < 1:
            value, unit = value * 1000, "ms"
        return f"{value:.4g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


TIMED: tuple[tuple[Bound, Callable[[Sample], float]], ...] = (
    (Bound("max_ttft_s", "TTFT", "s"), metrics.ttft_s),
    (Bound("max_tpot_s", "TPOT", "s"), metrics.tpot_s),
    (Bound("min_decode_tps", "decode rate", "tok/s", at_most=False), metrics.decode_tps),
)
PEAKS: tuple[tuple[Bound, Callable[[Resources], int | None]], ...] = (
    (Bound("max_device_bytes", "device memory", "B"), attrgetter("peak_device_bytes")),
    (Bound("max_host_bytes", "host memory", "B"), attrgetter("peak_host_bytes")),
)
CONTEXT = Bound("min_context_tokens", "context", "tokens", at_most=False)
BY_NAME: dict[LimitName, Bound] = {bound.name: bound for bound in (*(one for one, _ in (*TIMED, *PEAKS)), CONTEXT)}
