"""Every safe candidate on the CPU: exact counts, proven settings, right answers, no state left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvat_core import metrics
from kvat_core.engine import EngineError
from kvat_core.schema import ModelRef, PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter, TransformersEngine, builtin_path
from kvat_engine_transformers.calling import actions
from kvat_engine_transformers.model.recall import build_example, recall
from kvat_engine_transformers.proving import live, observation, proof
from kvat_engine_transformers.settings.knobs import PLAIN

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
SCENARIO = Scenario(prompt_tokens=48, output_tokens=6)
DEFAULTS = {"cache": "dynamic", "compile": "off", "grad_mode": "no_grad", "threads": "1"}
ATTENTION = ("sdpa", "eager", "sdpa_math", "sdpa_flash")
WINDOW = 512

safe = pytest.mark.parametrize("attention", ATTENTION)
caches = pytest.mark.parametrize("cache", ["dynamic", "static"])
models = pytest.mark.parametrize("model_id", ["builtin:llama", "builtin:mistral"])


def prompt(adapter: TransformersAdapter, scenario: Scenario = SCENARIO, nonce: int = 1) -> torch.Tensor:
    return adapter.make_prompt(TEXT, scenario.prompt_lengths, nonce)


@models
@safe
@caches
def test_a_candidate_runs_as_its_recipe_says(prepared: Prepared, model_id: str, attention: str, cache: str) -> None:
    adapter, _ = prepared(model_id, attention=attention, cache=cache)
    applied = adapter.applied(prompt(adapter))
    assert applied.mismatches == ()
    timeline = adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    assert metrics.invalid_reason(timeline, SCENARIO) is None
    kernels = {"sdpa": ["FLASH_ATTENTION"], "sdpa_math": ["MATH"], "sdpa_flash": ["FLASH_ATTENTION"], "eager": []}
    assert applied.values["kernels"] == kernels[attention]


@caches
@safe
@models
def test_no_candidate_forgets(prepared: Prepared, model_id: str, attention: str, cache: str) -> None:
    window = WINDOW if model_id == "builtin:mistral" else None
    examples = [build_example(Random(seed), length=1024, pairs=24, answers=8, window=window) for seed in range(13)]
    tokens = len(examples[0].prompt)
    adapter, _ = prepared(model_id, Scenario(prompt_tokens=tokens, output_tokens=16), attention=attention, cache=cache)

    def generate(ids: Sequence[int], count: int) -> list[int]:
        return adapter.generate(torch.tensor([ids]), count).tokens[0, len(ids) :].tolist()

    assert recall(generate, examples) >= 0.99


def test_sdpa_of_the_cpu_is_flash_and_everything_else_differs(prepared: Prepared) -> None:
    seen = {}
    for attention in ATTENTION:
        for cache in ("dynamic", "static"):
            adapter, _ = prepared("builtin:llama", attention=attention, cache=cache)
            seen[attention, cache] = adapter.applied(prompt(adapter)).values
    distinct = [values for index, values in enumerate(seen.values()) if values not in list(seen.values())[:index]]
    assert len(distinct) == 6
    assert seen["sdpa", "static"] == seen["sdpa_flash", "static"]


def test_inference_mode_is_seen_from_inside(prepared: Prepared) -> None:
    for mode in ("no_grad", "inference_mode"):
        adapter, _ = prepared("builtin:llama", grad_mode=mode)
        applied = adapter.applied(prompt(adapter))
        assert applied.mismatches == ()
        assert applied.values["grad_mode"] == mode


def test_a_static_cache_has_exactly_the_scenarios_slots_whatever_ran_before(prepared: Prepared) -> None:
    for total in (200, 54, 120):
        scenario = Scenario(prompt_tokens=total - 6, output_tokens=6)
        adapter, _ = prepared("builtin:llama", scenario, cache="static")
        layers = adapter.applied(prompt(adapter, scenario)).values["layers"]
        assert layers == [f"StaticLayer[{total}] float32 cpu"] * 3


def test_the_sliding_cache_keeps_its_window(prepared: Prepared) -> None:
    scenario = Scenario(prompt_tokens=800, output_tokens=6)
    found = {}
    for cache in ("dynamic", "static"):
        adapter, _ = prepared("builtin:mistral", scenario, cache=cache)
        applied = adapter.applied(prompt(adapter, scenario))
        assert applied.mismatches == ()
        found[cache] = applied.values["layers"]
    assert found["static"] == [f"StaticSlidingWindowLayer[{WINDOW}] float32 cpu"] * 3
    assert found["dynamic"] == [f"DynamicSlidingWindowLayer[{WINDOW - 1}] float32 cpu"] * 3


def test_a_candidate_after_another_is_as_a_candidate_alone(prepared: Prepared) -> None:
    def observe(cache: str) -> tuple[object, list[int]]:
        adapter, _ = prepared("builtin:llama", cache=cache)
        applied = adapter.applied(prompt(adapter))
        return applied.values, adapter.generate(prompt(adapter), 6).tokens.tolist()

    alone = observe("static")
    long = Scenario(prompt_tokens=500, output_tokens=6)
    adapter, _ = prepared("builtin:llama", long, cache="static")
    adapter.run_decode(prompt(adapter, long), 6)
    assert observe("static") == alone


def test_the_end_of_a_sequence_ends_no_timed_call(prepared: Prepared, tiny_directory: Path) -> None:
    # Every token of this model is an end-of-sequence token.
    adapter, _ = prepared(str(tiny_directory), dtype="bfloat16")
    assert metrics.invalid_reason(adapter.run_decode(prompt(adapter), 6), SCENARIO) is None


@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_predicts_no_numbers_proves_nothing(
    prepared: Prepared, tiny_directory: Path, tmp_path: Path, cache: str, value: float
) -> None:
    # It chooses tokens all the same, and as its own reference it is exact.
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    model.model.norm.weight.data[0] = value
    model.save_pretrained(tmp_path)
    adapter, _ = prepared(str(tmp_path), dtype="bfloat16", cache=cache)
    assert adapter.generate(prompt(adapter), 6).tokens.shape == (1, 48 + 6)
    with pytest.raises(EngineError, match=r"^in bfloat16 the model predicts what is no number") as caught:
        adapter.applied(prompt(adapter))
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("habit", [{"do_sample": True, "temperature": 0.5}, {"num_beams": 3}, {"use_cache": False}])
def test_a_models_own_habits_do_not_change_what_is_measured(
    prepared: Prepared, tmp_path: Path, habit: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(builtin_path("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps(habit))
    adapter, _ = prepared(str(folder))
    assert adapter.applied(prompt(adapter)).mismatches == ()
    once, again = (adapter.generate(prompt(adapter), 6).tokens for _ in range(2))
    assert torch.equal(once, again)


APPLIED = {
    "cache_implementation": "quantized",
    "cache_config": {"backend": "hqq", "nbits": 4},
    "prefill_chunk_size": 16,
    "max_cache_len": 99,
    "disable_compile": True,
}
"""All that an applied plan may have left in a model's generation_config.json, and more."""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache": "static"},
        {"prefill_chunk": "128"},
        {"cache": "paged"},
        pytest.param(
            {"cache": "static", "compile": "default"},
            # Of torch's own, when its compiler is imported.
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")],
        ),
    ],
    ids=str,
)
def test_a_model_to_which_a_plan_has_been_applied_is_measured_as_before(
    prepared: Prepared, tmp_path: Path, settings: dict[str, str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(builtin_path("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps(APPLIED))
    adapter, _ = prepared(str(folder), **settings)
    assert adapter.applied(prompt(adapter)).mismatches == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when its compiler is imported
def test_flex_attention_takes_a_static_cache_exactly_where_that_is_offered(prepared: Prepared) -> None:
    engine = TransformersEngine()
    probe, shape = engine.probe("cpu", {}), engine.describe(ModelRef(id="builtin:llama"), "cpu", {})
    if probe.facts["compile"] is not None:
        pytest.skip(str(probe.facts["compile"]))
    settings = {"attention": "flex_attention", "cache": "static"}
    adapter, made = prepared("builtin:llama", **settings)
    if engine.check({**PLAIN, "dtype": "float32", "threads": "1", **settings}, shape, probe) is None:
        assert adapter.applied(prompt(adapter)).mismatches == ()
    else:
        with pytest.raises(AttributeError, match="contiguous"), actions.entered(made):
            adapter.model.generate(prompt(adapter), **actions.arguments(made))


def test_a_batch_is_measured_as_one(prepared: Prepared) -> None:
    scenario = Scenario(prompt_tokens=48, output_tokens=6, batch_size=3)
    adapter, _ = prepared("builtin:llama", scenario, cache="static")
    made = prompt(adapter, scenario)
    assert made.shape == (3, 48)
    assert len({tuple(row.tolist()) for row in made}) == 3
    assert metrics.invalid_reason(adapter.run_decode(made, 6), scenario) is None


def test_prompts_differ_from_their_first_token_and_repeat_themselves(prepared: Prepared) -> None:
    adapter, _ = prepared("builtin:llama")
    one, same, other = (prompt(adapter, nonce=nonce) for nonce in (1, 1, 2))
    assert torch.equal(one, same)
    assert one[0, :4].tolist() != other[0, :4].tolist()
    assert torch.equal(one[0, 16:], other[0, 16:])
    for tokens in (1, 7, 300):
        assert adapter.make_prompt(TEXT, [tokens], 5).shape == (1, tokens)


def test_a_kernel_that_cannot_run_is_a_failure_and_no_replacement(prepared: Prepared) -> None:
    adapter, _ = prepared("builtin:llama", attention="sdpa_mem_efficient")
    with pytest.raises(EngineError, match="forced attention kernel") as caught:
        adapter.run_decode(prompt(adapter), 6)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("recipe_settings", "ran_settings", "what"),
    [
        ({"cache": "static"}, {"cache": "dynamic"}, "cache"),
        ({"attention": "sdpa_math"}, {"attention": "sdpa"}, "kernel"),
        ({"grad_mode": "inference_mode"}, {"grad_mode": "no_grad"}, "grad mode"),
    ],
)
def test_a_setting_that_did_not_run_is_caught(
    prepared: Prepared, recipe_settings: dict[str, str], ran_settings: dict[str, str], what: str
) -> None:
    _, claimed = prepared("builtin:llama", **recipe_settings)
    adapter, ran = prepared("builtin:llama", **ran_settings)
    options = {**actions.arguments(ran), "max_new_tokens": 3, "eos_token_id": None}
    with actions.entered(ran):
        seen = observation.observe(adapter.model, prompt(adapter), ran, options, live.compiled_graphs())
    assert any(mismatch.startswith(what) for mismatch in proof.compare(seen, claimed).mismatches)
    assert proof.compare(seen, ran).mismatches == ()


def test_sdpa_of_which_no_kernel_ran_is_caught(prepared: Prepared) -> None:
    adapter, ran = prepared("builtin:llama")
    options = {**actions.arguments(ran), "max_new_tokens": 3}
    seen = observation.observe(adapter.model, prompt(adapter), ran, options, live.compiled_graphs())
    (mismatch,) = proof.compare(replace(seen, kernels=()), ran).mismatches
    assert mismatch == "kernel: SDPA was asked for, none of its kernels ran"


@pytest.mark.parametrize(
    ("dtypes", "wrong"),
    [
        (("bfloat16",), False),
        (("bfloat16", "float32"), False),  # some architectures keep a few weights in float32 on purpose
        (("float32", "bfloat16"), True),
        (("float16",), True),
        (("bfloat16", "float16"), True),
    ],
)
def test_weights_are_mostly_in_the_recipes_dtype(prepared: Prepared, dtypes: tuple[str, ...], wrong: bool) -> None:
    adapter, ran = prepared("builtin:llama", dtype="bfloat16")
    options = {**actions.arguments(ran), "max_new_tokens": 3}
    seen = observation.observe(adapter.model, prompt(adapter), ran, options, live.compiled_graphs())
    assert seen.dtypes == ("bfloat16",)
    mismatches = proof.compare(replace(seen, dtypes=dtypes), ran).mismatches
    assert any(mismatch.startswith("weights: the recipe says bfloat16") for mismatch in mismatches) == wrong


def test_slots_that_differ_void_a_timed_call(prepared: Prepared) -> None:
    adapter, _ = prepared("builtin:llama", cache="static")
    adapter.model._previous_max_cache_length = 400
    with pytest.raises(EngineError, match="slots: the recipe says 54") as caught:
        adapter.run_decode(prompt(adapter), 6)
    assert caught.value.kind == "not_applied"


def test_prefill_takes_the_scenarios_slots(prepared: Prepared) -> None:
    adapter, _ = prepared("builtin:llama", cache="static")
    (request,) = adapter.run_prefill(prompt(adapter)).requests
    assert (request.prompt_tokens, request.output_tokens) == (48, 1)
