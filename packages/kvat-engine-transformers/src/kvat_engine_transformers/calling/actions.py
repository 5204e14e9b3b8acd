"""A recipe's data as Python objects; `snippet` writes the same objects as source code."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig

from kvat_core.schema import ContextCall, Recipe


@contextmanager
def entered(recipe: Recipe) -> Iterator[None]:
    """All of the recipe's contexts, in order."""
    with ExitStack() as stack:
        for call in recipe.context:
            stack.enter_context(_context(call))
        yield


def arguments(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of `generate`."""
    return {name: _argument(name, value) for name, value in recipe.arguments.items()}


def compile_mode(recipe: Recipe) -> str:
    """Mode of `torch.compile`, or ``off``; where the recipe names none, `generate` takes the one that it has."""
    config = recipe.arguments.get("compile_config")
    if isinstance(config, Mapping):
        return str(config["mode"])
    by_itself = recipe.arguments.get("disable_compile") is False
    return CompileConfig().mode if by_itself else "off"


def _context(call: ContextCall) -> Any:
    if call.name == "torch.inference_mode":
        return torch.inference_mode()
    if call.name == "torch.nn.attention.sdpa_kernel":
        return sdpa_kernel(SDPBackend.__members__[str(call.arguments[0])])
    raise ValueError(f"unknown context {call.name}")


def _argument(name: str, value: JsonValue) -> Any:
    if name == "compile_config":
        return _compile_config(cast("Mapping[str, Any]", value))
    # Older versions of transformers take a cache_config apart as they use it.
    return copy.deepcopy(value)


def _compile_config(fields: Mapping[str, Any]) -> CompileConfig:
    config = CompileConfig()
    for name, value in fields.items():
        # By attribute, because the private one is no argument of the constructor.
        setattr(config, name, value)
    return config
