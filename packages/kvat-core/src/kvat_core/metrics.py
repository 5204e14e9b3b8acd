"""The metrics of a timed call, defined once; every output uses these definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from kvat_core.schema import Sample, Scenario, Timeline


class Figures(NamedTuple):
    """All that scores are made of: of one sample, or the medians of several."""

    ttft_s: float
    decode_tps: float
    jitter: float | None


def figures(sample: Sample) -> Figures:
    """The three metrics at once."""
    return Figures(ttft_s(sample), decode_tps(sample), jitter(sample))


def medians(several: Sequence[Figures]) -> Figures:
    """Median of each metric; no jitter where it is unknown for any."""
    jitters = [one.jitter for one in several if one.jitter is not None]
    return Figures(
        median(one.ttft_s for one in several),
        median(one.decode_tps for one in several),
        median(jitters) if len(jitters) == len(several) else None,
    )


def ttft_s(sample: Sample) -> float:
    """Request start to first token on the host, seconds; of a batch, the slowest request."""
    return max(request.ttft_s for request in sample.requests)


def tpot_s(sample: Sample) -> float:
    """(end - first token) / (n - 1), seconds per output token; of a batch, the mean over requests."""
    values = [
        request.count * (request.e2e_s - request.ttft_s) / (request.output_tokens - 1) for request in sample.requests
    ]
    return sum(values) / batch_size(sample)


def decode_tps(sample: Sample) -> float:
    """batch · (n - 1) / (t_last - t_first), tokens per second, the first token apart."""
    tokens = sum(request.count * (request.output_tokens - 1) for request in sample.requests)
    first = min(request.ttft_s for request in sample.requests)
    last = max(request.e2e_s for request in sample.requests)
    return tokens / (last - first)


def e2e_s(sample: Sample) -> float:
    """Request start to last token, seconds; of a batch, the slowest request."""
    return max(request.e2e_s for request in sample.requests)


def jitter(sample: Sample) -> float | None:
    """p95 / p50 of the token gaps; None where the engine gives totals only, or delivers most tokens in bursts."""
    # As often as there are requests with them, as far as that makes a difference.
    unit = math.gcd(*(request.count for request in sample.requests))
    gaps = [gap for request in sample.requests for gap in (request.token_gaps_s or ()) * (request.count // unit)]
    if not gaps:
        return None
    gaps.sort()
    p95 = gaps[min(len(gaps) - 1, math.ceil(0.95 * len(gaps)) - 1)]
    return p95 / median(gaps) if median(gaps) > 0 else None


def energy_per_token_j(sample: Sample) -> float | None:
    """Energy of the whole card during a call ÷ output tokens, joules; None where nobody tells."""
    card = sample.conditions.gpu if sample.conditions else None
    if card is None or card.energy_j is None:
        return None
    return card.energy_j / sum(request.count * request.output_tokens for request in sample.requests)


def batch_size(timeline: Timeline) -> int:
    """Requests of a call."""
    return sum(request.count for request in timeline.requests)


def invalid_reason(timeline: Timeline, scenario: Scenario) -> str | None:
    """Why a timeline must not become a number, or None.

    Checks what an adapter reports against the scenario: request and token counts, one gap
    fewer than tokens, and times that are finite, positive and in order.
    """
    if batch_size(timeline) != scenario.batch_size:
        return f"{batch_size(timeline)} requests instead of {scenario.batch_size}"
    prompts = sorted(request.prompt_tokens for request in timeline.requests for _ in range(request.count))
    for found, wanted in zip(prompts, sorted(scenario.prompt_lengths), strict=True):
        if found != wanted:
            return f"{found} prompt tokens instead of {wanted}"
    for request in timeline.requests:
        if request.output_tokens != scenario.output_tokens:
            return f"{request.output_tokens} output tokens instead of {scenario.output_tokens}"
        gaps = request.token_gaps_s
        if gaps is not None and len(gaps) != request.output_tokens - 1:
            return f"{len(gaps)} token gaps for {request.output_tokens} tokens"
        times = (request.ttft_s, request.e2e_s, timeline.duration_s, *(gaps or ()))
        if not all(math.isfinite(time) and time >= 0 for time in times):
            return "times that are negative or not finite"
        if not 0 < request.ttft_s < request.e2e_s:
            return "a last token that is not after the first"
    return None
