"""Architectures that are not like Llama: layers without keys, no SDPA, no attention at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma2PreTrainedModel,
)

from kvat_core import Plan, Profile, TuneRequest, metrics, tune
from kvat_core.engine import EngineError, SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, Objective, PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter, TransformersEngine, load_plan
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.settings.recipes import STEP_TOKENS

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
TEXT = PromptSource(kind="text", value="unused, there is no tokenizer")
SCENARIO = Scenario(prompt_tokens=48, output_tokens=6)
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def saved(folder: Path, model_type: str, **changes: Any) -> str:
    config = AutoConfig.for_model(model_type, **{**TINY, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("cache", "kept"), [("dynamic", "DynamicLayer[50]"), ("static", "StaticLayer[54]")])
def test_layers_that_keep_a_state_are_proven_beside_those_with_keys(
    prepared: Prepared, tmp_path: Path, cache: str, kept: str
) -> None:
    model_id = saved(tmp_path, "lfm2", layer_types=["conv", "full_attention"])
    adapter, _ = prepared(model_id, SCENARIO, cache=cache)
    prompt = adapter.make_prompt(TEXT, [48], 1)
    applied = adapter.applied(prompt)
    assert applied.mismatches == ()
    assert applied.values["layers"] == ["LinearAttentionLayer", f"{kept} float32 cpu"]
    assert metrics.invalid_reason(adapter.run_decode(prompt, 6), SCENARIO) is None


def test_what_runs_today_without_sdpa_is_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Older versions of transformers load it with SDPA.
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", False)
    engine = TransformersEngine()
    shape = engine.describe(ModelRef(id=saved(tmp_path, "gemma2", sliding_window=32)), "cpu", {})
    knobs = engine.space(shape, engine.probe("cpu", {}), SpaceRequest(space="safe"))
    attention = next(knob for knob in knobs if knob.name == "attention")
    assert attention.default == "eager"
    can_run = [value.name for value in attention.values if value.unavailable is None]
    assert [name for name in can_run if name == "eager" or name.startswith("sdpa")] == ["eager"]
    refused = attention.value("sdpa_math")
    assert refused is not None
    assert refused.unavailable == "Transformers has no SDPA for the architecture gemma2"


def test_an_eager_only_architecture_is_tuned_as_it_is(tmp_path: Path) -> None:
    profile = Profile(name="quick", scenarios=(SCENARIO,), objective=Objective(ttft=1, decode=1), launches=2, samples=1)
    model_id = saved(tmp_path / "model", "gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=32)
    plan = tune(TuneRequest(model=model_id, out=tmp_path / "out", profile=profile, threads=1)).plan
    assert plan.incumbent.settings["attention"] == "eager"
    assert plan.incumbent.label == "default"
    assert {c.label for c in plan.candidates if c.state == "ok"} == {"default", "cache=static"}


def test_a_head_size_that_differs_by_layer_is_no_prediction(tmp_path: Path) -> None:
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no architecture whose head size differs by layer")
    shape = TransformersEngine().describe(ModelRef(id=saved(tmp_path, "gemma4_text", sliding_window=32)), "cpu", {})
    assert (shape.kv_heads, shape.head_dim) == (2, None)


def test_without_a_cache_to_read_back_nothing_is_proven(prepared: Prepared, tmp_path: Path) -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=512, d_model=64, n_layer=2, n_head=4, d_inner=96)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    adapter, _ = prepared(str(tmp_path), SCENARIO, attention="eager")
    with pytest.raises(EngineError, match="hands back no cache") as caught:
        adapter.applied(adapter.make_prompt(TEXT, [48], 1))
    assert caught.value.kind == "unsupported"


def test_a_model_without_attention_has_nothing_to_tune(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=512, hidden_size=64, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no attention"):
        TransformersEngine().describe(ModelRef(id=str(tmp_path)), "cpu", {})


@pytest.mark.parametrize(
    ("kind", "model_type", "sizes", "refusal"),
    [
        (AutoModelForCausalLM, "mamba", {"hidden_size": 64}, "MambaForCausalLM has no attention"),
        (AutoModelForSeq2SeqLM, "t5", {"d_model": 64, "d_ff": 64}, "T5ForConditionalGeneration is an encoder-decoder"),
        (AutoModelForMaskedLM, "bert", {"hidden_size": 48}, "BertForMaskedLM does not generate text"),
        (AutoModelForCausalLM, "bert", {"hidden_size": 48}, "BertLMHeadModel is an encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_such_a_model_that_is_loaded_already_follows_no_plan(
    make_plan: Callable[..., Plan], kind: Any, model_type: str, sizes: dict[str, int], refusal: str
) -> None:
    model = kind.from_config(AutoConfig.for_model(model_type, vocab_size=64, num_hidden_layers=2, **sizes))
    with pytest.raises(UsageError, match=f"^{refusal}"):
        load_plan(make_plan({"one": {}}), model=model)


@pytest.mark.uses("paged")
@pytest.mark.parametrize(("full", "sliding"), [(4, 22), (5, 29), (1, 5)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pool_of_pages_serves_layers_of_two_kinds_in_any_numbers(
    prepared: Prepared, tmp_path: Path, full: int, sliding: int, batch_size: int
) -> None:
    """The patterns of Gemma 3, whose pool Transformers deals out in sectors for layers of one kind."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * full + ["sliding_attention"] * sliding
    layers = {"num_hidden_layers": full + sliding, "layer_types": kinds[: full + sliding], "sliding_window": 32}
    scenario = SCENARIO.model_copy(update={"batch_size": batch_size})
    adapter, made = prepared(saved(tmp_path, "gemma3_text", **layers), scenario, cache="paged")
    prompt = adapter.make_prompt(TEXT, scenario.prompt_lengths, 1)
    applied = adapter.applied(prompt)
    assert applied.mismatches == ()
    assert metrics.invalid_reason(adapter.run_decode(prompt, 6), scenario) is None
    handed_over = handover.imported(made, STEP_TOKENS)
    assert handed_over.generate(adapter.model, prompt, 6).shape == (batch_size, 54)
