"""What was read back from a call, compared with the recipe: every difference in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import Cache

from kvat_core.schema import Applied, Recipe
from kvat_engine_transformers.calling import actions, batching
from kvat_engine_transformers.proving import live
from kvat_engine_transformers.proving.observation import FLASH_PARTS, Seen
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.knobs import DTYPES


def compare(seen: Seen, recipe: Recipe) -> Applied:
    """The read-back as comparable values, with every difference from the recipe in words."""
    return Applied(values=_values(seen), mismatches=tuple(_mismatches(seen, recipe)))


def wrong_slots(cache: Cache, recipe: Recipe) -> str | None:
    """How a live static cache differs in size from the recipe, or None; cheap enough for each timed call."""
    return _wrong_slots([live.layer_of(layer) for layer in cache.layers], recipe)


def _values(seen: Seen) -> dict[str, Any]:
    return {
        "cache": seen.cache,
        "layers": [_layer_text(layer) for layer in seen.layers],
        "pool": None if seen.pool is None else vars(seen.pool),
        "offloads": seen.offloads,
        "prefill_calls": seen.prefill_calls,
        "attention": seen.attention,
        "kernels": list(seen.kernels),
        "grad_mode": seen.grad_mode,
        "dtypes": list(seen.dtypes),
        "packed_by": seen.packed_by,
        "devices": list(seen.devices),
        "threads": seen.threads,
        "compile": seen.compile,
    }


def _layer_text(layer: live.Layer | live.StateLayer) -> str:
    if isinstance(layer, live.StateLayer):
        return layer.kind
    options = "" if layer.quantised is None else f" {layer.packed} {dict(layer.quantised)}"
    return f"{layer.kind}[{layer.slots}] {layer.dtype} {layer.device}{options}"


def _with_keys(layers: Iterable[live.Layer | live.StateLayer]) -> list[live.Layer]:
    return [layer for layer in layers if isinstance(layer, live.Layer)]


def _mismatches(seen: Seen, recipe: Recipe) -> list[str]:
    load, layers = recipe.load, _with_keys(seen.layers)
    kind = reading.cache_kind(recipe)
    pairs = [
        ("cache", kind.holds, seen.cache),
        ("offloading", kind.offloads, seen.offloads),
        ("attention", reading.attention(recipe), seen.attention),
        ("grad mode", reading.grad_mode(recipe), seen.grad_mode),
        ("cache dtype", [load["dtype"]], _cache_dtypes(seen)),
        ("quantisation", [reading.quantisation(recipe)], _distinct(layer.quantised for layer in layers)),
        ("packed numbers", [_packing(recipe)], _distinct(layer.packed for layer in layers)),
        ("pages", reading.pages(recipe), _pages(seen.pool)),
        *_device_pairs(seen, recipe),
        ("compile", actions.compile_mode(recipe), seen.compile),
        ("threads", reading.threads(recipe) or seen.threads, seen.threads),
    ]
    found = [f"{what}: the recipe says {wanted}, it is {actual}" for what, wanted, actual in pairs if wanted != actual]
    return [
        *found,
        *filter(
            None,
            (
                _wrong_weights(seen, recipe),
                _wrong_kernel(seen, recipe),
                _wrong_graphs(seen, recipe),
                _wrong_places(seen),
                _wrong_blocks(seen, recipe),
                _wrong_slots(seen.layers, recipe),
                _wrong_chunks(seen, recipe),
            ),
        ),
    ]


def _wrong_weights(seen: Seen, recipe: Recipe) -> str | None:
    """Transformers keeps a few sensitive weights in float32 whatever was asked for; anything else is wrong.

    Beside weights that are packed, in integers or in 8 bits, those that are not have the dtype that is computed with.
    """
    wanted = str(recipe.load["dtype"])
    unpacked = [dtype for dtype in seen.dtypes if seen.packed_by is None or dtype in DTYPES]
    if unpacked[:1] == [wanted] and set(unpacked) <= {wanted, "float32"}:
        return None
    return f"weights: the recipe says {wanted}, they are {' and '.join(seen.dtypes)}"


def _device_pairs(seen: Seen, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """A model that was to be spread, and was, has its weights and keys where Transformers says that its modules are."""
    spread = seen.spread if reading.device_map(recipe) is not None else None
    devices = [recipe.load["device"]] if spread is None else list(spread)
    kept = [*(layer.device for layer in _with_keys(seen.layers)), *([seen.pool.device] if seen.pool else [])]
    # What is offloaded waits in the memory of the host, all but the layer that was last at work.
    cached = list(live.names_of(device for device in kept if not (seen.offloads and device == "cpu")))
    return [
        ("device", devices, list(seen.devices)),
        ("cache device", devices, cached if spread is None or not set(cached) <= set(spread) else devices),
        ("weights on other devices than their modules", [], list(seen.strays)),
    ]


def _wrong_kernel(seen: Seen, recipe: Recipe) -> str | None:
    forced = reading.forced_kernel(recipe)
    # The calls of a compiled graph are not all seen one by one.
    asked = {"sdpa": "SDPA", "xformers": "xFormers", **dict.fromkeys(FLASH_PARTS, seen.attention)}.get(seen.attention)
    if asked and seen.graphs == 0 and not seen.kernels:
        return f"kernel: {asked} was asked for, none of its kernels ran"
    if forced is not None and seen.kernels != (forced,):
        return f"kernel: the recipe forces {forced}, {' and '.join(seen.kernels) or 'none'} ran"
    of_sdpa = [kernel for kernel in seen.kernels if kernel != seen.attention.upper()]
    if seen.attention != "sdpa" and of_sdpa:
        return f"kernel: {seen.attention} calls none of SDPA, {' and '.join(of_sdpa)} ran"
    return None


def _wrong_graphs(seen: Seen, recipe: Recipe) -> str | None:
    if recipe.compiles == (seen.graphs > 0):
        return None
    return f"compile: {seen.compile} with {seen.graphs} graphs compiled"


def _wrong_places(seen: Seen) -> str | None:
    """The cache says that it offloads; a layer that has gone where it waits is what shows it."""
    if not seen.offloads or "cpu" in (layer.device for layer in _with_keys(seen.layers)):
        return None
    return "offloading: no layer waits in the memory of the host"


def _wrong_blocks(seen: Seen, recipe: Recipe) -> str | None:
    """Transformers rounds a pool up to whole sectors, which hold as much as the spare blocks at most."""
    asked, pool = reading.blocks(recipe), seen.pool
    if asked is None or pool is None or asked + pool.spare_blocks <= pool.blocks <= asked + 2 * pool.spare_blocks:
        return None
    return f"pages: the recipe says {asked} blocks and {pool.spare_blocks} to spare, there are {pool.blocks}"


def _wrong_chunks(seen: Seen, recipe: Recipe) -> str | None:
    wanted = reading.prefill_calls(recipe, seen.prompt_tokens)
    # A model that prepares its inputs in a way of its own does not tell, and cuts nothing unless it is asked to.
    if wanted in (None, seen.prefill_calls) or (wanted == 1 and seen.prefill_calls == 0):
        return None
    return f"prefill: the recipe cuts the prompt into {wanted} calls, {seen.prefill_calls} were seen"


def _cache_dtypes(seen: Seen) -> list[str]:
    return [seen.pool.dtype] if seen.pool else list(live.names_of(layer.dtype for layer in _with_keys(seen.layers)))


def _packing(recipe: Recipe) -> str | None:
    """How the numbers of a quantised cache are to be kept."""
    options = reading.quantisation(recipe)
    if options is None:
        return None
    bits = options.get("nbits")
    return {"quanto": f"qint{bits}", "hqq": f"{bits} bits", "fp8": "float8_e4m3fn"}[str(options["backend"])]


def _pages(pool: batching.Pool | None) -> Mapping[str, Any] | None:
    if pool is None:
        return None
    return {"page_size": pool.page_tokens, "allow_block_sharing": pool.shares_blocks}


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found or [None]


def _wrong_slots(layers: Iterable[live.Layer | live.StateLayer], recipe: Recipe) -> str | None:
    slots = reading.slots(recipe)
    if slots is None:
        return None
    found = _with_keys(layers)
    full = {layer.slots for layer in found if not layer.sliding} - {slots}
    sliding = {layer.slots for layer in found if layer.sliding and layer.slots > slots}
    wrong = sorted(full | sliding)
    return f"slots: the recipe says {slots}, layers have {wrong}" if wrong else None
