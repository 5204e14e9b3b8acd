"""What really ran: one untimed call, read back from the live model, compared with the recipe."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from kvat_core.engine import EngineError
from kvat_core.schema import Applied, Recipe
from kvat_engine_transformers import actions

# Otherwise the profiler writes a line to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

CACHE_CLASSES = {"dynamic": "DynamicCache", "static": "StaticCache"}

_KERNELS = (
    ("_scaled_dot_product_flash_attention", "FLASH_ATTENTION"),
    ("_scaled_dot_product_efficient_attention", "EFFICIENT_ATTENTION"),
    ("_scaled_dot_product_cudnn_attention", "CUDNN_ATTENTION"),
    # On mps this includes the fused operator, which torch chooses inside its math kernel.
    ("_scaled_dot_product_attention_math", "MATH"),
)
"""Start of an operator's name to the attention kernel behind it; the first match counts."""


@dataclass(frozen=True)
class Layer:
    """One layer of a live cache."""

    kind: str
    sliding: bool
    slots: int
    """Positions that its tensors hold: allocated ones of a static layer, stored ones of a dynamic layer."""
    dtype: str
    device: str


@dataclass(frozen=True)
class StateLayer:
    """One layer of a live cache that keeps a state of fixed size instead of keys and values."""

    kind: str


@dataclass(frozen=True)
class Seen:
    """Everything that a setting is meant to change, as it was found."""

    cache: str
    layers: tuple[Layer | StateLayer, ...]
    attention: str
    kernels: tuple[str, ...]
    grad_mode: str
    dtypes: tuple[str, ...]
    """Of the weights, the one that holds most bytes first."""
    devices: tuple[str, ...]
    threads: int
    compile: str
    graphs: int


class _Witness:
    """A streamer that notes in which gradient mode `generate` runs."""

    def __init__(self) -> None:
        self.grad_mode = "unknown"

    def put(self, tokens: torch.Tensor) -> None:
        if torch.is_inference_mode_enabled():
            self.grad_mode = "inference_mode"
        else:
            self.grad_mode = "grad" if torch.is_grad_enabled() else "no_grad"

    def end(self) -> None:
        pass


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; asking does not import the compiler."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def observe(model: PreTrainedModel, prompt: torch.Tensor, arguments: Mapping[str, Any], graphs_before: int) -> Seen:
    """Generate once under the profiler, inside the recipe's contexts, and read everything back.

    Args:
        model: the live model.
        prompt: ids, batch × tokens.
        arguments: of `generate`.
        graphs_before: `compiled_graphs` before the first call of the recipe.

    Raises:
        EngineError: the model keeps its keys and values in something else than a `Cache`, or keeps none.
    """
    generate: Any = model.generate
    witness = _Witness()
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    if "compile_config" in arguments:
        # Compiled beforehand, because tracing calls kernels that the compiled graph does not.
        generate(**inputs, **arguments)
    with profile(activities=_activities(model.device)) as profiler:
        output = generate(**inputs, **arguments, streamer=witness, return_dict_in_generate=True)
    cache = output.past_key_values
    if not isinstance(cache, Cache):
        raise EngineError("unsupported", "this architecture hands back no cache that could prove what ran")
    return Seen(
        cache=type(cache).__name__,
        layers=tuple(_layer(layer) for layer in cache.layers),
        attention=str(model.config._attn_implementation),
        kernels=_kernels(event.key for event in profiler.key_averages()),
        grad_mode=witness.grad_mode,
        dtypes=_by_bytes(model),
        devices=_names(parameter.device for parameter in model.parameters()),
        threads=torch.get_num_threads(),
        compile=_compile_mode(model),
        graphs=compiled_graphs() - graphs_before,
    )


def compare(seen: Seen, recipe: Recipe) -> Applied:
    """The read-back as comparable values, with every difference from the recipe in words."""
    return Applied(values=_values(seen), mismatches=tuple(_mismatches(seen, recipe)))


def wrong_slots(cache: Cache, recipe: Recipe) -> str | None:
    """How a live static cache differs in size from the recipe, or None; cheap enough for each timed call."""
    return _wrong_slots([_layer(layer) for layer in cache.layers], recipe)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def _layer(layer: Any) -> Layer | StateLayer:
    if getattr(layer, "keys", None) is None:
        return StateLayer(kind=type(layer).__name__)
    return Layer(
        kind=type(layer).__name__,
        sliding=bool(layer.is_sliding),
        slots=int(layer.keys.shape[-2]),
        dtype=_name(layer.keys.dtype),
        device=_name(layer.keys.device),
    )


def _kernels(operators: Any) -> tuple[str, ...]:
    names = (operator.removeprefix("aten::") for operator in operators)
    found = {next((kernel for start, kernel in _KERNELS if name.startswith(start)), None) for name in names}
    return tuple(sorted(kernel for kernel in found if kernel is not None))


