"""A recipe carried out for a caller who has wishes of their own, on a model that is loaded already."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import QuantizedLayer
from transformers.generation.configuration_utils import GenerationMode

from kvat_core.engine import EngineError
from kvat_core.schema import Recipe
from kvat_engine_transformers.calling import actions, batching, leftovers, registration
from kvat_engine_transformers.calling.failures import translated
from kvat_engine_transformers.calling.rows import joined, seen
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.recipes import SERVED_IN_BATCHES

_OF_A_BATCH = ("attention_mask", "max_new_tokens", *SERVED_IN_BATCHES)
"""Options of `generate` that a call by `generate_batch` takes, too."""

_USUAL_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
"""Decoding in which one forward call gives the next token of each sequence, or of each beam."""


class NotBegun(EngineError):
    """A call cannot be made by a recipe, and nothing was generated."""

    def __init__(self, reason: str) -> None:
        super().__init__("unsupported", reason)


def carry_out(
    recipe: Recipe,
    model: PreTrainedModel,
    generate: Callable[..., Any],
    input_ids: torch.Tensor,
    new_tokens: int,
    options: Mapping[str, Any],
    leave: tuple[str, ...],
) -> Any:
    """One call by a recipe; what `model.generate` returns.

    Args:
        recipe: for this prompt length, batch size and number of tokens.
        model: its attention, and the process's threads, are what they were afterwards.
        generate: its own method.
        input_ids: one row per prompt.
        new_tokens: at most, per prompt; as the options say, or what they mean by saying nothing.
        options: of the caller, which come before what was measured.
        leave: arguments of the recipe that are the caller's business.

    Raises:
        NotBegun: it cannot be done with this model or these options.
        EngineError: it failed in a known way.
    """
    if not recipe.compiles:
        # A compiled one keeps the longest length, since another one would be compiled anew.
        leftovers.forget_length(model)
    measured = {name: value for name, value in actions.arguments(recipe).items() if name not in leave}
    asked = _effective(model, measured, options)
    _require_reordering(asked)
    if asked.return_dict_in_generate:
        recipe = _without_inference_mode(recipe)
    with translated(), _switched(model, recipe), actions.entered(recipe):
        if recipe.call == "generate_batch":
            return _generate_batch(model, input_ids, {**measured, "max_new_tokens": new_tokens}, options)
        if recipe.call != "generate":
            raise NotBegun(f"this kvat-engine-transformers cannot call {recipe.call} for a plan")
        output = generate(input_ids=input_ids, **merged(model, measured, options))
    # What comes of inference mode cannot be changed in place outside of it; a copy can.
    return output.clone() if isinstance(output, torch.Tensor) else output


def new_tokens(model: PreTrainedModel, prompt_tokens: int, options: Mapping[str, Any]) -> int:
    """Tokens that a call of `generate` asks for, found in the order in which Transformers looks."""
    asked = options.get("generation_config")
    sources = (options, {} if asked is None else vars(asked), vars(model.generation_config))
    counts = (source.get("max_new_tokens") for source in sources)
    lengths = (source["max_length"] - prompt_tokens for source in sources if source.get("max_length") is not None)
    default = model.generation_config._get_default_generation_params()["max_length"]
    return int(next((count for count in counts if count is not None), next(lengths, default)))


def decodes_otherwise(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether a call asks for assisted or custom decoding, which has a cache and an order of calls of its own."""
    custom = options.get("custom_generate") is not None
    mode = _effective(model, {}, options).get_generation_mode(options.get("assistant_model"))
    return custom or mode not in _USUAL_MODES


def merged(model: PreTrainedModel, measured: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`: what was measured, beneath what the caller asks for by name or in a `generation_config`.

    Args:
        model: whose own generation_config comes last.
        measured: by name.
        options: of the caller.
    """
    if options.get("generation_config") is None:
        return {**measured, **options}
    config = copy.deepcopy(options["generation_config"])
    beneath = {name: value for name, value in measured.items() if getattr(config, name, None) is None}
    for name, value in beneath.items():
        setattr(config, name, value)
    # None in a config leaves it to the model's own, and only an argument of that name does not.
    own = vars(model.generation_config)
    off = {name: None for name, value in beneath.items() if value is None and own.get(name) is not None}
    return {**off, **options, "generation_config": config}


def _effective(model: PreTrainedModel, measured: Mapping[str, Any], options: Mapping[str, Any]) -> GenerationConfig:
    """What a call comes to: the model's own habits, above them what was measured, and what the caller asks for."""
    config, asked = copy.deepcopy(model.generation_config), options.get("generation_config")
    for source in (measured, {} if asked is None else vars(asked), options):
        for name, value in source.items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    return config


def _require_reordering(asked: GenerationConfig) -> None:
    """Refuse beams with a quantised cache where Transformers, as 5.17 does, reorders only what is not quantised yet."""
    quantised, beams = asked.cache_implementation == "quantized", (asked.num_beams or 1) > 1
    if quantised and beams and "reorder_cache" not in vars(QuantizedLayer):
        raise NotBegun("this version of transformers cannot reorder a quantised cache, as beams need it")


def _without_inference_mode(recipe: Recipe) -> Recipe:
    """The same in the mode of `generate` itself, so that a cache that is handed back is of use outside the call."""
    others = tuple(call for call in recipe.context if call.name != "torch.inference_mode")
    return recipe.model_copy(update={"context": others})


@contextmanager
def _switched(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """The recipe's attention and threads, for as long as the block."""
    attention, threads = model.config._attn_implementation, torch.get_num_threads()
    try:
        _attend_by(model, reading.loaded_attention(recipe))
        torch.set_num_threads(reading.threads(recipe) or threads)
        yield
    finally:
        torch.set_num_threads(threads)
        _attend_by(model, str(attention))


def _attend_by(model: PreTrainedModel, attention: str) -> None:
    if model.config._attn_implementation == attention:
        return
    registration.register(attention)
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise NotBegun(f"this model cannot attend by {attention}") from error
    if model.config._attn_implementation != attention:
        raise NotBegun(f"the attention of a loaded {type(model).__name__} cannot be changed")


def _generate_batch(
    model: PreTrainedModel, input_ids: torch.Tensor, measured: Mapping[str, Any], options: Mapping[str, Any]
) -> torch.Tensor:
    """Rows as `generate` returns them: the prompt as it was given, what follows it, padding up to the longest one."""
    # What is said of choosing counts even where it is None, as with generate.
    asked = {name: value for name, value in options.items() if value is not None or name in SERVED_IN_BATCHES}
    if strange := next((name for name in asked if name not in _OF_A_BATCH), None):
        raise NotBegun(f"generate_batch takes no {strange}")
    if model.generation_config.return_dict_in_generate:
        raise NotBegun("generate_batch hands back tokens alone, and the generation_config has return_dict_in_generate")
    mask = asked.pop("attention_mask", None)
    if "eos_token_id" in asked and asked["eos_token_id"] is None:
        asked["eos_token_id"] = batching.NO_END_OF_SEQUENCE
    arguments = {**measured, **asked}
    if arguments["max_new_tokens"] < 1:
        raise NotBegun(f"generate_batch cannot generate {arguments['max_new_tokens']} tokens")
    if (reason := batching.unserved(model, arguments)) is not None:
        raise NotBegun(reason)
    real = seen(input_ids, model.generation_config, dict(options)) if mask is None else mask
    rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, real, strict=True)]
    if not all(rows):
        raise NotBegun("generate_batch takes no prompt without a token")
    answers = [request.output_ids for request in batching.generate(model, rows, arguments)]
    return joined(input_ids, answers, model.generation_config, dict(options))
