"""The adapter keeps its promises, seen through the doors that kvat uses."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from kvat_core.discovery import load_engine
from kvat_core.engine import EngineAdapter
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, PromptSource, Recipe, Scenario, Target
from kvat_engine_minimal.adapter import generate

SCENARIO = Scenario(prompt_tokens=500, output_tokens=20, batch_size=2)
TEXT = PromptSource(kind="text", value="pack my box with five dozen liquor jugs. ")


def worker(cache: str) -> tuple[EngineAdapter, Recipe]:
    """What kvat does up to the first call, beginning with the entry point."""
    engine = load_engine("minimal")
    recipe = engine.recipe({"cache": cache}, SCENARIO, Target(model=ModelRef(id=engine.own_models[0]), device="cpu"))
    adapter = engine.adapter(Path())
    adapter.load_model(**recipe.load)  # type: ignore[arg-type]
    adapter.prepare_cache(recipe)
    return adapter, recipe


def test_text_goes_on_as_a_similar_passage_did() -> None:
    assert generate(["one two three one two th"], 9, cache="keys").texts == ["ree one t"]


def test_both_caches_write_the_same_text() -> None:
    prompts = ["abracadabra", "a", "hello world, hello"]

    assert generate(prompts, 50, cache="off").texts == generate(prompts, 50, cache="keys").texts


@pytest.mark.parametrize("cache", ["off", "keys"])
def test_counts_and_times_are_those_of_the_scenario(cache: str) -> None:
    adapter, _ = worker(cache)
    prompt = adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, nonce=1)
    timeline = adapter.run_decode(prompt, SCENARIO.output_tokens)

    assert len(timeline.requests) == SCENARIO.batch_size
    for request in timeline.requests:
        assert (request.prompt_tokens, request.output_tokens) == (SCENARIO.prompt_tokens, SCENARIO.output_tokens)
        assert request.token_gaps_s is not None
        assert len(request.token_gaps_s) == SCENARIO.output_tokens - 1
        assert request.e2e_s == pytest.approx(request.ttft_s + sum(request.token_gaps_s))


def test_read_back_tells_the_caches_apart_in_one_process() -> None:
    adapter, off = worker("off")
    _, keys = worker("keys")
    prompt = adapter.make_prompt(TEXT, [100], nonce=1)
    found = []
    for recipe in (off, keys, off):
        adapter.prepare_cache(recipe)
        found.append(adapter.applied(prompt))

    assert [applied.values["cache"] for applied in found] == [["RecomputedKeys"], ["KeptKeys"], ["RecomputedKeys"]]
    assert all(applied.mismatches == () for applied in found)


def test_keeping_keys_decodes_faster() -> None:
    gaps = {}
    for cache in ("off", "keys"):
        adapter, _ = worker(cache)
        request = adapter.run_decode(adapter.make_prompt(TEXT, [500], nonce=1), 20).requests[0]
        gaps[cache] = statistics.median(request.token_gaps_s or ())

    assert gaps["keys"] < gaps["off"]


def test_prompts_differ_by_nonce_from_the_first_letter() -> None:
    adapter, _ = worker("off")

    assert adapter.make_prompt(TEXT, [50] * 2, nonce=7) == adapter.make_prompt(TEXT, [50] * 2, nonce=7)
    assert len({adapter.make_prompt(TEXT, [50], nonce)[0][0] for nonce in range(16)}) == 16


def test_unknown_model_and_device_are_refused() -> None:
    engine = load_engine("minimal")

    with pytest.raises(UsageError, match="use --model minimal:nearest"):
        engine.describe(ModelRef(id="gpt2"), "cpu", {})
    with pytest.raises(UsageError, match="use --device cpu"):
        engine.probe("cuda", {})
