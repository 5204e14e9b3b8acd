"""A checkpoint with packed weights loads as it is, is proven as what it is, and ends in a plan."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers import quantizer_compressed_tensors

from kvat_core import Objective, Profile, TuneRequest, tune
from kvat_core.engine import SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, ModelShape, PromptSource, Recipe, Scenario, Target
from kvat_engine_transformers import TransformersAdapter, TransformersEngine
from kvat_engine_transformers.proving import observation, proof

ENGINE = TransformersEngine()
KIND = "compressed-tensors pack-quantized"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with its linear layers packed into four bits, in groups of 32."""
    quantising = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    folder = tmp_path_factory.mktemp("models") / "packed"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = quantising.QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = quantising.QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    quantising.apply_quantization_config(
        model,
        quantising.QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
        ),
    )
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            groups = layer.weight.float().reshape(layer.weight.shape[0], -1, 32)
            layer.weight_scale.data = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.fixture(scope="module")
def shape(checkpoint: Path) -> ModelShape:
    return ENGINE.describe(ModelRef(id=str(checkpoint)), "cpu", {})


def default_recipe(checkpoint: Path, shape: ModelShape) -> Recipe:
    knobs = ENGINE.space(shape, ENGINE.probe("cpu", {}), SpaceRequest(space="safe", threads=1))
    settings = {knob.name: knob.default for knob in knobs}
    target = Target(model=ModelRef(id=str(checkpoint)), device="cpu", threads=1)
    return ENGINE.recipe(settings, Scenario(prompt_tokens=24, output_tokens=4), target)


def test_its_kind_is_known_and_nothing_is_predicted_of_its_weights(shape: ModelShape) -> None:
    assert (shape.quantization, shape.dtype) == (KIND, "bfloat16")
    assert (shape.weight_bytes, shape.parameters, shape.step_parameters) == (None, None, None)
    knobs = ENGINE.space(shape, ENGINE.probe("cpu", {}), SpaceRequest(space="full"))
    settings = {knob.name: knob.default for knob in knobs}
    assert ENGINE.footprint(settings, Scenario(prompt_tokens=24, output_tokens=4), shape, "cpu") is None


def test_it_is_computed_with_in_the_dtype_it_was_made_for(shape: ModelShape) -> None:
    knobs = ENGINE.space(shape, ENGINE.probe("cpu", {}), SpaceRequest(space="full"))
    dtypes = {value.name: value.unavailable for value in next(knob for knob in knobs if knob.name == "dtype").values}
    reason = f"the checkpoint is quantised ({KIND}) to be computed with in bfloat16"
    assert dtypes == {"float32": reason, "bfloat16": None, "float16": reason}


def test_packed_weights_are_accepted_and_the_dtype_of_the_rest_is_checked(checkpoint: Path, shape: ModelShape) -> None:
    recipe, adapter = default_recipe(checkpoint, shape), TransformersAdapter()
    load = dict(recipe.load)
    adapter.load_model(**load)  # type: ignore[arg-type]
    adapter.prepare_cache(recipe)
    read_back: list[observation.Seen] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare", lambda seen, _: read_back.append(seen))
        adapter.applied(adapter.make_prompt(PromptSource(kind="text", value="words"), [24], 1))
    (seen,) = read_back
    assert seen.packed_by == "compressed-tensors"
    for dtypes, wrong in [
        (seen.dtypes, False),
        (("int32", "bfloat16", "int64"), False),
        (("uint8", "bfloat16", "float32"), False),
        (("float8_e4m3fn", "bfloat16"), False),
        (("int32", "float16"), True),
        (("int32", "float32", "bfloat16"), True),
        (("int32",), True),
    ]:
        mismatches = proof.compare(replace(seen, dtypes=dtypes), recipe).mismatches
        assert any(one.startswith("weights: the recipe says bfloat16") for one in mismatches) == wrong, dtypes
    plain = replace(seen, packed_by=None, dtypes=("int32", "bfloat16"))
    assert proof.compare(plain, recipe).mismatches


def test_a_missing_library_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_compressed_tensors, "is_compressed_tensors_available", lambda: False)
    with pytest.raises(
        UsageError, match=rf"is quantised \({KIND}\) and cannot be loaded: .*pip install comp"
    ) as caught:
        ENGINE.describe(ModelRef(id=str(checkpoint)), "cpu", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq 4 bits\) and cannot be loaded: .*pip install optimum"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"\(bitsandbytes 4 bits\) .*pip install -U bitsandbytes",
        ),
        ({"quant_method": "unheard-of"}, r"\(unheard-of\) and cannot be loaded: Unknown quantization type"),
    ],
)
def test_other_kinds_say_what_they_lack(
    checkpoint: Path, tmp_path: Path, stored: dict[str, object], message: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=message) as caught:
        ENGINE.describe(ModelRef(id=str(tmp_path)), "cpu", {})
    assert "\n" not in str(caught.value)


def test_another_device_takes_a_map(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="loads it on cuda:0 by a map only; add --engine-option device_map=sequential"):
        ENGINE.describe(ModelRef(id=str(checkpoint)), "cuda:0", {})


def test_random_weights_are_plain(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="random weights are plain numbers"):
        ENGINE.describe(ModelRef(id=f"random:{checkpoint}"), "cpu", {})


def test_a_tune_of_it_ends_in_a_plan_that_says_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    profile = Profile(
        name="quick",
        scenarios=(Scenario(prompt_tokens=16, output_tokens=4),),
        objective=Objective(ttft=1, decode=1),
        launches=2,
        samples=1,
    )
    out, pinned = tmp_path / "out", {"attention": "sdpa"}
    plan = tune(TuneRequest(model=str(checkpoint), out=out, profile=profile, threads=1, pinned=pinned)).plan
    assert plan.model.quantization == KIND
    assert {candidate.settings["dtype"] for candidate in plan.candidates if candidate.state == "ok"} == {"bfloat16"}
    assert all(result.kv_cache_bytes == result.kv_cache_predicted_bytes for result in plan.candidates[0].scenarios)
    assert f"| weights | checkpoint, quantised ({KIND})" in (out / "report.md").read_text()
    command = [sys.executable, str(out / "snippet.py"), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("prompt_tokens=16 output_tokens=4 batch_size=1 ttft_s="), done.stderr
