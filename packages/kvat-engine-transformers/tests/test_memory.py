"""What a live cache holds, to the byte, is what the model's shape says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    MambaConfig,
    cache_utils,
)

from kvat_core.schema import PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter, builtin_path
from kvat_engine_transformers.calling.kept import cache_of
from kvat_engine_transformers.measuring import memory

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
ELEMENT_BYTES = 4

# keys and values, layers, KV heads, head dimension, bytes of a float32
PER_TOKEN = 2 * 3 * 2 * 32 * ELEMENT_BYTES


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("model_id", "window"), [("builtin:llama", None), ("builtin:mistral", 512)])
@pytest.mark.parametrize("prompt_tokens", [48, 510, 800])
def test_a_cache_holds_exactly_what_its_shape_says(
    prepared: Prepared, model_id: str, window: int | None, cache: str, batch_size: int, prompt_tokens: int
) -> None:
    scenario = Scenario(prompt_tokens=prompt_tokens, output_tokens=6, batch_size=batch_size)
    adapter, _ = prepared(model_id, scenario, cache=cache)
    adapter.run_decode(adapter.make_prompt(TEXT, [prompt_tokens] * batch_size, 1), 6)
    found = adapter.measure_resources()
    # Six tokens come out, and the last of them is never stored.
    slots = scenario.total_tokens if cache == "static" else scenario.total_tokens - 1
    held = slots if window is None else min(slots, window)
    assert found.kv_cache_bytes == held * batch_size * PER_TOKEN
    assert found.kv_cache_predicted_bytes == found.kv_cache_bytes


@pytest.mark.parametrize("steps", [5, 40, 127, 128, 150])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "quanto", "nbits": 4},
        {"backend": "quanto", "nbits": 2, "q_group_size": 32},
        {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 16},
        {"backend": "fp8"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_quantised_cache_holds_what_its_shape_says_within_five_percent(options: dict[str, Any], steps: int) -> None:
    if options["backend"] == "quanto":
        pytest.importorskip("optimum.quanto")
    elif not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this Transformers has no fp8 cache")
    prompt_tokens = 256
    # A copy, because some versions of the library take things out of it.
    arguments = {"cache_implementation": "quantized", "cache_config": dict(options)}
    model: Any = AutoModelForCausalLM.from_pretrained(builtin_path("llama"))
    prompt = torch.arange(10, 10 + prompt_tokens).remainder(200)[None]
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=steps + 1,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        **arguments,
    )
    predicted = memory.predicted_cache_bytes(
        model.config,
        arguments,
        prompt_tokens=prompt_tokens,
        output_tokens=steps + 1,
        batch_size=1,
        element_bytes=ELEMENT_BYTES,
    )
    assert memory.cache_bytes(cache_of(output)) == pytest.approx(predicted, rel=0.05)
    unquantised = (prompt_tokens + steps) * PER_TOKEN
    assert predicted is not None
    assert predicted < 0.65 * unquantised


@pytest.mark.parametrize(
    "config", [MambaConfig(), DeepseekV3Config(num_hidden_layers=2)], ids=lambda one: one.model_type
)
def test_of_what_is_no_plain_cache_there_is_no_prediction(config: Any) -> None:
    arguments = {"cache_implementation": "dynamic"}
    size = {"prompt_tokens": 8, "output_tokens": 2, "batch_size": 1, "element_bytes": 4}
    assert memory.predicted_cache_bytes(config, arguments, **size) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be reset elsewhere")
def test_loading_is_no_part_of_the_peak() -> None:
    load = bytearray(b"x" * (300 << 20))
    while_loading = memory.peak_host_bytes()
    del load
    memory.start_peaks(torch.device("cpu"))
    assert memory.peak_host_bytes() < while_loading - (200 << 20)


def test_a_peak_is_that_of_the_candidate_and_not_of_the_one_before(prepared: Prepared) -> None:
    peaks = []
    for prompt_tokens in (1500, 48):
        scenario = Scenario(prompt_tokens=prompt_tokens, output_tokens=3, batch_size=4)
        adapter, _ = prepared("builtin:llama", scenario, attention="eager")
        adapter.run_decode(adapter.make_prompt(TEXT, [prompt_tokens] * 4, 1), 3)
        found = adapter.measure_resources()
        assert found.peak_host_bytes is not None
        assert found.ready_host_bytes is not None
        peaks.append(found.peak_host_bytes - found.ready_host_bytes)
    long, short = peaks
    # Eager attention computes the scores of all pairs of positions at once.
    assert long > 4 * 1500 * 1500 * 4
    assert short < long / 4


@pytest.mark.parametrize(
    "config",
    [Gemma4TextConfig(), FalconConfig(multi_query=True), Gemma3nTextConfig()],
    ids=["sizes per layer", "one head by a rule of its own", "layers that share keys"],
)
def test_of_a_shape_that_does_not_tell_there_is_no_prediction(config: Any) -> None:
    arguments = {"cache_implementation": "dynamic"}
    size = {"prompt_tokens": 8, "output_tokens": 2, "batch_size": 1, "element_bytes": 4}
    assert memory.predicted_cache_bytes(config, arguments, **size) is None
