"""Pure: which candidates are best for somebody, whatever he weighs how: those that no other one is shown to beat.

A candidate is dominated only where another one is ahead in every objective, and in one by more than a
difference that matters. Speeds are known with noise, so "ahead" is what paired blocks show at a level
that all comparisons share (Bonferroni). Where they show nothing, both stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


@dataclass(frozen=True)
class _Lead:
    """How surely one candidate is ahead of another in one objective, as probabilities."""

    ahead: float
    """… or equal."""
    by_a_step: float


def pareto_front(measured: Mapping[str, Objectives]) -> tuple[str, ...]:
    """Names of those that nobody dominates, in the order given.

    Two are compared in what is known of both.
    """
    level = ALPHA / max(1, len(measured)) ** 2
    return tuple(
        name
        for name, own in measured.items()
        if not any(_dominates(other, own, level) for rival, other in measured.items() if rival != name)
    )


def _dominates(over: Objectives, under: Objectives, level: float) -> bool:
    leads = _leads(over, under)
    sure = 1 - level / len(leads)
    return all(lead.ahead >= sure for lead in leads) and any(lead.by_a_step >= sure for lead in leads)


def _leads(over: Objectives, under: Objectives) -> list[_Lead]:
    leads = [_faster(over.ttft, under.ttft, TTFT_STEP), _faster(over.decode, under.decode, DECODE_STEP)]
    if over.peak_bytes is not None and under.peak_bytes is not None:
        saved_bytes = under.peak_bytes - over.peak_bytes
        leads.append(_Lead(float(saved_bytes >= 0), float(saved_bytes > MEMORY_STEP_BYTES)))
    if over.context_tokens is not None and under.context_tokens is not None:
        longer = over.context_tokens / under.context_tokens
        leads.append(_Lead(float(longer >= 1), float(longer > 1 + CONTEXT_STEP)))
    return leads


def _faster(over: Mapping[int, float], under: Mapping[int, float], step: float) -> _Lead:
    log_ratios = [over[block] - under[block] for block in sorted(over.keys() & under.keys())]
    return _Lead(
        ahead=stats.probability_above(log_ratios, 0.0),
        by_a_step=stats.probability_above(log_ratios, math.log1p(step)),
    )
