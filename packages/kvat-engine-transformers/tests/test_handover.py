"""The code that users take over, called as users may call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache, TextStreamer

from kvat_core.schema import Recipe
from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.calling.kept import cache_of
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.settings.recipes import STEP_TOKENS

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
IDS = torch.arange(24, 48).reshape(2, 12)


@pytest.fixture
def handed_over(prepared: Prepared) -> Callable[..., tuple[Any, PreTrainedModel]]:
    """The module that a user would import, and a model to call it with."""

    def make(model_id: str = "builtin:llama", **settings: str) -> tuple[Any, PreTrainedModel]:
        adapter, made = prepared(model_id, **settings)
        return handover.imported(made, STEP_TOKENS), adapter.model

    return make


HandedOver = Callable[..., tuple[Any, PreTrainedModel]]


def said_by(code: Any) -> str:
    """The docstring, however its lines are broken."""
    return " ".join(code.generate.__doc__.split())


def test_what_a_generation_config_sets_comes_before_what_was_measured(handed_over: HandedOver) -> None:
    code, model = handed_over(cache="dynamic")
    asked = GenerationConfig(cache_implementation="static", return_dict_in_generate=True, max_new_tokens=9)
    output = code.generate(model, IDS, 3, generation_config=asked)
    assert isinstance(cache_of(output), StaticCache)
    # The number of tokens is said by whoever calls.
    assert output.sequences.shape == (2, 12 + 3)


@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
def test_padding_without_a_mask_is_found_as_generate_finds_it(handed_over: HandedOver, cache: str) -> None:
    code, model = handed_over(cache=cache)
    padded = IDS.clone()
    padded[0, :4] = model.generation_config.pad_token_id
    expected = model.generate(padded, max_new_tokens=5, do_sample=False, eos_token_id=None)
    whole = torch.ones_like(padded)
    assert not torch.equal(expected, code.generate(model, padded, 5, eos_token_id=None, attention_mask=whole))
    assert torch.equal(expected, code.generate(model, padded, 5, eos_token_id=None))


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_math"])
def test_ids_from_inference_mode_are_the_callers_to_change(handed_over: HandedOver, attention: str) -> None:
    code, model = handed_over(grad_mode="inference_mode", attention=attention)
    output = code.generate(model, IDS, 3)
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(output, expected)
    output[:, 0] = 0
    assert torch.equal(output[:, 1:], expected[:, 1:])


@pytest.mark.parametrize(
    "options",
    [{"return_dict_in_generate": True}, {"generation_config": GenerationConfig(return_dict_in_generate=True)}],
    ids=["by name", "in a config"],
)
def test_a_cache_that_is_handed_back_is_of_use_outside_the_call(
    handed_over: HandedOver, options: dict[str, object]
) -> None:
    code, model = handed_over(grad_mode="inference_mode", cache="static")
    output = code.generate(model, IDS, 3, **options)
    cache = cache_of(output)
    assert cache is not None
    # As the next token would change it.
    cache.layers[0].keys[:, :, -1] = 1


@pytest.mark.parametrize(
    ("settings", "sticky", "compiles"),
    [
        ({"cache": "dynamic"}, False, False),
        ({"cache": "static"}, True, False),
        ({"cache": "static", "compile": "default"}, True, True),
    ],
    ids=str,
)
def test_the_code_says_what_a_static_cache_keeps(
    handed_over: HandedOver, settings: dict[str, str], sticky: bool, compiles: bool
) -> None:
    code, _ = handed_over(**settings)
    assert ("no static cache shorter than the longest one" in said_by(code)) == sticky
    assert ("The first call compiles" in said_by(code)) == compiles


@pytest.mark.uses("paged")
@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 4},
        {"repetition_penalty": 1.5},
        {"return_dict_in_generate": True},
        {"stopping_criteria": []},
        {"logits_processor": LogitsProcessorList()},
        {"generation_config": GenerationConfig(do_sample=True)},
        {"streamer": TextStreamer},
        {"do_smaple": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_batch_refuses_what_it_would_leave_out(handed_over: HandedOver, option: dict[str, object]) -> None:
    code, model = handed_over(cache="paged")
    (name,) = option
    message = f"^generate_batch does not serve {name}; leave it out, or call model.generate$"
    with pytest.raises(TypeError, match=message):
        code.generate(model, IDS, 3, do_sample=True, **option)


@pytest.mark.uses("paged")
@pytest.mark.parametrize(
    ("habit", "lacking"),
    [
        ({"repetition_penalty": 1.3}, "generate_batch has no RepetitionPenaltyLogitsProcessor"),
        ({"max_time": 1.0}, "generate_batch does not stop by max_time"),
    ],
)
def test_a_batch_refuses_what_it_would_leave_out_of_the_models_habits(
    handed_over: HandedOver, monkeypatch: pytest.MonkeyPatch, habit: dict[str, Any], lacking: str
) -> None:
    code, model = handed_over(cache="paged")
    own = GenerationConfig(**{**model.generation_config.to_dict(), **habit})
    monkeypatch.setattr(model, "generation_config", own)
    with pytest.raises(ValueError, match=lacking):
        code.generate(model, IDS, 3)


@pytest.mark.uses("paged")
def test_a_batch_refuses_a_prompt_without_a_token(handed_over: HandedOver) -> None:
    code, model = handed_over(cache="paged")
    filler = IDS.clone()
    filler[1] = model.generation_config.pad_token_id
    with pytest.raises(ValueError, match="a prompt has no token"):
        code.generate(model, filler, 3)


@pytest.mark.uses("paged")
def test_a_batch_samples_from_what_generate_samples_from(
    handed_over: HandedOver, processors_of: Callable[[Any], list[Any]]
) -> None:
    code, model = handed_over(cache="paged")
    seen = processors_of(model)
    for options in ({}, {"top_k": 5, "temperature": 0.5}, {"top_k": None, "top_p": 0.5}):
        model.generate(IDS, max_new_tokens=2, do_sample=True, **options)
        code.generate(model, IDS, 2, do_sample=True, **options)
        by_generate, *by_batch = seen
        assert by_generate
        assert by_batch
        assert all(one == by_generate for one in by_batch)
        seen.clear()


@pytest.mark.uses("paged")
def test_a_batch_that_nothing_is_to_end_goes_on(handed_over: HandedOver, tiny_directory: Any) -> None:
    # Every token of this model is an end-of-sequence token.
    code, model = handed_over(str(tiny_directory), cache="paged", dtype="bfloat16")
    assert code.generate(model, IDS, 4).shape == (2, 12 + 1)
    assert code.generate(model, IDS, 4, eos_token_id=None).shape == (2, 12 + 4)
