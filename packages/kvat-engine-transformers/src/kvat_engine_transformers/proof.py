"""What really ran: one untimed call, read back from the live model, compared with the recipe."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, PreTrainedModel

from kvat_core.engine import EngineError
from kvat_core.schema import Applied, Recipe
from kvat_engine_transformers import actions, batching
from kvat_engine_transformers.kept import cache_of
from kvat_engine_transformers.knobs import DTYPES
from kvat_engine_transformers.prompts import model_inputs, unpadded
from kvat_engine_transformers.quantisation import packed_by

# Otherwise the profiler writes a line to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_BACKENDS = {"QuantoQuantizedLayer": "quanto", "HQQQuantizedLayer": "hqq", "Fp8QuantizedLayer": "fp8"}
"""Class of a quantised layer to the back-end that it stands for."""

_KERNELS = (
    ("_scaled_dot_product_flash_attention", "FLASH_ATTENTION"),
    ("_scaled_dot_product_efficient_attention", "EFFICIENT_ATTENTION"),
    ("_scaled_dot_product_cudnn_attention", "CUDNN_ATTENTION"),
    # On mps this includes the fused operator, which torch chooses inside its math kernel.
    ("_scaled_dot_product_attention_math", "MATH"),
)
"""Start of an operator's name to the attention kernel behind it; the first match counts."""

_XFORMERS = tuple(
    (start, "XFORMERS") for start in ("xformers", "_flash_attention_forward", "_efficient_attention_forward")
)
"""The same of operators that xFormers calls: its own, and PyTorch's kernels without SDPA around them."""


@dataclass(frozen=True)
class Layer:
    """One layer of a live cache."""

    kind: str
    sliding: bool
    slots: int
    """Positions that its tensors hold: allocated ones of a static layer, stored ones of a dynamic layer."""
    dtype: str
    device: str
    quantised: Mapping[str, Any] | None = None
    """What it says of its quantisation, in the words of `cache_config`; None where numbers are kept as they are."""
    packed: str | None = None
    """Type of the numbers that it really keeps for the older tokens."""


@dataclass(frozen=True)
class StateLayer:
    """One layer of a live cache that keeps a state of fixed size instead of keys and values."""

    kind: str


@dataclass(frozen=True)
class Seen:
    """Everything that a setting is meant to change, as it was found."""

    cache: str
    layers: tuple[Layer | StateLayer, ...]
    pool: batching.Pool | None
    """In place of layers, where requests have pages of a common pool."""
    offloads: bool
    prompt_tokens: int
    prefill_calls: int
    """Forward calls that the prompt was cut into; 0 where nobody can tell."""
    attention: str
    kernels: tuple[str, ...]
    grad_mode: str
    dtypes: tuple[str, ...]
    """Of the weights, the one that holds most bytes first."""
    packed_by: str | None
    """Method by which the weights are packed, where they are."""
    devices: tuple[str, ...]
    spread: tuple[str, ...] | None
    """Devices over which Transformers says to have spread the modules; None where they are all on one."""
    strays: tuple[str, ...]
    """Weights that are on another device than it says."""
    threads: int
    compile: str
    graphs: int


class _Witness:
    """A streamer that notes in which gradient mode `generate` runs, and how the prompt is cut."""

    def __init__(self) -> None:
        self.grad_mode = "unknown"
        self.widths: list[int] = []
        """Tokens of each forward call."""

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """See what is prepared for each forward call: also for one that is compiled, in which no hook can be."""
        own = vars(model)
        prepare: Any = model.prepare_inputs_for_generation

        @wraps(prepare)  # generate reads its signature
        def look(*arguments: Any, **options: Any) -> Any:
            inputs = prepare(*arguments, **options)
            if (ids := inputs.get("input_ids")) is not None:
                self.widths.append(int(ids.shape[1]))
            return inputs

        own["prepare_inputs_for_generation"] = look
        try:
            yield
        finally:
            del own["prepare_inputs_for_generation"]

    def calls_for(self, tokens: int) -> int:
        """Forward calls until so many tokens were in."""
        sums = list(accumulate(self.widths))
        return sums.index(tokens) + 1 if tokens in sums else 0

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


