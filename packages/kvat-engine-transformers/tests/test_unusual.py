"""Architectures that are not like Llama: layers without keys, no SDPA, no attention at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2PreTrainedModel

from kvat_core import metrics
from kvat_core.engine import EngineError
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter, TransformersEngine

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
    prompt = adapter.make_prompt(TEXT, 48, 1, 1)
    applied = adapter.applied(prompt)
    assert applied.mismatches == ()
    assert applied.values["layers"] == ["LinearAttentionLayer", f"{kept} float32 cpu"]
    assert metrics.invalid_reason(adapter.run_decode(prompt, 6), SCENARIO) is None


def test_an_architecture_without_sdpa_says_what_to_do(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older versions of transformers still load it with SDPA.
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", False)
    model_id = saved(tmp_path, "gemma2", sliding_window=32)
    with pytest.raises(EngineError, match="--set attention=eager") as caught:
        prepared(model_id, SCENARIO, attention="sdpa")
    assert caught.value.kind == "unsupported"
    adapter, _ = prepared(model_id, SCENARIO, attention="eager")
    assert adapter.applied(adapter.make_prompt(TEXT, 48, 1, 1)).mismatches == ()


def test_a_model_without_attention_has_nothing_to_tune(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=512, hidden_size=64, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no attention"):
        TransformersEngine().describe(ModelRef(id=str(tmp_path)), "cpu")
