"""The scripted engines keep the contract, and do what their model ids promise."""

from __future__ import annotations

import math
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path

import pytest

from kvat_core.engine import Engine, EngineAdapter, EngineError, SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.fake import FakeEngine, FakeServerEngine
from kvat_core.measure.messages import Reply, encode
from kvat_core.metrics import batch_size
from kvat_core.schema import (
    Choice,
    Confidence,
    JournalRef,
    Machine,
    ModelRef,
    Objective,
    Plan,
    PlanEngine,
    PlanModel,
    Profile,
    PromptSource,
    Recipe,
    Resources,
    Scenario,
    Space,
    Target,
    Timeline,
    WinnerMetrics,
)
from kvat_core.space import enumerate_candidates

SCENARIO = Scenario(prompt_tokens=64, output_tokens=16, batch_size=2)
TEXT = PromptSource(kind="text", value="the quick brown fox")
Settings = Mapping[str, str]
Launch = Callable[[Engine, str, Settings], tuple[EngineAdapter, Recipe]]

FACES = pytest.mark.parametrize("engine", [FakeEngine(), FakeServerEngine()], ids=lambda engine: engine.name)
INCUMBENT = {
    "fake": {"cache": "dynamic", "kernel": "auto", "graph": "off"},
    "fake-server": {"flash": "auto", "kv_type": "f16", "draft": "off"},
}
BEST = {
    "fake": {"cache": "static", "kernel": "auto", "graph": "off"},
    "fake-server": {"flash": "auto", "kv_type": "f16", "draft": "ngram"},
}
SUSPECT = {
    "fake": {"cache": "static", "kernel": "eager", "graph": "off"},
    "fake-server": {"flash": "off", "kv_type": "f16", "draft": "off"},
}


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Do what a worker does up to the first call."""

    def start(engine: Engine, behaviour: str, settings: Settings) -> tuple[EngineAdapter, Recipe]:
        recipe = recipe_of(engine, behaviour, settings)
        for name, value in recipe.environment.items():
            monkeypatch.setenv(name, value)
        adapter = engine.adapter(Path())
        adapter.load_model(**recipe.load)  # type: ignore[arg-type]
        adapter.prepare_cache(recipe)
        return adapter, recipe

    return start


def recipe_of(engine: Engine, behaviour: str, settings: Settings, scenario: Scenario = SCENARIO) -> Recipe:
    return engine.recipe(settings, scenario, Target(model=ModelRef(id=f"{engine.name}:{behaviour}"), device="cpu"))


def candidates(engine: Engine, space: Space) -> tuple[list[Settings], list[str]]:
    """Settings of what can be tried, and the reasons against the rest."""
    probe = engine.probe(None, {})
    shape = engine.describe(ModelRef(id=engine.own_models[0]), probe.device, {})
    entries = enumerate_candidates(
        engine.space(shape, probe, SpaceRequest(space=space)),
        space,
        pinned={},
        excluded=(),
        incumbent={},
        check=lambda settings: engine.check(settings, shape, probe),
    )
    reasons = [entry.exclusion for entry in entries if entry.exclusion]
    return [entry.candidate.settings for entry in entries if not entry.exclusion], reasons


def decode(adapter: EngineAdapter, nonce: int = 1) -> Timeline:
    prompt = adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, nonce)
    return adapter.run_decode(prompt, SCENARIO.output_tokens)


def decode_s(timeline: Timeline) -> float:
    return timeline.requests[0].e2e_s - timeline.requests[0].ttft_s


def speed_up(launch: Launch, engine: Engine, behaviour: str, settings: Settings) -> float:
    """Decode speed as the median ratio to the incumbent over paired prompts."""
    challenger, _ = launch(engine, behaviour, settings)
    challenger_s = [decode_s(decode(challenger, nonce)) for nonce in range(9)]
    incumbent, _ = launch(engine, behaviour, INCUMBENT[engine.name])
    incumbent_s = [decode_s(decode(incumbent, nonce)) for nonce in range(9)]
    return statistics.median(today / tuned for today, tuned in zip(incumbent_s, challenger_s, strict=True))


@FACES
def test_space_has_every_kind_of_obstacle(engine: Engine) -> None:
    safe, _ = candidates(engine, "safe")
    full, reasons = candidates(engine, "full")

    assert safe[0] == full[0] == INCUMBENT[engine.name]
    assert len(safe) < len(full)
    assert {settings[knob] for knob in full[0] for settings in full} > {
        settings[knob] for knob in full[0] for settings in safe
    }
    assert any("scripted device has no pages" in reason or "without 4 bits" in reason for reason in reasons)
    assert any("graph" in reason or "drafts" in reason for reason in reasons)


@FACES
def test_every_candidate_generates_what_was_asked_for(engine: Engine, launch: Launch) -> None:
    for settings in candidates(engine, "full")[0]:
        adapter, _ = launch(engine, "tiny", settings)
        timeline = decode(adapter)
        counts = [(request.prompt_tokens, request.output_tokens, request.count) for request in timeline.requests]

        assert counts == [(SCENARIO.prompt_tokens, SCENARIO.output_tokens, SCENARIO.batch_size)]
        assert all(0 < request.ttft_s < request.e2e_s <= timeline.duration_s for request in timeline.requests)


def test_the_answer_for_a_large_batch_fits_a_message(launch: Launch) -> None:
    adapter, _ = launch(FakeEngine(), "tiny", INCUMBENT["fake"])
    timeline = adapter.run_decode(adapter.make_prompt(TEXT, [64] * 1024, nonce=1), 4096)
    assert batch_size(timeline) == 1024
    assert encode(Reply(value=timeline.model_dump(mode="json")))


def test_the_library_sees_single_tokens_and_the_server_only_totals(launch: Launch) -> None:
    library = decode(launch(FakeEngine(), "tiny", INCUMBENT["fake"])[0])
    server = decode(launch(FakeServerEngine(), "tiny", INCUMBENT["fake-server"])[0])
    gaps = library.requests[0].token_gaps_s

    assert library.clock == "host"
    assert gaps is not None
    assert len(gaps) == SCENARIO.output_tokens - 1
    assert sum(gaps) == pytest.approx(decode_s(library))
    assert server.clock == "engine"
    assert server.requests[0].token_gaps_s is None


def test_the_library_knows_its_memory_and_the_server_does_not(launch: Launch) -> None:
    small, _ = launch(FakeEngine(), "tiny", {**INCUMBENT["fake"], "cache": "quantized"})
    large, _ = launch(FakeEngine(), "tiny", INCUMBENT["fake"])
    server, _ = launch(FakeServerEngine(), "tiny", INCUMBENT["fake-server"])
    for adapter in (small, large, server):
        decode(adapter)
    small_bytes, large_bytes = small.measure_resources(), large.measure_resources()

    assert small_bytes.kv_cache_bytes is not None
    assert large_bytes.kv_cache_bytes is not None
    assert large_bytes.kv_cache_bytes == 4 * small_bytes.kv_cache_bytes
    assert small_bytes.peak_host_bytes is not None
    assert large_bytes.peak_host_bytes is not None
    assert large_bytes.peak_host_bytes > small_bytes.peak_host_bytes
    assert server.measure_resources() == Resources(processes=("scripted server",))


def test_peak_memory_is_that_of_the_prepared_recipe(launch: Launch) -> None:
    adapter, _ = launch(FakeEngine(), "tiny", INCUMBENT["fake"])
    decode(adapter)
    large = adapter.measure_resources().peak_host_bytes
    adapter.prepare_cache(recipe_of(FakeEngine(), "tiny", {**INCUMBENT["fake"], "cache": "offloaded"}))
    decode(adapter)
    small = adapter.measure_resources().peak_host_bytes

    assert large is not None
    assert small is not None
    assert small < large


@FACES
def test_equal_arguments_give_equal_prompts_and_other_nonces_others(engine: Engine, launch: Launch) -> None:
    adapter, _ = launch(engine, "tiny", INCUMBENT[engine.name])

    assert adapter.make_prompt(TEXT, [5] * 2, 7) == adapter.make_prompt(TEXT, [5] * 2, 7)
    assert adapter.make_prompt(TEXT, [5] * 2, 7) != adapter.make_prompt(TEXT, [5] * 2, 8)


@FACES
def test_automatic_choice_is_an_alias_of_what_it_chooses(engine: Engine, launch: Launch) -> None:
    explicit = {"fake": {"kernel": "flash"}, "fake-server": {"flash": "on"}}[engine.name]
    automatic, automatic_recipe = launch(engine, "tiny", INCUMBENT[engine.name])
    prompt = automatic.make_prompt(TEXT, [SCENARIO.prompt_tokens], 1)
    automatic_values = automatic.applied(prompt).values
    chosen, chosen_recipe = launch(engine, "tiny", {**INCUMBENT[engine.name], **explicit})

    assert automatic_recipe.key != chosen_recipe.key
    assert chosen.applied(prompt).values == automatic_values


@FACES
def test_no_candidate_leaves_a_trace_in_the_next(engine: Engine, launch: Launch) -> None:
    pairs = permutations(candidates(engine, "full")[0], 2)
    shared = 0
    for first, second in pairs:
        alone, recipe = launch(engine, "tiny", second)
        if recipe_of(engine, "tiny", first).load_key != recipe.load_key:
            continue
        shared += 1
        prompt = alone.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)
        after, _ = launch(engine, "tiny", first)
        after.run_decode(prompt, SCENARIO.output_tokens)
        after.prepare_cache(recipe)

        assert after.applied(prompt) == alone.applied(prompt)
        assert after.run_decode(prompt, SCENARIO.output_tokens) == alone.run_decode(prompt, SCENARIO.output_tokens)
    assert shared > 0


@FACES
def test_one_setting_decodes_a_quarter_faster_and_no_other_faster_than_it(engine: Engine, launch: Launch) -> None:
    best = BEST[engine.name]
    rivals = [settings for settings in candidates(engine, "safe")[0] if settings != best]

    winner = speed_up(launch, engine, "tiny", best)

    assert winner == pytest.approx(1.25, rel=0.02)
    assert max(speed_up(launch, engine, "tiny", rival) for rival in rivals) == pytest.approx(winner)  # its alias


@FACES
def test_flat_model_is_equally_fast_with_all_settings(engine: Engine, launch: Launch) -> None:
    ratios = [speed_up(launch, engine, "flat", settings) for settings in candidates(engine, "full")[0]]

    assert ratios == pytest.approx([1.0] * len(ratios), rel=0.02)


def test_graph_is_compiled_once_for_each_shape(launch: Launch) -> None:
    adapter, recipe = launch(FakeEngine(), "tiny", {**BEST["fake"], "graph": "on"})

    assert recipe.compiles
    assert [decode(adapter).compilations for _ in range(3)] == [1, 0, 0]
    assert recipe.warmup >= 2


@FACES
def test_cache_refuses_more_tokens_than_its_scenario_has(engine: Engine, launch: Launch) -> None:
    adapter, _ = launch(engine, "tiny", BEST[engine.name])
    prompt = adapter.make_prompt(TEXT, [1000], 1)

    with pytest.raises(EngineError, match="do not fit"):
        adapter.run_prefill(prompt)


@FACES
def test_prefill_alone_generates_nothing(engine: Engine, launch: Launch) -> None:
    adapter, _ = launch(engine, "tiny", INCUMBENT[engine.name])
    request = adapter.run_prefill(adapter.make_prompt(TEXT, [64], 1)).requests[0]

    assert request.output_tokens == 0
    assert request.ttft_s == request.e2e_s > 0


def test_server_reports_an_environment_that_was_not_set(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, recipe = launch(FakeServerEngine(), "tiny", SUSPECT["fake-server"])
    prompt = adapter.make_prompt(TEXT, [64], 1)
    assert adapter.applied(prompt).mismatches == ()

    for name in recipe.environment:
        monkeypatch.delenv(name)
    adapter.prepare_cache(recipe)

    assert adapter.applied(prompt).mismatches == ("FAKE_SERVER_FLASH: the recipe says off, the server runs auto",)


def test_server_context_follows_the_scenario() -> None:
    loads = [
        recipe_of(
            FakeServerEngine(), "tiny", BEST["fake-server"], Scenario(prompt_tokens=tokens, output_tokens=16)
        ).load_key
        for tokens in (64, 128, 1024)
    ]

    assert loads[0] == loads[1] != loads[2]


@FACES
def test_only_the_suspect_misbehaves(engine: Engine, launch: Launch) -> None:
    behaviours = ["oom", "misapplied", "wrong-count", "nan", "secret", "crash", "hang"]
    for behaviour in behaviours:
        for settings in candidates(engine, "safe")[0]:
            if settings == SUSPECT[engine.name]:
                continue
            adapter, _ = launch(engine, behaviour, settings)
            healthy, _ = launch(engine, "tiny", settings)
            prompt = adapter.make_prompt(TEXT, [64], 1)

            assert decode(adapter) == decode(healthy)
            assert adapter.applied(prompt).mismatches == ()


@FACES
def test_suspect_runs_out_of_memory(engine: Engine, launch: Launch) -> None:
    with pytest.raises(EngineError) as caught:
        decode(launch(engine, "oom", SUSPECT[engine.name])[0])

    assert caught.value.kind == "oom_device"


@FACES
def test_suspect_reads_back_something_else(engine: Engine, launch: Launch) -> None:
    adapter, _ = launch(engine, "misapplied", SUSPECT[engine.name])

    assert adapter.applied(adapter.make_prompt(TEXT, [64], 1)).mismatches


@FACES
def test_suspect_loses_a_token(engine: Engine, launch: Launch) -> None:
    timeline = decode(launch(engine, "wrong-count", SUSPECT[engine.name])[0])

    assert {request.output_tokens for request in timeline.requests} == {SCENARIO.output_tokens - 1}


@FACES
def test_suspect_loses_its_times(engine: Engine, launch: Launch) -> None:
    timeline = decode(launch(engine, "nan", SUSPECT[engine.name])[0])

    assert all(math.isnan(request.ttft_s) and math.isnan(request.e2e_s) for request in timeline.requests)


@FACES
def test_suspect_tells_the_prompt(engine: Engine, launch: Launch) -> None:
    with pytest.raises(RuntimeError, match=str(TEXT.value)):
        decode(launch(engine, "secret", SUSPECT[engine.name])[0])


@FACES
def test_all_candidates_fail(engine: Engine, launch: Launch) -> None:
    for settings in candidates(engine, "full")[0]:
        with pytest.raises(EngineError, match="fails whatever"):
            decode(launch(engine, "all-fail", settings)[0])


@FACES
def test_chatter_is_more_than_a_pipe_holds(engine: Engine, launch: Launch, capfd: pytest.CaptureFixture[str]) -> None:
    decode(launch(engine, "chatty", INCUMBENT[engine.name])[0])
    captured = capfd.readouterr()

    assert min(len(captured.out), len(captured.err)) > 2**16
    assert "fox" not in captured.out + captured.err


def suspect_process(engine: Engine, behaviour: str) -> subprocess.Popen[str]:
    """A process that announces the suspect's timed call and makes it."""
    recipe = recipe_of(engine, behaviour, SUSPECT[engine.name])
    program = f"""
from pathlib import Path
from kvat_core.fake import {type(engine).__name__}
from kvat_core.schema import PromptSource, Recipe
recipe = Recipe.model_validate_json({recipe.model_dump_json()!r})
adapter = {type(engine).__name__}().adapter(Path())
adapter.load_model(**recipe.load)
adapter.prepare_cache(recipe)
prompt = adapter.make_prompt(PromptSource(kind="text", value="a b c"), [64], 1)
print("decoding", flush=True)
adapter.run_decode(prompt, 16)
"""
    environment = {**os.environ, **recipe.environment}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)


