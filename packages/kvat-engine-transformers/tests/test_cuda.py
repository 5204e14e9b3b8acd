"""On an NVIDIA card: what is offered runs as its recipe says and answers right, what is excluded really cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np
import pytest
import torch

from kvat_core import metrics
from kvat_core.engine import EngineError, Probe, SpaceRequest
from kvat_core.schema import CandidateEntry, ModelRef, ModelShape, PromptSource, Recipe, Scenario, Target
from kvat_core.space import enumerate_candidates
from kvat_engine_transformers import TransformersAdapter, TransformersEngine
from kvat_engine_transformers.model.description import describe_model
from kvat_engine_transformers.model.recall import build_example, recall
from kvat_engine_transformers.settings.devices import probe_device
from kvat_engine_transformers.settings.knobs import KERNELS, PLAIN
from kvat_engine_transformers.settings.recipes import recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers and packages for cards warn of what is their own
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA card"),
]

MODEL = ModelRef(id="builtin:llama")
TARGET = Target(model=MODEL, device="cuda:0")
SCENARIO = Scenario(prompt_tokens=48, output_tokens=6)
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
DEFAULTS = {**PLAIN, "dtype": "bfloat16", "threads": "own"}
EXAMPLES = 4
FULL = SpaceRequest(space="full")

ANY_CARD = Probe(device="cuda:0", versions={})
ANY_LLAMA = ModelShape(architecture="llama", layers=2, attention=("full", "full"), dtype="float32")
VALUES = [
    (knob.name, value.name)
    for knob in TransformersEngine().space(ANY_LLAMA, ANY_CARD, FULL)
    for value in knob.values
    if knob.name != "threads"
]
"""Each value of each knob that there is on some card."""


@cache
def machine() -> tuple[Probe, ModelShape]:
    return probe_device("cuda:0", {}), describe_model(MODEL, "cuda:0", {})


def exclusion(settings: dict[str, str]) -> str | None:
    """Why kvat would not try these settings, or None."""
    probe, shape = machine()
    engine = TransformersEngine()
    knobs = {knob.name: knob for knob in engine.space(shape, probe, SpaceRequest(space="full"))}
    values = [knobs[name].value(value) for name, value in settings.items() if name != "threads"]
    reasons = [value.unavailable for value in values if value is not None and value.unavailable]
    return reasons[0] if reasons else engine.check(settings, shape, probe)


@cache
def offered() -> list[CandidateEntry]:
    """All candidates that kvat would try here."""
    probe, shape = machine()
    engine = TransformersEngine()
    found = enumerate_candidates(
        engine.space(shape, probe, FULL),
        "full",
        pinned={},
        excluded=(),
        incumbent={},
        check=lambda settings: engine.check(settings, shape, probe),
    )
    return [entry for entry in found if entry.exclusion is None]


def simplest(knob: str, value: str) -> dict[str, str] | None:
    """The settings with this value that differ least from the defaults, in 16 bits if they can; None where none run."""
    with_value = [entry.candidate.settings for entry in offered() if entry.candidate.settings[knob] == value]
    changes = [(sum(DEFAULTS[name] != one[name] for name in (*PLAIN, "dtype")), one) for one in with_value]
    return min(changes, key=lambda change: change[0])[1] if changes else None


def prepared(settings: dict[str, str], scenario: Scenario = SCENARIO) -> tuple[TransformersAdapter, Recipe]:
    made = recipe(settings, scenario, TARGET)
    adapter = TransformersAdapter()
    adapter.load_model(**made.load)
    adapter.prepare_cache(made)
    return adapter, made


def prompt(adapter: TransformersAdapter) -> torch.Tensor:
    return adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", *KERNELS])
def test_what_is_offered_is_applied_and_what_is_excluded_cannot_run(
    attention: str, cache_kind: str, dtype: str
) -> None:
    settings = {**DEFAULTS, "attention": attention, "cache": cache_kind, "dtype": dtype}
    reason = exclusion(settings)
    adapter, _ = prepared(settings)
    if reason is not None:
        with pytest.raises(EngineError, match="forced attention kernel"):
            adapter.applied(prompt(adapter))
        return
    applied = adapter.applied(prompt(adapter))
    assert applied.mismatches == (), applied.values
    timeline = adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    assert metrics.invalid_reason(timeline, SCENARIO) is None
    assert timeline.clock == "device"


@pytest.mark.parametrize(("knob", "value"), VALUES)
def test_each_value_is_applied_timed_scored_and_handed_over(knob: str, value: str) -> None:
    settings = simplest(knob, value)
    if settings is None:
        pytest.skip("no candidate with it can run here")
    adapter, made = prepared(settings)
    applied = adapter.applied(prompt(adapter))
    assert applied.mismatches == (), applied.values
    for _ in range(made.warmup):
        adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    timeline = adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    assert metrics.invalid_reason(timeline, SCENARIO) is None
    assert timeline.compilations == 0
    ids = adapter.token_ids(prompt(adapter))
    chosen, tokens = adapter.score(ids, SCENARIO.output_tokens, None)
    forced, again = adapter.score(ids, SCENARIO.output_tokens, tokens)
    assert np.array_equal(tokens, again)
    assert np.array_equal(chosen.argmax(-1), tokens)
    assert np.allclose(chosen, forced, atol=0.1)
    answers = {adapter.answer(prompt(adapter), SCENARIO.output_tokens, SCENARIO.total_tokens) for _ in range(2)}
    assert len(answers) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_xformers_is_applied(cache_kind: str, dtype: str) -> None:
    settings = {**DEFAULTS, "attention": "xformers", "cache": cache_kind, "dtype": dtype}
    if (reason := exclusion(settings)) is not None:
        pytest.skip(reason)
    adapter, _ = prepared(settings)
    applied = adapter.applied(prompt(adapter))
    assert applied.mismatches == (), applied.values
    assert applied.values["kernels"] == ["XFORMERS"]


@pytest.mark.parametrize("mode", ["auto", "default", "reduce-overhead"])
def test_a_compiled_candidate_compiles_before_the_clock_runs(mode: str) -> None:
    adapter, made = prepared({**DEFAULTS, "cache": "static", "compile": mode})
    applied = adapter.applied(prompt(adapter))
    assert applied.mismatches == (), applied.values
    for _ in range(made.warmup):
        adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    assert adapter.run_decode(prompt(adapter), SCENARIO.output_tokens).compilations == 0


@pytest.mark.parametrize("compiled", ["off", "reduce-overhead"])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", *KERNELS, "xformers"])
def test_no_candidate_forgets(attention: str, cache_kind: str, compiled: str) -> None:
    settings = {**DEFAULTS, "attention": attention, "cache": cache_kind, "compile": compiled}
    if exclusion(settings) is not None or (compiled != "off" and (cache_kind, attention) != ("static", "sdpa")):
        pytest.skip("not offered, or compiled with another kernel")
    examples = [build_example(Random(seed), length=1024, pairs=24, answers=8) for seed in range(EXAMPLES)]
    adapter, _ = prepared(settings, Scenario(prompt_tokens=len(examples[0].prompt), output_tokens=16))

    def generate(ids: Sequence[int], count: int) -> list[int]:
        tokens = torch.tensor([ids], device=adapter.model.device)
        return adapter.generate(tokens, count).tokens[0, len(ids) :].tolist()

    assert recall(generate, examples) >= 0.96


def test_memory_of_the_card_is_told() -> None:
    adapter, _ = prepared({**DEFAULTS})
    adapter.run_decode(prompt(adapter), SCENARIO.output_tokens)
    seen = adapter.measure_resources()
    assert seen.device_allocated_bytes is not None
    assert seen.device_reserved_bytes is not None
    assert seen.device_reserved_bytes >= seen.device_allocated_bytes >= (seen.kv_cache_bytes or 0) > 0
    assert seen.kv_cache_bytes == seen.kv_cache_predicted_bytes
