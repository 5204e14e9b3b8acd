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
from kvat_engine_transformers.caches import CACHES, CacheKind


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


def cache_kind(recipe: Recipe) -> CacheKind:
    """The kind of cache that the recipe asks for."""
    wanted, options = recipe.arguments.get("cache_implementation"), quantisation(recipe) or {}
    return next(
        kind for kind in CACHES.values() if kind.implementation == wanted and kind.quantised.items() <= options.items()
    )


def quantisation(recipe: Recipe) -> Mapping[str, Any] | None:
    """Back-end and options of a quantised cache; None of one that keeps numbers as they are."""
    return cast("Mapping[str, Any] | None", recipe.arguments.get("cache_config"))


def attention(recipe: Recipe) -> str:
    """Implementation by which the model attends meanwhile."""
    loaded = str(recipe.load["attn_backend"])
    return "paged|eager" if (recipe.call, loaded) == ("generate_batch", "eager") else loaded


def pages(recipe: Recipe) -> Mapping[str, Any] | None:
    """Size and sharing of the pages of a paged cache; None of another one."""
    config = _batching(recipe)
    return None if config is None else {name: config[name] for name in ("page_size", "allow_block_sharing")}


def blocks(recipe: Recipe) -> int | None:
    """Blocks that the tokens of a paged cache take; None of another one."""
    config = _batching(recipe)
    return None if config is None else int(config["num_blocks"])


def _batching(recipe: Recipe) -> Mapping[str, Any] | None:
    return cast("Mapping[str, Any] | None", recipe.arguments.get("continuous_batching_config"))


def prefill_calls(recipe: Recipe, prompt_tokens: int) -> int | None:
    """Forward calls that the prompt is to be cut into; None where `generate_batch` decides."""
    if recipe.call == "generate_batch":
        return None
    chunk = cast("int | None", recipe.arguments["prefill_chunk_size"])
    return -(-prompt_tokens // (chunk or prompt_tokens))


def slots(recipe: Recipe) -> int | None:
    """Length of the static cache that the recipe asks for; None for a dynamic one."""
    return cast("int | None", recipe.arguments.get("max_cache_len"))


def threads(recipe: Recipe) -> int | None:
    """CPU threads that the recipe asks for; None leaves torch its own number."""
    extra = cast("Mapping[str, Any]", recipe.load["extra"])
    return cast("int | None", extra["threads"])


def device_map(recipe: Recipe) -> str | None:
    """How Transformers is asked to spread the weights; None where they are on the recipe's device."""
    extra = cast("Mapping[str, Any]", recipe.load["extra"])
    return cast("str | None", extra.get("device_map"))


def grad_mode(recipe: Recipe) -> str:
    """Without a context of the recipe's own it is what `generate` itself enters."""
    modes = [call.name.removeprefix("torch.") for call in recipe.context if call.name == "torch.inference_mode"]
    return modes[0] if modes else "no_grad"


def forced_kernel(recipe: Recipe) -> str | None:
    """Name of the `SDPBackend` that the recipe forces, or None where torch chooses."""
    names = [str(call.arguments[0]) for call in recipe.context if call.name == "torch.nn.attention.sdpa_kernel"]
    return names[0] if names else None


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