@FACES
def test_suspect_kills_its_process(engine: Engine) -> None:
    with suspect_process(engine, "crash") as process:
        output, _ = process.communicate()

    assert output == "decoding\n"
    assert process.returncode == -signal.SIGSEGV


@FACES
def test_suspect_does_not_come_back(engine: Engine) -> None:
    with suspect_process(engine, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.kill()


@FACES
def test_unknown_model_and_device_are_refused(engine: Engine) -> None:
    for model in ("gpt2", f"{engine.name}:", f"{engine.name}:shiny", "other:tiny"):
        with pytest.raises(UsageError, match=f"choose one of {engine.name}:tiny"):
            engine.describe(ModelRef(id=model), "cpu", {})
    with pytest.raises(UsageError, match="use --device cpu"):
        engine.probe("cuda", {})


@FACES
def test_snippet_runs_and_prints_every_scenario(engine: Engine, launch: Launch, tmp_path: Path) -> None:
    plan = plan_for(engine, (SCENARIO, Scenario(prompt_tokens=300, output_tokens=32)))
    (tmp_path / "snippet.py").write_text(engine.snippet(plan)["snippet.py"], encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    expected = decode(launch(engine, "tiny", plan.winner.settings)[0], nonce=0)

    assert [line.split(" ttft_s=")[0] for line in printed] == [
        "prompt_tokens=64 output_tokens=16 batch_size=2",
        "prompt_tokens=300 output_tokens=32 batch_size=1",
    ]
    figures = re.search(r"ttft_s=(\S+) decode_tps=(\S+)$", printed[0])
    assert figures is not None
    assert float(figures[1]) == pytest.approx(expected.requests[0].ttft_s, rel=0.01)
    assert float(figures[2]) == pytest.approx(2 * 15 / decode_s(expected), rel=0.01)


def plan_for(engine: Engine, scenarios: tuple[Scenario, ...]) -> Plan:
    return Plan(
        kvat="0.1.0",
        created="2026-01-01T00:00:00Z",
        engine=PlanEngine(name=engine.name, versions={}),
        model=PlanModel(id=engine.own_models[0], revision=None, weights="random", sha256=None),
        machine=Machine(fingerprint="0", device="cpu", cpu="none", cores=1, memory_bytes=1, os="none", python="3"),
        profile=Profile(name="two-shapes", scenarios=scenarios, objective=Objective(decode=1)),
        incumbent=Choice(id="i", label="default", settings=INCUMBENT[engine.name]),
        winner=Choice(id="w", label="best", settings=BEST[engine.name]),
        verdict="better",
        ratio=None,
        confidence=Confidence(level="high", probability=0.99, noise_floor=0.0, epsilon=0.01),
        equivalents=(),
        max_context=None,
        metrics=WinnerMetrics(error_rate=0.0, jitter=None),
        candidates=(),
        journal=JournalRef(file="journal.jsonl", sha256="0", samples=0),
    )
