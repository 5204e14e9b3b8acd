"""Exceptions of torch and Transformers as failure kinds; what is not known here stays foreign."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from kvat_core.engine import EngineError

_OUT_OF_DEVICE_MEMORY = "the device ran out of memory"
_BROKEN_DEVICE = "the device reported an error that only a new process can clear"

_FULL = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "HIP error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Invalid buffer size",
)
"""What torch says when a device is full: its allocator, whose error `generate_batch` hands on as text, the driver, the
libraries of CUDA when they make room for themselves, and Metal's allocator."""

_OF_A_DEVICE = ("CUDA error: ", "HIP error: ")
"""How torch begins what the runtime of a device reports, and what a library reports that stands on it."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn what torch raises into an `EngineError` where its meaning is known.

    Raises:
        EngineError: out of memory, damaged or wrong weights, a kernel that cannot serve this call, a missing
            compiler, or a device that is broken for the rest of the process.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError("oom_device", _OUT_OF_DEVICE_MEMORY) from error
    except SafetensorError as error:
        raise EngineError("error", "the weight files are damaged or incomplete; fetch them again") from error
    except RuntimeError as error:
        known = from_text(str(error))
        if known is None and isinstance(error, torch.AcceleratorError):
            known = EngineError("device_error", _BROKEN_DEVICE)
        if known is None:
            raise
        raise known from error


def from_text(text: str) -> EngineError | None:
    """What is known of an error by its text, by which alone torch tells most of its errors apart."""
    if any(full in text for full in _FULL):
        return EngineError("oom_device", _OUT_OF_DEVICE_MEMORY)
    if any(one in text for one in _OF_A_DEVICE) and "_STATUS_" not in text:
        return EngineError("device_error", _BROKEN_DEVICE)
    if "DefaultCPUAllocator" in text and "memory" in text:
        return EngineError("oom_host", "the host ran out of memory")
    if "No viable backend for scaled_dot_product_attention" in text:
        return EngineError("unsupported", "the forced attention kernel cannot serve this model's shapes or masks")
    if "No operator found for `memory_efficient_attention" in text:
        return EngineError("unsupported", "xFormers has no kernel for this model's shapes or masks on this device")
    if text.startswith("xformers_attention has no "):
        return EngineError("unsupported", f"{text}, which this model asks for")
    if "No available kernel" in text:
        return EngineError("unsupported", "the forced attention kernel cannot serve this model or mask on this device")
    if "ignore_mismatched_sizes" in text:
        return EngineError("error", "the weights do not have the shapes that config.json says; fetch both again")
    if "No working C++ compiler" in text:
        return EngineError("unsupported", "torch.compile found no working C++ compiler; install g++ or set CXX")
    if "CppCompileError" in text:
        return EngineError("unsupported", "torch.compile wrote code for this model that the C++ compiler refuses")
    if "must have same slice shapes" in text:
        return EngineError("unsupported", "Transformers made the cache for other heads than this model has")
    if "Cannot find a working triton" in text:
        return EngineError("unsupported", "torch.compile found no working triton; install it")
    return None
