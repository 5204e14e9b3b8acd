"""Prompts and answers as rows of one tensor, beside what Transformers does with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kvat_engine_transformers import builtin_path
from kvat_engine_transformers.calling.rows import seen

IDS = torch.tensor([[0, 0, 5, 2, 6], [2, 7, 8, 9, 4]])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(builtin_path("llama"))
    return model.eval()


def as_generate_does(model: PreTrainedModel, options: Mapping[str, Any]) -> torch.Tensor:
    masks: list[torch.Tensor] = []

    def look(module: Any, arguments: Any, given: Mapping[str, Any]) -> None:
        found = given.get("attention_mask")
        # Some versions hand on none where nothing is masked.
        masks.append(torch.ones_like(IDS) if found is None else found)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(IDS, max_new_tokens=1, do_sample=False, **copy.deepcopy(dict(options)))
    hook.remove()
    return masks[0]


@pytest.mark.parametrize(
    "defaults",
    [
        {"pad_token_id": 0, "eos_token_id": 2},
        {"pad_token_id": 2, "eos_token_id": 2},
        {"pad_token_id": 2, "eos_token_id": [4, 2]},
        {"pad_token_id": 0, "eos_token_id": None},
        {"pad_token_id": None, "eos_token_id": 2},
        {"pad_token_id": None, "eos_token_id": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": None},
        {"eos_token_id": -1},
        {"eos_token_id": [0, 4]},
        {"eos_token_id": torch.tensor([0, 4])},
        {"pad_token_id": 2},
        {"pad_token_id": None},
        {"generation_config": GenerationConfig(pad_token_id=5)},
        {"generation_config": GenerationConfig(eos_token_id=0)},
        {"generation_config": GenerationConfig(pad_token_id=5), "pad_token_id": 2},
    ],
    ids=str,
)
def test_padding_is_found_as_generate_finds_it(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, defaults: dict[str, Any], options: dict[str, Any]
) -> None:
    config = copy.deepcopy(llama.generation_config)
    config.pad_token_id, config.eos_token_id = defaults["pad_token_id"], defaults["eos_token_id"]
    monkeypatch.setattr(llama, "generation_config", config)
    expected = as_generate_does(llama, options)
    assert torch.equal(seen(IDS, config, options), expected)
