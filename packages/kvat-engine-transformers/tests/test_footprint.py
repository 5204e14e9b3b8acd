"""Bytes counted by hand against every tensor that real calls keep alive, and against the size of a process."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kvat_core import roofline
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.supervisor import WorkerProcess
from kvat_core.schema import ModelRef, ModelShape, PromptSource, Resources, Scenario, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.model.description import describe_model
from kvat_engine_transformers.settings.knobs import PLAIN

MIB = 2**20
ENGINE = TransformersEngine()
SETTINGS = {**PLAIN, "dtype": "float32", "threads": "1"}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 96}
SOURCE = PromptSource(kind="text", value="what a model is asked")


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations inside have made, at their peak."""

    def __init__(self, besides: Mapping[int, None]) -> None:
        super().__init__()
        self._seen = dict(besides)
        self._bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen[storage._cdata] = None
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, name: int, size_bytes: int) -> None:
        del self._seen[name]
        self._bytes -= size_bytes


def model_of(folder: Path, **changes: Any) -> ModelRef:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return ModelRef(id=f"random:{folder}")


def predicted_bytes(shape: ModelShape, settings: Mapping[str, str], scenario: Scenario, first_call_bytes: int) -> int:
    footprint = ENGINE.footprint(settings, scenario, shape, "cpu")
    assert footprint is not None
    predicted = roofline.peak_bytes(shape, footprint, scenario, first_call_bytes)
    assert predicted is not None
    return predicted


PREFILL = Scenario(prompt_tokens=200, output_tokens=2)
DECODE = Scenario(prompt_tokens=4, output_tokens=150)


@pytest.mark.parametrize(
    ("model", "settings", "scenario"),
    [
        ({}, {}, PREFILL),
        ({}, {}, DECODE),
        ({}, {}, PREFILL.model_copy(update={"batch_size": 3})),
        ({}, {"cache": "static"}, PREFILL),
        ({}, {"cache": "static"}, DECODE),
        ({}, {"dtype": "bfloat16"}, PREFILL),
        ({}, {"attention": "eager"}, PREFILL),
        ({}, {"attention": "eager"}, DECODE),
        ({}, {"attention": "eager", "cache": "static"}, PREFILL),
        ({}, {"attention": "eager", "dtype": "bfloat16"}, PREFILL),
        ({}, {"attention": "sdpa_math"}, PREFILL),
        ({}, {"attention": "sdpa_math", "dtype": "bfloat16"}, PREFILL),
        ({"num_key_value_heads": 4}, {}, PREFILL),
        ({"intermediate_size": 64, "head_dim": 64}, {}, PREFILL),
        (MISTRAL, {}, PREFILL),
        (MISTRAL, {"cache": "static"}, PREFILL),
        ({**MISTRAL, "intermediate_size": 32}, {}, PREFILL),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, {}, PREFILL),
    ],
    ids=str,
)
def test_what_is_predicted_is_what_a_call_keeps_alive(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, str], scenario: Scenario
) -> None:
    reference = model_of(tmp_path, **model)
    chosen = {**SETTINGS, **settings}
    recipe = ENGINE.recipe(chosen, scenario, Target(model=reference, device="cpu", threads=1))
    adapter: Any = ENGINE.adapter(tmp_path)
    load: dict[str, Any] = recipe.load
    adapter.load_model(**load)
    adapter.prepare_cache(recipe)
    prompt = adapter.make_prompt(SOURCE, scenario.prompt_lengths, 0)
    adapter.run_decode(prompt, scenario.output_tokens)
    known = [*adapter.model.parameters(), *adapter.model.buffers(), prompt]
    with Alive({tensor.untyped_storage()._cdata: None for tensor in known}) as alive:
        adapter.run_decode(prompt, scenario.output_tokens)

    predicted = predicted_bytes(describe_model(reference, "cpu", {}), chosen, scenario, 0)

    assert alive.peak_bytes == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "device", "architecture"),
    [
        ({"compile": "default", "cache": "static"}, "cpu", "llama"),
        ({}, "cuda:0", "llama"),
        ({}, "cpu", "unheard-of"),
    ],
)
def test_of_what_was_not_verified_only_the_cache_is_predicted(
    tmp_path: Path, settings: dict[str, str], device: str, architecture: str
) -> None:
    shape = describe_model(model_of(tmp_path), "cpu", {}).model_copy(update={"architecture": architecture})

    footprint = ENGINE.footprint({**SETTINGS, **settings}, PREFILL, shape, device)

    assert footprint is not None
    assert footprint.prefill_bytes is None
    assert roofline.peak_bytes(shape, footprint, PREFILL, 0) is None
    assert roofline.least_bytes(shape, footprint, PREFILL) is not None


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_of_an_offloaded_cache_nothing_is_predicted_as_it_is_in_another_memory(tmp_path: Path, cache: str) -> None:
    shape = describe_model(model_of(tmp_path), "cpu", {})
    assert ENGINE.footprint({**SETTINGS, "cache": cache}, PREFILL, shape, "cuda:0") is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak of a span of time")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_process_rises_by_what_is_predicted(tmp_path: Path, cache: str) -> None:
    scenario = Scenario(prompt_tokens=2040, output_tokens=8)
    reference = model_of(tmp_path, hidden_size=256, intermediate_size=1024)
    settings = {**SETTINGS, "cache": cache}
    recipe = ENGINE.recipe(settings, scenario, Target(model=reference, device="cpu", threads=1))
    # Else glibc keeps freed memory as it happens to.
    environment = {**recipe.environment, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    small = Scenario(prompt_tokens=8, output_tokens=2)

    first_call_bytes = rise_bytes(environment, recipe.load, [(recipe.model_dump(mode="json"), small)])
    measured = rise_bytes(environment, recipe.load, [(recipe.model_dump(mode="json"), scenario)])

    predicted = predicted_bytes(describe_model(reference, "cpu", {}), settings, scenario, first_call_bytes)
    assert abs(predicted - measured) <= max(0.1 * measured, 16 * MIB)


def rise_bytes(environment: Mapping[str, str], load: Any, calls: list[tuple[Any, Scenario]]) -> int:
    """Of a fresh worker from after loading to the peak of its calls."""
    limits = Limits(300.0)
    with WorkerProcess({**environment, "OMP_NUM_THREADS": "1"}) as worker:
        scratch = os.fspath(Path.cwd())
        worker.call("start", {"engine": "transformers", "scratch": scratch}, "start", limits)
        worker.call("load", dict(load), "load", limits)
        for recipe, scenario in calls:
            worker.call("prepare", recipe, "prepare", limits)
            prompt: Any = {
                "source": SOURCE.model_dump(mode="json"),
                "tokens": list(scenario.prompt_lengths),
                "nonce": 0,
            }
            worker.call("decode", {"prompt": prompt, "max_new_tokens": scenario.output_tokens}, "decode", limits)
        resources = Resources.model_validate(worker.call("resources", {}, "resources", limits))
    assert resources.peak_host_bytes is not None
    assert resources.ready_host_bytes is not None
    return resources.peak_host_bytes - resources.ready_host_bytes
