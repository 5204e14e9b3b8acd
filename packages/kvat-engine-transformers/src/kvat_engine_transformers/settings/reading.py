"""What a recipe asks for, read from its data; for the light half and the heavy one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kvat_core.schema import Recipe
from kvat_engine_transformers.settings.caches import CACHES, CacheKind
from kvat_engine_transformers.settings.recipes import BATCHING


def cache_kind(recipe: Recipe) -> CacheKind:
    """The kind of cache that the recipe asks for."""
    wanted, options = recipe.arguments.get("cache_implementation"), quantisation(recipe) or {}
    return next(
        kind for kind in CACHES.values() if kind.implementation == wanted and kind.quantised.items() <= options.items()
    )


def quantisation(recipe: Recipe) -> Mapping[str, Any] | None:
    """Back-end and options of a quantised cache; None of one that keeps numbers as they are."""
    return cast("Mapping[str, Any] | None", recipe.arguments.get("cache_config"))


def loaded_attention(recipe: Recipe) -> str:
    """Implementation of attention that the model is loaded with."""
    return str(recipe.load["attn_backend"])


def attention(recipe: Recipe) -> str:
    """Implementation by which the model attends meanwhile."""
    loaded = loaded_attention(recipe)
    return "paged|eager" if (recipe.call, loaded) == ("generate_batch", "eager") else loaded


def pages(recipe: Recipe) -> Mapping[str, Any] | None:
    """Size and sharing of the pages of a paged cache; None of another one."""
    config = batching(recipe)
    return None if config is None else {name: config[name] for name in ("page_size", "allow_block_sharing")}


def blocks(recipe: Recipe) -> int | None:
    """Blocks that the tokens of a paged cache take; None of another one."""
    config = batching(recipe)
    return None if config is None else int(config["num_blocks"])


def batching(recipe: Recipe) -> Mapping[str, Any] | None:
    """All that `generate_batch` is told of its pool; None where `generate` is called."""
    return cast("Mapping[str, Any] | None", recipe.arguments.get(BATCHING))


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
