"""What a model's generation_config.json makes of a plan, and what is said not to fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from kvat_core import Plan, Scenario, config_change
from kvat_core.errors import UsageError
from kvat_engine_transformers import TransformersEngine, builtin_path
from kvat_engine_transformers.calling.kept import cache_of

MakePlan = Callable[..., Plan]
IDS = torch.arange(5, 17).reshape(1, 12)
OWN_THREADS = {"threads": "own"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model whose config says float32."""
    return Path(shutil.copytree(builtin_path("llama"), tmp_path / "model"))


@pytest.mark.parametrize(
    ("settings", "kind", "arguments"),
    [
        ({}, "DynamicCache", {"use_cache": True}),
        ({"cache": "static"}, "StaticCache", {"cache_implementation": "static", "disable_compile": True}),
        ({"prefill_chunk": "128"}, "DynamicCache", {"prefill_chunk_size": 128}),
    ],
)
def test_from_pretrained_generates_with_the_winners_cache(
    make_plan: MakePlan, directory: Path, settings: Mapping[str, str], kind: str, arguments: Mapping[str, Any]
) -> None:
    plan = make_plan({"winner": {**settings, **OWN_THREADS}})
    scenarios = (Scenario(prompt_tokens=16, output_tokens=4), Scenario(prompt_tokens=256, output_tokens=4))
    change = config_change(
        plan.model_copy(update={"profile": plan.profile.model_copy(update={"scenarios": scenarios})}), directory
    )
    assert change.lost == ()
    change.write()
    read = GenerationConfig.from_pretrained(directory)
    assert arguments.items() <= read.to_dict().items()
    model = AutoModelForCausalLM.from_pretrained(directory)
    output = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, eos_token_id=None)
    assert type(cache_of(output)).__name__ == kind
    longer = model.generate(IDS.repeat(1, 20), max_new_tokens=3, eos_token_id=None)
    assert longer.shape == (1, 243)


def test_calls_may_still_bring_a_cache_of_their_own(make_plan: MakePlan, directory: Path) -> None:
    def generated(**options: Any) -> int:
        model, cache = AutoModelForCausalLM.from_pretrained(directory), DynamicCache()
        model.generate(IDS, past_key_values=cache, max_new_tokens=3, eos_token_id=None, **options)
        return int(cache.get_seq_length())

    static = config_change(make_plan({"winner": {"cache": "static"}}), directory)
    static.write()
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        generated()
    assert any(line.startswith("cache_implementation is to be None in a call that brings") for line in static.left)
    assert generated(cache_implementation=None) == 14
    config_change(make_plan({"winner": {}}), directory).write()
    assert generated() == 14


def test_options_of_a_cache_are_carried(make_plan: MakePlan, directory: Path) -> None:
    plan = make_plan({"winner": {"cache": "hqq_int4", "residual_length": "32", **OWN_THREADS}})
    config_change(plan, directory).write()
    options = GenerationConfig.from_pretrained(directory).cache_config
    assert (options["backend"], options["nbits"], options["residual_length"]) == ("hqq", 4, 32)


def test_what_a_directory_says_of_other_things_stays(make_plan: MakePlan, directory: Path) -> None:
    path = directory / "generation_config.json"
    before = {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "temperature": 0.6,
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto"},
        "max_cache_len": 99,
    }
    path.write_text(json.dumps(before))
    change = config_change(make_plan({"winner": {"cache": "static", **OWN_THREADS}}), directory)
    assert json.loads(path.read_text()) == before
    change.write()
    assert json.loads(path.read_text()) == {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "temperature": 0.6,
        "use_cache": True,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    assert change.changes == (
        'cache_implementation was "quantized", is "static"',
        'cache_config was {"backend": "quanto"}, is taken out',
        "max_cache_len was 99, is taken out",
    )
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({"threads": "2"}, ["threads=2, for torch.set_num_threads", "OMP_NUM_THREADS=2, an environment variable"]),
        ({"dtype": "bfloat16"}, ["dtype=bfloat16, for from_pretrained"]),
        ({"attention": "eager"}, ["attn_implementation=eager, for from_pretrained"]),
        ({"attention": "sdpa_math"}, ["torch.nn.attention.sdpa_kernel(MATH), a context around generate"]),
        ({"grad_mode": "inference_mode"}, ["torch.inference_mode(), a context around generate"]),
        (
            {"cache": "static", "compile": "default"},
            ['compile_config={"mode": "default", "_compile_all_devices": true}, an argument of generate'],
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make_plan: MakePlan, directory: Path, settings: Mapping[str, str], lost: list[str]
) -> None:
    plan = make_plan({"winner": {**OWN_THREADS, **settings}, "default": OWN_THREADS})
    assert list(config_change(plan, directory).lost) == lost


def test_attention_that_a_model_has_by_itself_is_not_asked_for(make_plan: MakePlan, directory: Path) -> None:
    eager = {"attention": "eager", **OWN_THREADS}
    assert config_change(make_plan({"default": eager}), directory).lost == ()
    chosen = config_change(make_plan({"attention=eager": eager}), directory)
    assert chosen.lost == ("attn_implementation=eager, for from_pretrained",)


def test_without_a_config_the_dtype_has_to_be_asked_for(make_plan: MakePlan, tmp_path: Path) -> None:
    change = config_change(make_plan({"winner": OWN_THREADS}), tmp_path)
    assert change.lost == ("dtype=float32, for from_pretrained",)


def test_lengths_are_left_to_each_call(make_plan: MakePlan, directory: Path) -> None:
    static = config_change(make_plan({"winner": {"cache": "static"}}), directory)
    assert "max_cache_len" not in json.loads(static.text)
    assert "max_new_tokens" not in json.loads(static.text)
    names = [line.split()[0] for line in static.left]
    assert names == ["max_new_tokens", "do_sample", "cache_implementation", "max_cache_len"]
    dynamic = config_change(make_plan({"winner": {}}), directory)
    assert [line.split()[0] for line in dynamic.left] == ["max_new_tokens", "do_sample"]


def test_a_winner_that_is_called_otherwise_fits_no_file(make_plan: MakePlan, directory: Path) -> None:
    with pytest.raises(UsageError, match="the winner runs by generate_batch, which takes no defaults from"):
        config_change(make_plan({"winner": {"cache": "paged"}}), directory)


def test_settings_that_nobody_knows_fit_no_file(make_plan: MakePlan, directory: Path) -> None:
    with pytest.raises(UsageError, match="does not know cache=cloud"):
        TransformersEngine().config_file(make_plan({"winner": {"cache": "cloud"}}), directory)
