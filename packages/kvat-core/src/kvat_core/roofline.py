"""Pure: bytes and operations of a model, what they bound on a machine, and how close a measurement comes.

Symbols: S prompt tokens and n output tokens per request, B requests, L layers, H query and G KV heads of d numbers,
W window of a sliding layer, P parameters. Sources: the arithmetic of a decoder-only transformer, as in Kaplan et al.
2020 (2·P operations per token, arXiv 2001.08361), and the roofline of Williams et al. 2009 (no faster than the memory
delivers, nor than the units multiply).

All byte counts are of what *must* be moved or held, except that of experts those are counted which a batch is expected
to choose; bounds count as many as a single request needs. So a use above 1 says that the model of bytes is wrong, or
that the ceiling is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvat_core.schema import CandidateEntry, Ceilings, Footprint, ModelShape, Scenario

MAX_USE = 1.05
"""Share of a ceiling above which not the machine is good, but the model of bytes wrong; leaves room for noise."""
MEMORY_MARGIN = 1.10
"""A candidate is too large when it needs more than this times all memory that there is."""
_CACHES = 4
"""What a step reads has to be this many times the last-level cache, or memory is not what it reads from."""


class Work(NamedTuple):
    """What one call has to do."""

    prefill_flops: float
    prefill_read_bytes: float
    step_flops: float
    """Of one decode step for all requests, the mean over the call."""
    step_read_bytes: float
    """Of one decode step for all requests, the mean over the call."""
    step_least_bytes: float
    """The same if all requests choose the same experts."""


class Bounds(NamedTuple):
    """What no measurement can beat."""

    ttft_s: float
    decode_tps: float
    """Tokens of all requests together."""


class _Cache(NamedTuple):
    """What of a shape decides how much a cache holds."""

    windows: tuple[int | None, ...]
    """Per layer: positions that it keeps at most, None for all."""
    numbers: int
    """Keys and values of one position in one layer: 2·G·d."""


# Memory


def kv_cache_bytes(shape: ModelShape, footprint: Footprint, scenario: Scenario, positions: int) -> int | None:
    """Bytes of the KV cache when each request has so many positions in it, or has reserved more.

    Llama 3.1 8B holds 2·32·8·128 numbers per token, 131072 bytes in bfloat16.
    """
    cache = _cache(shape)
    if cache is None:
        return None
    reserved = footprint.reserved_tokens
    slots = positions if reserved is None else reserved
    held = sum(_held(slots, window) for window in cache.windows)
    return round(held * cache.numbers * footprint.kv_element_bytes) * scenario.batch_size


def least_bytes(shape: ModelShape, footprint: Footprint, scenario: Scenario) -> int | None:
    """Memory below which the call cannot end: weights, the full KV cache, and what else is known to be alive beside."""
    rise = kv_cache_bytes(shape, footprint, scenario, _last_position(scenario))
    if rise is None or shape.parameters is None:
        return None
    return shape.parameters * footprint.element_bytes + rise + (footprint.step_bytes or 0)


def peak_bytes(shape: ModelShape, footprint: Footprint, scenario: Scenario, first_call_bytes: int) -> int | None:
    """Memory at the peak of the calls, above that after loading; None = no prediction.

    The wider of two moments: prefill, when the prompt's cache is full, and the last step, when all of it is.

    Args:
        first_call_bytes: what the first call of a process takes whatever the model, `Ceilings.first_call_bytes`.
    """
    at_prefill = kv_cache_bytes(shape, footprint, scenario, scenario.prompt_tokens)
    at_end = kv_cache_bytes(shape, footprint, scenario, _last_position(scenario))
    if at_prefill is None or at_end is None or footprint.prefill_bytes is None or footprint.step_bytes is None:
        return None
    return first_call_bytes + max(at_prefill + footprint.prefill_bytes, at_end + footprint.step_bytes)


def cannot_fit(shape: ModelShape, footprint: Footprint, scenario: Scenario, memory_bytes: int) -> str | None:
    """Why the call would need more than all the memory there is, or None; leaves what a prediction may err by."""
    needed = least_bytes(shape, footprint, scenario)
    if needed is None or needed <= memory_bytes * MEMORY_MARGIN:
        return None
    return (
        f"{scenario.key} needs at least {needed / 2**30:.1f} GiB for weights and KV cache, "
        f"and there are {memory_bytes / 2**30:.1f} GiB"
    )


# Time


def work(shape: ModelShape, footprint: Footprint, scenario: Scenario) -> Work | None:
    """Bytes and operations of a call; None where the shape does not tell."""
    cache = _cache(shape)
    per_token, head = _active_parameters(shape), _head_parameters(shape)
    read = _parameters_read(shape, scenario.batch_size)
    if cache is None or shape.attention_heads is None or shape.head_dim is None:
        return None
    if per_token is None or head is None or read is None:
        return None
    prompt, steps, batch = scenario.prompt_tokens, scenario.output_tokens - 1, scenario.batch_size
    prefill_pairs = sum(_pairs(prompt, window) for window in cache.windows)
    step_pairs = sum(_pairs(prompt + steps, window) for window in cache.windows) - prefill_pairs
    # A query meets a key twice, for the score and for the value, each time with d multiplications and d additions.
    pair_flops = 4 * shape.attention_heads * shape.head_dim
    step_cache_bytes = batch * cache.numbers * footprint.kv_element_bytes * step_pairs / steps
    # The logits of a prompt are those of its last token alone.
    prefill = 2 * (per_token - head) * prompt + 2 * head + pair_flops * prefill_pairs
    return Work(
        prefill_flops=batch * prefill,
        prefill_read_bytes=per_token * footprint.element_bytes,
        step_flops=batch * (2 * per_token + pair_flops * step_pairs / steps),
        step_read_bytes=read * footprint.element_bytes + step_cache_bytes,
        step_least_bytes=per_token * footprint.element_bytes + step_cache_bytes,
    )


def bounds(work: Work, footprint: Footprint, ceilings: Ceilings, batch_size: int) -> Bounds | None:
    """The roofline; None where the dtype has no ceiling."""
    gemm = ceilings.gemm_flop_per_s.get(footprint.dtype)
    if gemm is None:
        return None
    read = ceilings.read_bytes_per_s.best
    step_s = max(work.step_least_bytes / read, work.step_flops / gemm.best)
    return Bounds(
        ttft_s=max(work.prefill_flops / gemm.best, work.prefill_read_bytes / read), decode_tps=batch_size / step_s
    )


def holds(work: Work, footprint: Footprint, ceilings: Ceilings) -> bool:
    """Whether the bounds bound: ceilings are those of its threads, and its bytes more than what caches serve."""
    return footprint.threads == ceilings.threads and work.step_read_bytes >= _CACHES * (ceilings.cache_bytes or 0)


def bandwidth_use(
    work: Work, footprint: Footprint, ceilings: Ceilings, batch_size: int, decode_tps: float
) -> float | None:
    """Share of the memory's bandwidth that decoding used: bytes that it must read, per second, ÷ the best seen.

    None where the ceiling is not that of these threads, or where the bytes are so few that caches serve them.
    """
    if not holds(work, footprint, ceilings):
        return None
    return work.step_read_bytes * decode_tps / batch_size / ceilings.read_bytes_per_s.best


def flop_use(work: Work, footprint: Footprint, ceilings: Ceilings, ttft_s: float) -> float | None:
    """Share of the arithmetic rate that prefill used: operations ÷ (time to first token · rate of a large GEMM)."""
    gemm = ceilings.gemm_flop_per_s.get(footprint.dtype)
    if gemm is None or footprint.threads != ceilings.threads:
        return None
    return work.prefill_flops / (ttft_s * gemm.best)


def order(
    entries: Sequence[CandidateEntry], shape: ModelShape, scenarios: Sequence[Scenario], ceilings: Ceilings | None
) -> tuple[CandidateEntry, ...]:
    """Entries in the order in which to try them: the incumbent, then what could be fastest, and last the unknown.

    Candidates with equal bounds keep their order. Nothing is claimed of what they will really do.
    """

    def key(entry: CandidateEntry) -> tuple[bool, float]:
        least_s = [_least_s(entry, shape, scenario, ceilings) for scenario in scenarios]
        return not entry.incumbent, sum(least_s)

    return tuple(sorted(entries, key=key))


def _least_s(entry: CandidateEntry, shape: ModelShape, scenario: Scenario, ceilings: Ceilings | None) -> float:
    """Weighted time that a call takes at least; infinite where no bound is known."""
    footprint = entry.footprints.get(scenario.key)
    doing = None if footprint is None else work(shape, footprint, scenario)
    if ceilings is None or footprint is None or doing is None:
        return math.inf
    least = bounds(doing, footprint, ceilings, scenario.batch_size)
    if least is None:
        return math.inf
    steps_s = (scenario.output_tokens - 1) * scenario.batch_size / least.decode_tps
    return scenario.weight * (least.ttft_s + steps_s)


# Arithmetic


def _cache(shape: ModelShape) -> _Cache | None:
    if "other" in shape.attention or shape.kv_heads is None or shape.head_dim is None:
        return None
    if "sliding" in shape.attention and shape.sliding_window is None:
        return None
    windows = tuple(shape.sliding_window if kind == "sliding" else None for kind in shape.attention)
    return _Cache(windows, 2 * shape.kv_heads * shape.head_dim)


def _held(positions: int, window: int | None) -> int:
    return positions if window is None else min(positions, window)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it may see, itself among them, when tokens come one after the other."""
    seen = _held(tokens, window)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def _last_position(scenario: Scenario) -> int:
    """The last token is never stored."""
    return scenario.total_tokens - 1


def _active_parameters(shape: ModelShape) -> int | None:
    """Parameters that work on each token."""
    if shape.step_parameters is None or shape.experts is None:
        return shape.step_parameters
    if shape.experts_per_token is None or shape.expert_parameters is None:
        return None
    return shape.step_parameters + shape.experts_per_token * shape.expert_parameters


def _head_parameters(shape: ModelShape) -> int | None:
    if shape.vocab_size is None or shape.hidden_size is None:
        return None
    return shape.vocab_size * shape.hidden_size


def _parameters_read(shape: ModelShape, batch_size: int) -> float | None:
    """Parameters that one decode step reads: of E experts with k per token, E·(1-(1-k/E)^B) distinct ones expected."""
    if shape.step_parameters is None or shape.experts is None:
        return shape.step_parameters
    if shape.experts_per_token is None or shape.expert_parameters is None:
        return None
    missed = (1 - shape.experts_per_token / shape.experts) ** batch_size
    return shape.step_parameters + shape.experts * (1 - missed) * shape.expert_parameters