def observe(
    model: PreTrainedModel, prompt: torch.Tensor, recipe: Recipe, arguments: Mapping[str, Any], graphs_before: int
) -> Seen:
    """Generate once under the profiler, inside the recipe's contexts, and read everything back.

    Args:
        model: the live model.
        prompt: ids, batch × tokens, with `PAD` where a row has none.
        recipe: whose contexts have been entered.
        arguments: of its call.
        graphs_before: `compiled_graphs` before the first call of the recipe.

    Raises:
        EngineError: the model keeps its keys and values in something else than a `Cache`, or keeps none.
    """
    if recipe.call == "generate_batch":
        return _observe_batch(model, prompt, arguments, graphs_before)
    generate: Any = model.generate
    witness = _Witness()
    inputs = model_inputs(prompt)
    if recipe.compiles:
        # Compiled beforehand, because tracing calls kernels that the compiled graph does not.
        generate(**inputs, **arguments)
    with witness.watching(model), profile(activities=_activities(model.device)) as profiler:
        output = generate(**inputs, **arguments, streamer=witness, return_dict_in_generate=True)
    cache = cache_of(output)
    if cache is None:
        raise EngineError("unsupported", "this architecture hands back no cache that could prove what ran")
    return Seen(
        cache=type(cache).__name__,
        layers=tuple(_layer(layer) for layer in cache.layers),
        pool=None,
        offloads=bool(cache.offloading),
        prompt_tokens=prompt.shape[1],
        prefill_calls=witness.calls_for(prompt.shape[1]),
        attention=str(model.config._attn_implementation),
        kernels=_kernels((event.key for event in profiler.key_averages()), model.config._attn_implementation),
        grad_mode=witness.grad_mode,
        dtypes=_by_bytes(model),
        packed_by=packed_by(model),
        devices=_names(parameter.device for parameter in model.parameters()),
        spread=_spread(model),
        strays=_strays(model),
        threads=torch.get_num_threads(),
        compile=_compile_mode(model),
        graphs=compiled_graphs() - graphs_before,
    )


def _observe_batch(
    model: PreTrainedModel, prompt: torch.Tensor, arguments: Mapping[str, Any], graphs_before: int
) -> Seen:
    # It all happens in a thread of its own.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with (
        batching.watched(model) as watch,
        profile(activities=_activities(model.device), experimental_config=everywhere) as profiler,
    ):
        batching.generate(model, unpadded(prompt), arguments)
    if watch.pool is None:
        raise EngineError("unsupported", "generate_batch left no pool that could prove what ran")
    return Seen(
        cache=watch.pool.kind,
        layers=(),
        pool=watch.pool,
        offloads=False,
        prompt_tokens=prompt.shape[1],
        prefill_calls=0,
        attention=watch.pool.attention,
        kernels=_kernels((event.key for event in profiler.key_averages()), watch.pool.attention),
        grad_mode="no_grad",  # by a decorator of that thread, which no context reaches
        dtypes=_by_bytes(model),
        packed_by=packed_by(model),
        devices=_names(parameter.device for parameter in model.parameters()),
        spread=_spread(model),
        strays=_strays(model),
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


def _homes(model: PreTrainedModel) -> dict[str, torch.device]:
    """Where Transformers says that each module is; empty where all are on one device."""
    device_map: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    return {name: torch.device(home) for name, home in device_map.items()}


def _spread(model: PreTrainedModel) -> tuple[str, ...] | None:
    homes = _homes(model)
    return _names(homes.values()) if homes else None


def _strays(model: PreTrainedModel) -> tuple[str, ...]:
    homes = _homes(model)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if any(
            _name(parameter.device) != _name(home) and (not module or name == module or name.startswith(f"{module}."))
            for module, home in homes.items()
        )
    )


def _activities(device: torch.device) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def _layer(layer: Any) -> Layer | StateLayer:
    if getattr(layer, "keys", None) is None:
        return StateLayer(kind=type(layer).__name__)
    quantised = _quantisation(layer)
    return Layer(
        kind=type(layer).__name__,
        sliding=bool(layer.is_sliding),
        slots=int(layer.keys.shape[-2]) if quantised is None else int(layer.get_seq_length()),
        dtype=_name(layer.keys.dtype),
        device=_name(layer.keys.device),
        quantised=quantised,
        packed=None if quantised is None else _packed(layer._quantized_keys),
    )


def _quantisation(layer: Any) -> Mapping[str, Any] | None:
    backend = _BACKENDS.get(type(layer).__name__)
    if backend is None:
        return None
    of_groups = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
    return {"backend": backend, **{name: getattr(layer, name) for name in of_groups if hasattr(layer, name)}}


def _packed(quantised: Any) -> str:
    """Type of packed numbers: of quanto's own tensors, or of a tensor beside what it takes to unpack it."""
    if hasattr(quantised, "qtype"):
        return str(quantised.qtype.name)
    tensor, how = quantised
    return f"{how['nbits']} bits" if isinstance(how, Mapping) else _name(tensor.dtype)


def _kernels(operators: Any, attention: str) -> tuple[str, ...]:
    # SDPA calls some of what xFormers calls, inside operators of its own.
    known = (*_KERNELS, *(_XFORMERS if attention == "xformers" else ()))
    names = (operator.removeprefix("aten::") for operator in operators)
    found = {next((kernel for start, kernel in known if name.startswith(start)), None) for name in names}
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


