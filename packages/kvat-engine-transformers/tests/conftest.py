"""A loaded adapter per model and attention, and recipes as the engine makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvat_core.machine import read_machine
from kvat_core.schema import (
    CandidateResult,
    Choice,
    Confidence,
    Estimate,
    JournalRef,
    ModelDimensions,
    ModelRef,
    Objective,
    Plan,
    PlanEngine,
    PlanModel,
    Profile,
    Ratio,
    Recipe,
    Scenario,
    ScenarioResult,
    Target,
    WinnerMetrics,
)
from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.model.description import describe_model
from kvat_engine_transformers.settings.devices import probe_device
from kvat_engine_transformers.settings.knobs import PLAIN
from kvat_engine_transformers.settings.libraries import facts
from kvat_engine_transformers.settings.recipes import recipe

DEFAULTS = {**PLAIN, "threads": "1", "dtype": "float32"}
SCENARIO = Scenario(prompt_tokens=48, output_tokens=6)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a value of a knob that the installed versions lack, as kvat itself would say."""
    found = facts("cpu", None)
    missing = {name: reason for name in ("paged", "fp8") if (reason := found[name]) is not None}
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        for name in sorted(missing.keys() & set(_values(item))):
            item.add_marker(pytest.mark.skip(reason=str(missing[name])))


def _values(item: pytest.Item) -> Iterator[str]:
    """Values of knobs that a test sets: those that it names, and those among its parameters."""
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    for mark in item.iter_markers("uses"):
        yield from mark.args
    for one in parameters:
        yield from (str(value) for value in (one.values() if isinstance(one, Mapping) else [one]))


@pytest.fixture(autouse=True, scope="session")
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of prompts take a key of the tests' own, ceilings a cache of theirs; no home folder is written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def with_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[..., None]]:
    """Installs the engines of a folder beside this file, by name; what it returns runs code that finds them."""

    def install(folder: str, engines: Mapping[str, str]) -> Callable[..., None]:
        site = tmp_path_factory.mktemp(folder)
        shutil.copytree(Path(__file__).with_name(folder), site, dirs_exist_ok=True)
        info = site / f"kvat_{folder}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvat-{folder}\nVersion: 1.0\n")
        lines = [f"{name} = kvat_{folder}:{engine}" for name, engine in engines.items()]
        (info / "entry_points.txt").write_text("\n".join(["[kvat.engines]", *lines, ""]))
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

        def run(code: str, *arguments: str) -> None:
            command, environment = [sys.executable, "-c", code, *arguments], {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

        return run

    return install


@cache
def _adapter(model_id: str, dtype: str, attn_backend: str) -> TransformersAdapter:
    adapter = TransformersAdapter()
    extra = {"revision": None, "threads": 1, "compiled_for": None}
    adapter.load_model(model_id, dtype, "cpu", attn_backend, extra)
    return adapter


def make_recipe(model_id: str, scenario: Scenario = SCENARIO, **settings: str) -> Recipe:
    target = Target(model=ModelRef(id=model_id), device="cpu", threads=1)
    return recipe({**DEFAULTS, **settings}, scenario, target)


@pytest.fixture
def prepared() -> Callable[..., tuple[TransformersAdapter, Recipe]]:
    """An adapter that has prepared a recipe; loads are shared, as in a launch."""

    def prepare(model_id: str, scenario: Scenario = SCENARIO, **settings: str) -> tuple[TransformersAdapter, Recipe]:
        made = make_recipe(model_id, scenario, **settings)
        adapter = _adapter(model_id, str(made.load["dtype"]), str(made.load["attn_backend"]))
        adapter.prepare_cache(made)
        return adapter, made

    return prepare


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model directory in bfloat16, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=list(range(64)),
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """A directory that holds just a config.json."""
    import json

    def write(config: Mapping[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def processors_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[list[tuple[str, dict[str, Any]]]]]:
    """Notes what chooses among the tokens of a model: of each list that it builds, classes and their settings."""

    def watch(model: Any) -> list[list[tuple[str, dict[str, Any]]]]:
        build, seen = model._get_logits_processor, []

        def build_and_note(*arguments: Any, **options: Any) -> Any:
            made = build(*arguments, **options)
            seen.append([(type(one).__name__, dict(vars(one))) for one in made])
            return made

        monkeypatch.setitem(vars(model), "_get_logits_processor", build_and_note)
        return seen

    return watch


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """A plan as if it had been measured here: the first candidate is the winner, and the others follow by score."""

    def make(
        candidates: Mapping[str, Mapping[str, str]], peaks: Mapping[str, int] | None = None, **changes: Any
    ) -> Plan:
        chosen = [Choice(id=name, label=name, settings={**DEFAULTS, **changed}) for name, changed in candidates.items()]
        results = [_result(one, -place, (peaks or {}).get(one.id)) for place, one in enumerate(chosen)]
        plan = Plan(
            kvat="0",
            created="2026-01-01T00:00:00Z",
            engine=PlanEngine(name="transformers", versions=probe_device("cpu", {}).versions),
            model=PlanModel(
                id="builtin:llama", revision=None, weights="checkpoint", sha256=None, dimensions=_llama_dimensions()
            ),
            machine=read_machine("cpu", 1),
            profile=Profile(name="mine", scenarios=(SCENARIO,), objective=Objective(ttft=1)),
            incumbent=chosen[-1],
            winner=chosen[0],
            verdict="better",
            ratio=None,
            confidence=Confidence(level="low", probability=0.5, noise_floor=None, epsilon=0.01),
            equivalents=(),
            metrics=WinnerMetrics(error_rate=0, jitter=None),
            candidates=tuple(results),
            journal=JournalRef(file="journal.jsonl", sha256="0", samples=0),
        )
        return plan.model_copy(update=changes)

    return make


@cache
def _llama_dimensions() -> ModelDimensions:
    shape = describe_model(ModelRef(id="builtin:llama"), "cpu", {})
    return ModelDimensions(**{name: getattr(shape, name) for name in ModelDimensions.model_fields})


def _result(choice: Choice, score: float, peak_bytes: int | None) -> CandidateResult:
    second = Estimate(median=1, low=1, high=1, n=1)
    measured = ScenarioResult(
        **SCENARIO.model_dump(exclude={"weight"}),
        ttft_s=second,
        tpot_s=second,
        decode_tps=second,
        e2e_s=second,
        peak_host_bytes=peak_bytes,
        ready_host_bytes=None if peak_bytes is None else 2**30,
    )
    ratio = Ratio(value=score, low=None, high=None, n=1)
    return CandidateResult(**choice.model_dump(), state="ok", score=ratio, scenarios=(measured,))