def _compile_mode(model: PreTrainedModel) -> str:
    """Mode of the compiled forward that generate left on the model, or ``off``."""
    left = vars(model)
    if "_compiled_call" not in left:
        return "off"
    config = left.get("_last_compile_config")
    return "unknown" if config is None else str(config.mode)


def _name(value: Any) -> str:
    # There is one mps device, and torch writes its number on tensors only.
    return str(value).removeprefix("torch.").replace("mps:0", "mps")


def _by_bytes(model: PreTrainedModel) -> tuple[str, ...]:
    """Dtypes of the weights, by how many bytes each holds."""
    held: Counter[str] = Counter()
    for parameter in model.parameters():
        held[_name(parameter.dtype)] += parameter.nbytes
    return tuple(dtype for dtype, _ in held.most_common())


def _names(values: Any) -> tuple[str, ...]:
    return tuple(sorted({_name(value) for value in values}))


def _values(seen: Seen) -> dict[str, Any]:
    return {
        "cache": seen.cache,
        "layers": [_layer_text(layer) for layer in seen.layers],
        "attention": seen.attention,
        "kernels": list(seen.kernels),
        "grad_mode": seen.grad_mode,
        "dtypes": list(seen.dtypes),
        "devices": list(seen.devices),
        "threads": seen.threads,
        "compile": seen.compile,
    }


def _layer_text(layer: Layer | StateLayer) -> str:
    if isinstance(layer, StateLayer):
        return layer.kind
    return f"{layer.kind}[{layer.slots}] {layer.dtype} {layer.device}"


def _with_keys(layers: Iterable[Layer | StateLayer]) -> list[Layer]:
    return [layer for layer in layers if isinstance(layer, Layer)]


def _mismatches(seen: Seen, recipe: Recipe) -> list[str]:
    load, layers = recipe.load, _with_keys(seen.layers)
    wanted_cache = CACHE_CLASSES[str(recipe.arguments["cache_implementation"])]
    pairs = [
        ("cache", wanted_cache, seen.cache),
        ("attention", load["attn_backend"], seen.attention),
        ("grad mode", actions.grad_mode(recipe), seen.grad_mode),
        ("cache dtype", [load["dtype"]], list(_names(layer.dtype for layer in layers))),
        ("device", [load["device"]], list(seen.devices)),
        ("cache device", [load["device"]], list(_names(layer.device for layer in layers))),
        ("compile", actions.compile_mode(recipe), seen.compile),
        ("threads", actions.threads(recipe) or seen.threads, seen.threads),
    ]
    found = [f"{what}: the recipe says {wanted}, it is {actual}" for what, wanted, actual in pairs if wanted != actual]
    return [
        *found,
        *filter(
            None,
            (
                _wrong_weights(seen, recipe),
                _wrong_kernel(seen, recipe),
                _wrong_graphs(seen),
                _wrong_slots(seen.layers, recipe),
            ),
        ),
    ]


def _wrong_weights(seen: Seen, recipe: Recipe) -> str | None:
    """Transformers keeps a few sensitive weights in float32 whatever was asked for; anything else is wrong."""
    wanted = str(recipe.load["dtype"])
    if seen.dtypes[0] == wanted and set(seen.dtypes) <= {wanted, "float32"}:
        return None
    return f"weights: the recipe says {wanted}, they are {' and '.join(seen.dtypes)}"


def _wrong_kernel(seen: Seen, recipe: Recipe) -> str | None:
    forced = actions.forced_kernel(recipe)
    # The calls of a compiled graph are not all seen one by one.
    if seen.attention == "sdpa" and seen.compile == "off" and not seen.kernels:
        return "kernel: SDPA was asked for, none of its kernels ran"
    if forced is not None and seen.kernels != (forced,):
        return f"kernel: the recipe forces {forced}, {' and '.join(seen.kernels) or 'none'} ran"
    if seen.attention == "eager" and seen.kernels:
        return f"kernel: eager attention calls none, {' and '.join(seen.kernels)} ran"
    return None


def _wrong_graphs(seen: Seen) -> str | None:
    if (seen.compile == "off") == (seen.graphs == 0):
        return None
    return f"compile: {seen.compile} with {seen.graphs} graphs compiled"


def _wrong_slots(layers: Iterable[Layer | StateLayer], recipe: Recipe) -> str | None:
    slots = actions.slots(recipe)
    if slots is None:
        return None
    found = _with_keys(layers)
    full = {layer.slots for layer in found if not layer.sliding} - {slots}
    sliding = {layer.slots for layer in found if layer.sliding and layer.slots > slots}
    wrong = sorted(full | sliding)
    return f"slots: the recipe says {slots}, layers have {wrong}" if wrong else None
