"""Engine options: a map of devices reaches the model, the proof and the snippet; what cannot be done is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Objective, Profile, TuneRequest, tune
from kvat_core.engine import EngineError
from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, ModelShape, PromptSource, Recipe, Scenario, Target
from kvat_engine_transformers import TransformersAdapter, TransformersEngine, builtin_path
from kvat_engine_transformers.proving import observation, proof
from kvat_engine_transformers.settings import devices
from kvat_engine_transformers.settings.recipes import recipe

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
ENGINE = TransformersEngine()
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
SPREAD = {"device_map": "auto"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": "auto"}, "one process per device .* use --engine-option device_map=auto"),
        ({"device_map": "cuda:1"}, "is one of auto, balanced, balanced_low_0, sequential, not 'cuda:1'; .*--device"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ENGINE.probe("cpu", options)
    assert "\n" not in str(caught.value)


def test_a_map_without_accelerate_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    with pytest.raises(UsageError, match="pip install accelerate"):
        ENGINE.probe("cpu", SPREAD)


def test_a_map_begins_with_the_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_present", lambda: ["cuda:0", "cuda:1", "cpu"])
    assert devices.used_devices("cuda:0", SPREAD) == ("cuda:0", "cuda:1")
    assert devices.used_devices("cuda:0", {}) == ("cuda:0",)
    with pytest.raises(UsageError, match="begins with cuda:0, not with cpu; leave --device out"):
        ENGINE.probe("cpu", SPREAD)


def test_random_weights_are_not_spread() -> None:
    with pytest.raises(UsageError, match="device_map spreads a checkpoint"):
        ENGINE.describe(ModelRef(id="random:smollm2-135m"), "cpu", SPREAD)


def test_nothing_is_predicted_of_a_model_on_several_devices() -> None:
    shape = ENGINE.describe(ModelRef(id="builtin:llama"), "cpu", {})
    settings = {knob.name: knob.default for knob in ENGINE.space(shape, ENGINE.probe("cpu", {}), _any_request())}
    scenario = Scenario(prompt_tokens=48, output_tokens=6)
    assert ENGINE.footprint(settings, scenario, shape, "cpu") is not None
    spread: ModelShape = shape.model_copy(update={"facts": {**shape.facts, "devices": 2}})
    assert ENGINE.footprint(settings, scenario, spread, "cpu") is None


def _any_request() -> Any:
    from kvat_core.engine import SpaceRequest

    return SpaceRequest(space="safe")


def seen_with(prepared: Prepared, **changes: Any) -> tuple[observation.Seen, Recipe]:
    """A read-back of the built-in model, and a recipe that asks for a map."""
    adapter, ran = prepared("builtin:llama")
    read_back: list[observation.Seen] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare", lambda seen, _: read_back.append(seen))
        adapter.applied(adapter.make_prompt(TEXT, [48], 1))
    spread = ran.model_copy(update={"load": {**ran.load, "extra": {**ran.load["extra"], **SPREAD}}})  # type: ignore[dict-item]
    return replace(read_back[0], **changes), spread


def test_a_map_over_one_device_leaves_everything_on_it(prepared: Prepared) -> None:
    seen, spread = seen_with(prepared)
    assert proof.compare(seen, spread).mismatches == ()


def test_weights_of_a_spread_model_are_on_all_its_devices(prepared: Prepared) -> None:
    seen, spread = seen_with(prepared, spread=("cpu", "cuda:1"))
    (mismatch,) = proof.compare(seen, spread).mismatches
    assert mismatch == "device: the recipe says ['cpu', 'cuda:1'], it is ['cpu']"
    beside = replace(seen, spread=("cuda:0", "cuda:1"), devices=("cuda:0", "cuda:1"))
    (mismatch,) = proof.compare(beside, spread).mismatches
    assert mismatch == "cache device: the recipe says ['cuda:0', 'cuda:1'], it is ['cpu']"


def test_a_weight_that_is_not_where_its_module_should_be_is_caught(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = prepared("builtin:llama")
    told = {"model.layers.0": "cpu", "model.layers.1": "meta"}
    monkeypatch.setattr(adapter.model, "hf_device_map", told, raising=False)
    seen, spread = seen_with(prepared, spread=None)
    assert len(seen.strays) == 9
    assert all(name.startswith("model.layers.1.") for name in seen.strays)
    (mismatch,) = proof.compare(seen, spread).mismatches
    assert mismatch.startswith("weights on other devices than their modules")


def test_weights_that_no_device_holds_are_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers.integrations.accelerate as placing

    monkeypatch.chdir(tmp_path)  # a disk is written to
    whole = placing.get_balanced_memory

    def small(model: Any, **arguments: Any) -> dict[str, int]:
        return {**whole(model, **arguments), "cpu": 600_000, "disk": 2**40}

    monkeypatch.setattr(placing, "get_balanced_memory", small)
    extra = {"revision": None, "threads": 1, "compiled_for": None, **SPREAD}
    with pytest.raises(EngineError, match="the devices do not hold the model: device_map=auto leaves") as caught:
        TransformersAdapter().load_model(str(builtin_path("llama")), "float32", "cpu", "sdpa", extra)
    assert caught.value.kind == "oom_device"


def test_a_map_is_part_of_the_load_of_the_plan_and_of_the_snippet(tmp_path: Path) -> None:
    profile = Profile(
        name="quick",
        scenarios=(Scenario(prompt_tokens=16, output_tokens=4),),
        objective=Objective(ttft=1, decode=1),
        launches=2,
        samples=1,
    )
    pinned = {"attention": "sdpa", "dtype": "float32", "cache": "dynamic"}
    request = TuneRequest(
        model="builtin:llama", out=tmp_path / "out", profile=profile, threads=1, pinned=pinned, engine_options=SPREAD
    )
    plan = tune(request).plan
    assert plan.engine.options == SPREAD
    assert "accelerate" in plan.engine.versions
    assert {candidate.state for candidate in plan.candidates} <= {"ok", "excluded"}
    scenario, model = plan.profile.scenarios[0], ModelRef(id=plan.model.id)
    settings = plan.require_winner().settings
    with_map = recipe(settings, scenario, Target(model=model, device="cpu", threads=1, options=plan.engine.options))
    without = recipe(settings, scenario, Target(model=model, device="cpu", threads=1))
    assert with_map.load_key != without.load_key
    assert 'device_map="auto",' in (tmp_path / "out" / "snippet.py").read_text()
    command = [sys.executable, str(tmp_path / "out" / "snippet.py")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("prompt_tokens=16 output_tokens=4 batch_size=1 ttft_s="), done.stderr
