"""What each kind of model id gives, and what unusable ones say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kvat_core.engine import EngineError
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, ModelShape, PromptSource
from kvat_engine_transformers import (
    TransformersAdapter,
    TransformersEngine,
    build_random_model,
    builtin_path,
    random_path,
)
from kvat_engine_transformers.settings.devices import probe_device

WriteConfig = Callable[[Mapping[str, Any]], Path]
SHAPES = {
    "smollm2-135m": (30, 3, 64, 8192, 134_515_008),
    "llama-3.2-1b": (16, 8, 64, 131072, 1_235_814_400),
    "llama-3.1-8b": (32, 8, 128, 131072, 8_030_261_248),
    "mistral-7b": (32, 8, 128, 32768, 7_241_732_096),
    "qwen3-0.6b": (28, 8, 128, 40960, 596_049_920),
}
"""Layers, KV heads, head dimension, longest context and parameters, as the model cards and configs state them."""


def describe(model_id: str | Path, **changes: Any) -> ModelShape:
    return TransformersEngine().describe(ModelRef(id=str(model_id), **changes), "cpu", {})


@pytest.fixture(autouse=True)
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 2**40

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_builtin_model_is_small_trained_and_long_enough(name: str) -> None:
    shape = describe(f"builtin:{name}")
    assert (shape.architecture, shape.weights, shape.dtype, shape.has_tokenizer) == (
        name,
        "checkpoint",
        "float32",
        True,
    )
    assert (shape.max_context_tokens or 0) >= 4352
    assert shape.attention == (("sliding" if name == "mistral" else "full"),) * 3
    assert shape.sliding_window == (512 if name == "mistral" else None)
    assert (builtin_path(name) / "model.safetensors").stat().st_size <= 3 * 2**20
    training = json.loads((builtin_path(name) / "training.json").read_text())
    assert training["seed"] is not None


@pytest.mark.parametrize("name", SHAPES)
def test_a_random_shape_has_the_figures_of_its_model(name: str) -> None:
    shape = describe(f"random:{name}")
    layers, kv_heads, head_dim, context, parameters = SHAPES[name]
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.max_context_tokens) == (
        layers,
        kv_heads,
        head_dim,
        context,
    )
    assert shape.weight_bytes == 2 * parameters
    assert (shape.weights, shape.dtype, shape.local, shape.sha256) == ("random", "bfloat16", False, None)


def test_random_weights_are_the_same_at_every_launch_and_finite(tiny_directory: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa"}
    one, other = (build_random_model(random_path(str(tiny_directory)), **options) for _ in range(2))
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name
    logits = one(torch.arange(32)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_local_directory_is_described_by_its_own_files(tiny_directory: Path) -> None:
    shape = describe(tiny_directory)
    assert (shape.local, shape.dtype, shape.has_tokenizer, shape.weights) == (True, "bfloat16", False, "checkpoint")
    assert len(shape.sha256 or "") == 64
    assert describe(f"random:{tiny_directory}").local


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "does not generate text"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "does not generate text"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "needs code from its repository"),
        ({"model_type": "unheard-of"}, "does not know the model type unheard-of"),
        (LLAMA, "has no model.safetensors"),
    ],
)
def test_a_directory_that_cannot_be_tuned_says_why(
    write_config: WriteConfig, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        describe(write_config(config))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(write_config: WriteConfig) -> None:
    folder = write_config(LLAMA)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="pickled weights only"):
        describe(folder)


def test_an_incomplete_checkpoint_is_refused(write_config: WriteConfig) -> None:
    folder = write_config(LLAMA)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="lacks 2 of 2 weight files"):
        describe(folder)


def copied(folder: Path, **config: Any) -> Path:
    """The built-in Llama as a user's directory, with another config; null leaves a key out."""
    shutil.copytree(builtin_path("llama"), folder)
    data = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return folder


def test_a_dtype_that_the_config_lacks_is_that_of_the_weights(tmp_path: Path, tiny_directory: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_directory, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert describe(folder).dtype == "bfloat16"
    assert describe(copied(tmp_path / "other", dtype=None)).dtype == "float32"


def test_a_tokenizer_that_cannot_be_loaded_costs_nothing_else(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    assert not describe(folder).has_tokenizer
    adapter = TransformersAdapter()
    extra = {"revision": None, "threads": 1, "compiled_for": None}
    adapter.load_model(str(folder), "float32", "cpu", "sdpa", extra)
    assert adapter.make_prompt(PromptSource(kind="text", value="words"), [20], 1).shape == (1, 20)


def test_damaged_weights_say_what_to_do(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    extra = {"revision": None, "threads": 1, "compiled_for": None}
    with pytest.raises(EngineError, match="weight files are damaged or incomplete; fetch them again"):
        TransformersAdapter().load_model(str(folder), "float32", "cpu", "sdpa", extra)


def test_weights_that_are_not_all_there_are_not_made_up(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model", num_hidden_layers=4)
    extra = {"revision": None, "threads": 1, "compiled_for": None}
    with pytest.raises(EngineError, match=r"lack 9 of its weights, as model\.layers\.3\.") as caught:
        TransformersAdapter().load_model(str(folder), "float32", "cpu", "sdpa", extra)
    assert caught.value.kind == "error"
    assert str(caught.value).endswith("fetch them again, or mend its config.json")


def test_weights_of_another_config_say_what_to_do(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model", intermediate_size=96)
    extra = {"revision": None, "threads": 1, "compiled_for": None}
    with pytest.raises(EngineError, match="the weights do not have the shapes"):
        TransformersAdapter().load_model(str(folder), "float32", "cpu", "sdpa", extra)


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("builtin:nope", "there is no model builtin:nope; choose one of: builtin:llama, builtin:mistral"),
        ("random:nope", "choose one of: random:llama-3.1-8b"),
        ("random:no/where", "needs a directory with a config.json"),
        ("/no/where", "there is no directory /no/where"),
        ("somebody/absent", "is not on this machine; add --allow-download"),
        ("not a name", "neither a directory here nor a hub id"),
    ],
)
def test_an_unknown_model_says_what_to_do(model_id: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        describe(model_id)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(UsageError, match=r"15\.0 GiB of weights and cpu 1\.0 GiB free"):
        describe("random:llama-3.1-8b")


def test_the_device_is_the_one_asked_for_or_an_error() -> None:
    assert probe_device("cpu", {}).device == "cpu"
    for device in ("tpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device {device} is not here; choose one of: .*cpu"):
            probe_device(device, {})


def test_one_core_stays_free() -> None:
    threads = probe_device("cpu", {}).threads
    assert threads is not None
    assert 1 <= threads <= max(1, (psutil.cpu_count() or 1) - 1)
