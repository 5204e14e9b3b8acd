"""Bytes: of the process, of the device, and of a live cache."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch
from transformers import Cache


def start_host_peak() -> None:
    """Forget the peak so far, where the system can: on Linux. Elsewhere loading stays part of it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current size


def peak_host_bytes() -> int:
    """Peak resident size of this process since `start_host_peak`; over its lifetime where that can do nothing."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # Kilobytes everywhere but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_device_bytes(device: torch.device) -> int | None:
    """Peak that torch reserved on a CUDA device, its own view alone; None on other devices."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds now, allocated slots included."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
