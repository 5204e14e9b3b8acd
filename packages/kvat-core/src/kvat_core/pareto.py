"""Pure: which candidates are best for somebody, whatever he weighs how: those that no other one is shown to beat.

A candidate is dominated only where another one is ahead in every objective, and in one by more than a
difference that matters. Speeds are known with noise, so "ahead" is what paired blocks show at a level
that all comparisons share (Bonferroni). Where they show nothing, both stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvat_core import stats

ALPHA = 0.05
"""Probability that chance removes anybody from the front, over all comparisons."""
TTFT_STEP = 0.03
DECODE_STEP = 0.01
CONTEXT_STEP = 0.01
"""Relative differences that matter."""
MEMORY_STEP_BYTES = 64 * 2**20
"""Peaks that are closer than this are taken for equal: each was read once, in one process."""


@dataclass(frozen=True)
class Objectives:
    """What a candidate achieves. The speeds are logarithms, by block, and more is faster."""

    ttft: Mapping[int, float]
    decode: Mapping[int, float]
    peak_bytes: int | None = None
    """Of the memory that is compared; None = unknown."""
    context_tokens: int | None = None
    """Longest context; None = unknown."""


def pareto_front(measured: Mapping[str, Objectives]) -> tuple[str, ...]:
    """Names of those that nobody dominates, in the order given.

    Two are compared in what is known of both.
    """
    level = ALPHA / max(1, len(measured)) ** 2
    return tuple(
        name
        for name, own in measured.items()
        if not any(dominates(other, own, level) for rival, other in measured.items() if rival != name)
    )


def dominates(over: Objectives, under: Objectives, level: float) -> bool:
    """Whether one is shown to be ahead of another in everything, and by what matters in something.

    Args:
        over: the one.
        under: the other.
        level: probability with which this may be said of two that are equal.
    """
    speeds = [
        (_log_ratios(over.ttft, under.ttft), math.log1p(TTFT_STEP)),
        (_log_ratios(over.decode, under.decode), math.log1p(DECODE_STEP)),
    ]
    if not all(ratios for ratios, _ in speeds):
        return False
    sizes = list(_leads_in_size(over, under))
    # Most pairs are settled by the best estimate, which costs next to nothing.
    if any(lead < 0 for lead in sizes) or any(sum(ratios) < 0 for ratios, _ in speeds):
        return False
    sure = 1 - level / (len(speeds) + len(sizes))
    if any(stats.compare(ratios).probability_above(0.0) < sure for ratios, _ in speeds):
        return False
    return any(lead > 1 for lead in sizes) or any(
        stats.compare(ratios).probability_above(step) >= sure for ratios, step in speeds
    )


def _log_ratios(over: Mapping[int, float], under: Mapping[int, float]) -> list[float]:
    return [over[block] - under[block] for block in sorted(over.keys() & under.keys())]


def _leads_in_size(over: Objectives, under: Objectives) -> Iterator[float]:
    """By how many steps one candidate is ahead in what is known of both, and known exactly."""
    if over.peak_bytes is not None and under.peak_bytes is not None:
        yield (under.peak_bytes - over.peak_bytes) / MEMORY_STEP_BYTES
    if over.context_tokens is not None and under.context_tokens is not None:
        yield (over.context_tokens - under.context_tokens) / (CONTEXT_STEP * under.context_tokens)
