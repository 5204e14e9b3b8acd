"""What the installed libraries make possible beyond PyTorch and Transformers: for each thing that cannot be, why."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import transformers
from pydantic import JsonValue
from torch.utils.cpp_extension import CUDA_HOME
from transformers import ContinuousBatchingConfig, GenerationMixin, cache_utils
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_hqq_available,
    is_optimum_quanto_available,
)

OPTIONAL = (
    *("optimum-quanto", "hqq", "accelerate", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers"),
    *("bitsandbytes", "compressed-tensors", "gptqmodel", "torchao"),
)
"""Distributions whose version may change the figures, where they are installed."""


def facts(kind: str, cxx: str | None) -> dict[str, JsonValue]:
    """By value of a knob, or back-end of a quantised cache: None, or why it cannot run.

    Args:
        kind: of the device.
        cxx: why no C++ code can be compiled, or None.
    """
    return {
        "quanto": _quanto_reason(kind, cxx),
        "hqq": None if is_hqq_available() else "needs hqq, which is not installed: pip install hqq",
        "fp8": None if hasattr(cache_utils, "Fp8QuantizedLayer") else _too_old("fp8 caches"),
        "paged": None if _has_pages() else _too_old("pages whose size can be told"),
        "flex_static": None if _passes_block_masks() else _too_old("static cache for the mask of flex attention"),
        "flash_attention_2": _package_reason("flash-attn", is_flash_attn_2_available()),
        "flash_attention_3": _package_reason("flash-attn-3", is_flash_attn_3_available()),
        "flash_attention_4": _package_reason("flash-attn-4", is_flash_attn_4_available()),
        "xformers": _package_reason("xformers", importlib.util.find_spec("xformers") is not None),
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Of those distributions that are installed."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _quanto_reason(kind: str, cxx: str | None) -> str | None:
    """On its first use quanto compiles the kernel by which it unpacks numbers."""
    if not is_optimum_quanto_available():
        return "needs optimum-quanto, which is not installed: pip install optimum-quanto ninja"
    if shutil.which("ninja") is None:
        return "optimum-quanto compiles a kernel with ninja, which was not found: pip install ninja"
    if kind == "cuda" and CUDA_HOME is None:
        return "optimum-quanto compiles a kernel with nvcc, which was not found: install the CUDA toolkit"
    return cxx


def _has_pages() -> bool:
    return "page_size" in {field.name for field in fields(ContinuousBatchingConfig)}


def _passes_block_masks() -> bool:
    # No name tells it: some versions, as 5.23, lay out every mask anew, and this one is no tensor.
    body = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    return ".contiguous()" not in body or "isinstance(attention_mask, torch.Tensor)" in body


def _too_old(what: str) -> str:
    return f"transformers {transformers.__version__} has no {what}: update it"


def _package_reason(distribution: str, usable: bool) -> str | None:
    return None if usable else f"needs {distribution}, which is not installed or not usable here"
