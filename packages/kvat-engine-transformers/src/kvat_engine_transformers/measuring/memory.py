"""Bytes: of the process, of the device, and of a cache, as it is and as its shape says."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Cache, PreTrainedConfig

from kvat_engine_transformers.model.description import cache_shape
from kvat_engine_transformers.settings.caches import GROUP_SIZE, RESIDUAL_LENGTH


def start_peaks(device: torch.device) -> None:
    """Forget the peaks so far, where the system can: of the host only on Linux. Elsewhere loading stays part of it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        if hasattr(torch.cuda, "reset_peak_host_memory_stats"):
            torch.cuda.reset_peak_host_memory_stats()


def resident_bytes() -> int:
    """Present resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_host_bytes() -> int:
    """Peak resident size of this process since `start_peaks`; over its lifetime where that can do nothing."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:  # some kernels made for containers leave it out
            return int(lines[0].split()[1]) * 1024
    # Kilobytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pinned_bytes(device: torch.device) -> int | None:
    """Peak of host memory that torch has locked for a CUDA device; None on other devices, or where it is not told."""
    if device.type != "cuda" or not hasattr(torch.cuda, "host_memory_stats"):
        return None
    peak = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
    return None if peak is None else int(peak)


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that the keys and values of a cache keep allocated now.

    What counts is the storage behind each tensor: allocated but unused slots belong to it, and so does the token by
    which a sliding window's storage is longer than the window that is seen of it.
    """
    fields = ("keys", "values", "_quantized_keys", "_quantized_values")
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for field in fields
        for tensor in _plain_tensors(getattr(layer, field, None))
    }
    return sum(storages.values())


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors that really hold something; those of quanto pretend to the size and dtype that they stand for."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _plain_tensors(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _plain_tensors(part)


def predicted_cache_bytes(
    config: PreTrainedConfig,
    arguments: Mapping[str, Any],
    *,
    prompt_tokens: int,
    output_tokens: int,
    batch_size: int,
    element_bytes: int,
) -> int | None:
    """Bytes that the cache of a finished call holds, by the model's shape alone; None where the shape does not tell.

    Args:
        config: of the model.
        arguments: of `generate`, as in a recipe.
        prompt_tokens: per request.
        output_tokens: per request; the last one is never stored.
        batch_size: requests.
        element_bytes: of a key's or value's number, unquantised.
    """
    shape = cache_shape(config)
    if shape is None:
        return None
    per_token = 2 * shape.kv_heads * shape.head_dim * batch_size
    stored = prompt_tokens + output_tokens - 1
    if arguments["cache_implementation"] == "quantized":
        layer_bytes = _quantised_bytes(per_token, prompt_tokens, output_tokens - 1, element_bytes, arguments)
        return len(shape.windows) * layer_bytes
    slots = int(arguments.get("max_cache_len") or stored)
    return sum(min(slots, window or slots) for window in shape.windows) * per_token * element_bytes


def _quantised_bytes(
    per_token: int, prompt_tokens: int, steps: int, element_bytes: int, arguments: Mapping[str, Any]
) -> int:
    """Of one layer. What decoding adds stays as it is until there are `residual_length` of it."""
    options = arguments.get("cache_config") or {}
    if options.get("backend") == "fp8":
        return (prompt_tokens + steps) * per_token + 2 * 4  # one byte each, and one scale for keys and for values
    residual = steps % int(options.get("residual_length", RESIDUAL_LENGTH))
    quantised = (prompt_tokens + steps - residual) * per_token
    groups = quantised // int(options.get("q_group_size", GROUP_SIZE))
    scales_and_zeros = 2 * element_bytes * groups
    return quantised * int(options.get("nbits", 4)) // 8 + scales_and_zeros + residual * per_token * element_bytes