def _layer_text(layer: Layer | StateLayer) -> str:
    if isinstance(layer, StateLayer):
        return layer.kind
    options = "" if layer.quantised is None else f" {layer.packed} {dict(layer.quantised)}"
    return f"{layer.kind}[{layer.slots}] {layer.dtype} {layer.device}{options}"


def _with_keys(layers: Iterable[Layer | StateLayer]) -> list[Layer]:
    return [layer for layer in layers if isinstance(layer, Layer)]


def _mismatches(seen: Seen, recipe: Recipe) -> list[str]:
    load, layers = recipe.load, _with_keys(seen.layers)
    kind = actions.cache_kind(recipe)
    pairs = [
        ("cache", kind.holds, seen.cache),
        ("offloading", kind.offloads, seen.offloads),
        ("attention", actions.attention(recipe), seen.attention),
        ("grad mode", actions.grad_mode(recipe), seen.grad_mode),
        ("cache dtype", [load["dtype"]], _cache_dtypes(seen)),
        ("quantisation", [actions.quantisation(recipe)], _distinct(layer.quantised for layer in layers)),
        ("packed numbers", [_packing(recipe)], _distinct(layer.packed for layer in layers)),
        ("pages", actions.pages(recipe), _pages(seen.pool)),
        *_device_pairs(seen, recipe),
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
                _wrong_graphs(seen, recipe),
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
    spread = seen.spread if actions.device_map(recipe) is not None else None
    devices = [recipe.load["device"]] if spread is None else list(spread)
    kept = [*(layer.device for layer in _with_keys(seen.layers)), *([seen.pool.device] if seen.pool else [])]
    # What is offloaded waits in the memory of the host, all but the layer that was last at work.
    cached = list(_names(device for device in kept if not (seen.offloads and device == "cpu")))
    return [
        ("device", devices, list(seen.devices)),
        ("cache device", devices, cached if spread is None or not set(cached) <= set(spread) else devices),
        ("weights on other devices than their modules", [], list(seen.strays)),
    ]


def _wrong_kernel(seen: Seen, recipe: Recipe) -> str | None:
    forced = actions.forced_kernel(recipe)
    # The calls of a compiled graph are not all seen one by one.
    asked = {"sdpa": "SDPA", "xformers": "xFormers"}.get(seen.attention)
    if asked and seen.graphs == 0 and not seen.kernels:
        return f"kernel: {asked} was asked for, none of its kernels ran"
    if forced is not None and seen.kernels != (forced,):
        return f"kernel: the recipe forces {forced}, {' and '.join(seen.kernels) or 'none'} ran"
    of_sdpa = [kernel for kernel in seen.kernels if kernel != "XFORMERS"]
    if seen.attention != "sdpa" and of_sdpa:
        return f"kernel: {seen.attention} calls none of SDPA, {' and '.join(of_sdpa)} ran"
    return None


def _wrong_graphs(seen: Seen, recipe: Recipe) -> str | None:
    if recipe.compiles == (seen.graphs > 0):
        return None
    return f"compile: {seen.compile} with {seen.graphs} graphs compiled"


def _wrong_chunks(seen: Seen, recipe: Recipe) -> str | None:
    wanted = actions.prefill_calls(recipe, seen.prompt_tokens)
    # A model that prepares its inputs in a way of its own does not tell, and cuts nothing unless it is asked to.
    if wanted in (None, seen.prefill_calls) or (wanted == 1 and seen.prefill_calls == 0):
        return None
    return f"prefill: the recipe cuts the prompt into {wanted} calls, {seen.prefill_calls} were seen"


def _cache_dtypes(seen: Seen) -> list[str]:
    return [seen.pool.dtype] if seen.pool else list(_names(layer.dtype for layer in _with_keys(seen.layers)))


def _packing(recipe: Recipe) -> str | None:
    """How the numbers of a quantised cache are to be kept."""
    options = actions.quantisation(recipe)
    if options is None:
        return None
    bits = options.get("nbits")
    return {"quanto": f"qint{bits}", "hqq": f"{bits} bits", "fp8": "float8_e4m3fn"}[str(options["backend"])]


def _pages(pool: batching.Pool | None) -> Mapping[str, Any] | None:
    if pool is None:
        return None
    return {"page_size": pool.page_tokens, "num_blocks": pool.blocks, "allow_block_sharing": pool.shares_blocks}


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found or [None]


def _wrong_slots(layers: Iterable[Layer | StateLayer], recipe: Recipe) -> str | None:
    slots = actions.slots(recipe)
    if slots is None:
        return None
    found = _with_keys(layers)
    full = {layer.slots for layer in found if not layer.sliding} - {slots}
    sliding = {layer.slots for layer in found if layer.sliding and layer.slots > slots}
    wrong = sorted(full | sliding)
    return f"slots: the recipe says {slots}, layers have {wrong}" if wrong else None
