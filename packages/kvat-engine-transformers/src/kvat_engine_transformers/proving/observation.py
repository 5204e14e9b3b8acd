"""One untimed call under the profiler, with all that a setting is meant to change read back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from kvat_core.engine import EngineError
from kvat_core.schema import Recipe
from kvat_engine_transformers.calling import batching
from kvat_engine_transformers.calling.kept import cache_of
from kvat_engine_transformers.calling.prompts import model_inputs, unpadded
from kvat_engine_transformers.model.quantisation import packed_by
from kvat_engine_transformers.proving import live

# Otherwise the profiler writes a line to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_KERNELS = (
    ("_scaled_dot_product_flash_attention", "FLASH_ATTENTION"),
    ("_scaled_dot_product_efficient_attention", "EFFICIENT_ATTENTION"),
    ("_scaled_dot_product_cudnn_attention", "CUDNN_ATTENTION"),
    # On mps this includes the fused operator, which torch chooses inside its math kernel.
    ("_scaled_dot_product_attention_math", "MATH"),
)
"""Start of an operator's name to the attention kernel behind it."""

_XFORMERS = tuple(
    (start, "XFORMERS") for start in ("xformers", "_flash_attention_forward", "_efficient_attention_forward")
)
"""The same of operators that xFormers calls: its own, and PyTorch's kernels without SDPA around them."""


FLASH_PARTS = {
    "flash_attention_2": ("flash_attn::_flash_attn", "void flash::flash_fwd"),
    "flash_attention_3": ("flash_attn_3::", "flash::FlashAttnFwdSm"),
    "flash_attention_4": ("FlashAttentionForwardSm",),
}
"""By attention, what is part of its package's names: of its operators, and of its kernels, which some calls launch
without an operator. PyTorch's own copy of the kernels is in another namespace, `pytorch_flash`."""


@dataclass(frozen=True)
class Seen:
    """Everything that a setting is meant to change, as it was found."""

    cache: str
    layers: tuple[live.Layer | live.StateLayer, ...]
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
        self.grad_mode = _grad_mode()

    def end(self) -> None:
        pass


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
        EngineError: the model keeps its keys and values in something else than a `Cache`, or keeps none; or what it
            predicts is no number, by which it chooses tokens all the same.
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
        output = generate(**inputs, **arguments, streamer=witness, return_dict_in_generate=True, output_logits=True)
    require_numbers(output.logits, model.dtype)
    cache = cache_of(output)
    if cache is None:
        raise EngineError("unsupported", "this architecture hands back no cache that could prove what ran")
    return Seen(
        cache=type(cache).__name__,
        layers=tuple(live.layer_of(layer) for layer in cache.layers),
        pool=None,
        offloads=bool(cache.offloading),
        prompt_tokens=prompt.shape[1],
        prefill_calls=witness.calls_for(prompt.shape[1]),
        attention=str(model.config._attn_implementation),
        kernels=kernels_of((event.key for event in profiler.key_averages()), model.config._attn_implementation),
        grad_mode=witness.grad_mode,
        **_of_the_model(model, graphs_before),
    )


def _observe_batch(
    model: PreTrainedModel, prompt: torch.Tensor, arguments: Mapping[str, Any], graphs_before: int
) -> Seen:
    # It all happens in a thread of its own.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with (
        batching.watched(model) as watch,
        _forward_modes(model) as modes,
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
        kernels=kernels_of((event.key for event in profiler.key_averages()), watch.pool.attention),
        grad_mode=" and ".join(sorted(modes)) or "unknown",
        **_of_the_model(model, graphs_before),
    )


def require_numbers(predicted: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse a model that chooses by what is no number.

    Args:
        predicted: of each step, any shape × vocabulary; an impossible token is minus infinity.
        dtype: of the model.

    Raises:
        EngineError: nothing is possible in a step, or something is undefined.
    """
    if not all(bool(step.amax(dim=-1).isfinite().all()) for step in predicted):
        name = str(dtype).removeprefix("torch.")
        reason = f"in {name} the model predicts what is no number; try another dtype, or mend its weights"
        raise EngineError("unsupported", reason)


def _of_the_model(model: PreTrainedModel, graphs_before: int) -> dict[str, Any]:
    """What is read back alike whoever keeps the keys and values; fields of `Seen` of the same names."""
    return {
        "dtypes": live.dtypes_by_bytes(model),
        "packed_by": packed_by(model),
        "devices": live.names_of(parameter.device for parameter in model.parameters()),
        "spread": live.spread(model),
        "strays": live.strays(model),
        "threads": torch.get_num_threads(),
        "compile": live.compile_mode(model),
        "graphs": live.compiled_graphs() - graphs_before,
    }


@contextmanager
def _forward_modes(model: PreTrainedModel) -> Iterator[set[str]]:
    """The gradient modes of all forward calls in the block, each seen in the thread of its call."""
    modes: set[str] = set()
    hook = model.register_forward_pre_hook(lambda *_: modes.add(_grad_mode()))
    try:
        yield modes
    finally:
        hook.remove()


def _grad_mode() -> str:
    """That of the calling thread."""
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    return "grad" if torch.is_grad_enabled() else "no_grad"


def _activities(device: torch.device) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def kernels_of(operators: Iterable[str], attention: str) -> tuple[str, ...]:
    """Attention kernels behind the names of a profile, in which those of a device are beside the operators."""
    # SDPA calls some of what xFormers calls, inside operators of its own.
    known = (*_KERNELS, *(_XFORMERS if attention == "xformers" else ()))
    parts = FLASH_PARTS.get(attention, ())
    found = set()
    for name in operators:
        plain = name.removeprefix("aten::")
        found |= {kernel for start, kernel in known if plain.startswith(start)}
        found |= {attention.upper() for part in parts if part in name}
    return tuple(sorted(found))
