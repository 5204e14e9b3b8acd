"""Whole tunes of real models in real child processes, and the snippets that come out."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from kvat_core import Plan, Profile, TuneRequest, tune
from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.journal import read_journal
from kvat_core.schema import (
    AnotherLength,
    CandidateEntry,
    Choice,
    FirstCall,
    ModelRef,
    ModelShape,
    Objective,
    PromptSource,
    Recipe,
    Scenario,
    Space,
    Target,
)
from kvat_core.space import enumerate_candidates
from kvat_engine_transformers import TransformersAdapter, TransformersEngine
from kvat_engine_transformers.calling import actions
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.settings import knobs, reading
from kvat_engine_transformers.settings.caches import CACHES
from kvat_engine_transformers.settings.recipes import STEP_TOKENS, recipe

QUICK = Profile(
    name="quick",
    scenarios=(Scenario(prompt_tokens=32, output_tokens=8), Scenario(prompt_tokens=16, output_tokens=4)),
    objective=Objective(ttft=1, decode=1),
    launches=2,
    samples=2,
    prompt=PromptSource(kind="text", value="some words of the user's own"),
)


Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
ONE_LOAD = {"attention": "sdpa", "dtype": "bfloat16"}


def tuned(out: Path, model: str, **changes: Any) -> Plan:
    return tune(TuneRequest(**{"model": model, "out": out, "profile": QUICK, "threads": 1, **changes})).plan


def lines(snippet: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, str(snippet), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [dict(pair.split("=") for pair in line.split()) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    out = tmp_path_factory.mktemp("runs") / "llama"
    return out, tuned(out, "builtin:llama")


def test_every_safe_candidate_is_measured(run: tuple[Path, Plan]) -> None:
    _, plan = run
    ok = [candidate for candidate in plan.candidates if candidate.state == "ok"]
    assert len(ok) == 6
    assert all(len(candidate.scenarios) == 2 for candidate in ok)
    assert {candidate.state for candidate in plan.candidates} == {"ok", "excluded"}
    assert plan.machine.threads == 1


def test_the_snippet_runs_each_scenario_and_prints_the_plans_metrics(run: tuple[Path, Plan]) -> None:
    printed = lines(run[0] / "snippet.py")
    assert [(line["prompt_tokens"], line["output_tokens"]) for line in printed] == [("16", "4"), ("32", "8")]
    for line in printed:
        assert float(line["ttft_s"]) > 0
        assert float(line["decode_tps"]) > 0


def test_what_a_caller_asks_for_comes_before_what_was_measured(run: tuple[Path, Plan]) -> None:
    code = (
        "import torch, snippet\n"
        "model = snippet.load()\n"
        "ids = torch.arange(8).repeat(2, 1)\n"
        "mask = torch.ones_like(ids); mask[0, :4] = 0\n"
        "output = snippet.generate(model, ids, 4, attention_mask=mask, do_sample=True, return_dict_in_generate=True)\n"
        "print(output.sequences.shape[1], type(output).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=run[0], capture_output=True, text=True, check=False)
    assert done.stdout == "12 GenerateDecoderOnlyOutput\n", done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "paged"}, "does not know attention=paged; use the version that wrote the plan"),
        ({"chunk": "16"}, "does not know chunk=16"),
        ({"cache": None}, "the plan says nothing of cache"),
    ],
)
def test_a_plan_that_this_version_cannot_carry_out_gives_no_snippet(
    run: tuple[Path, Plan], settings: dict[str, str | None], message: str
) -> None:
    _, plan = run
    known = {knob: value for knob, value in {**plan.winner.settings, **settings}.items() if value is not None}
    changed = plan.model_copy(update={"winner": plan.winner.model_copy(update={"settings": known})})
    with pytest.raises(UsageError, match=message):
        TransformersEngine().snippet(changed)


def test_nothing_of_the_users_prompt_or_machine_is_written(run: tuple[Path, Plan]) -> None:
    import getpass
    import socket

    written = "".join(path.read_text() for path in run[0].iterdir() if path.is_file())
    assert "words of the user" not in written
    assert socket.gethostname() not in written
    assert str(Path.home() / "") not in written
    assert str(run[0]) not in written
    assert getpass.getuser() not in {word for word in written.replace('"', " ").split() if word != "root"}


def test_a_local_model_is_named_by_its_last_part_and_its_snippet_takes_the_path(
    tmp_path: Path, tiny_directory: Path
) -> None:
    plan = tuned(tmp_path / "out", str(tiny_directory), pinned=ONE_LOAD)
    assert plan.model.id == "./tiny"
    assert str(tiny_directory.parent) not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert len(lines(tmp_path / "out" / "snippet.py", str(tiny_directory))) == 2
    astray = subprocess.run(
        [sys.executable, "out/snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert astray.returncode == 1
    assert astray.stderr == (
        "there is no directory ./tiny; say where the model is: python snippet.py MODEL_DIRECTORY\n"
    )


def test_random_weights_are_said_everywhere(tmp_path: Path, tiny_directory: Path) -> None:
    plan = tuned(tmp_path / "out", f"random:{tiny_directory}", pinned=ONE_LOAD)
    assert plan.model.weights == "random"
    assert any("weights are random" in note for note in plan.notes)
    assert "weights are random" in (tmp_path / "out" / "snippet.py").read_text()
    assert len(lines(tmp_path / "out" / "snippet.py", str(tiny_directory))) == 2


@pytest.mark.slow
def test_a_compiled_candidate_compiles_before_it_is_timed(tmp_path: Path) -> None:
    settings = {"cache": "static", "compile": "default", "attention": "sdpa", "grad_mode": "no_grad"}
    profile = QUICK.model_copy(update={"scenarios": QUICK.scenarios[:1], "launches": 2})
    plan = tuned(tmp_path / "out", "builtin:llama", pinned=settings, space="default", profile=profile)
    assert plan.winner.settings["compile"] == "default"
    assert any("the winner compiles code" in note for note in plan.notes)
    events = list(read_journal(tmp_path / "out" / "journal.jsonl"))
    (first, second) = [event for event in events if isinstance(event, FirstCall)]
    assert (first.cold, second.cold) == (True, False)
    assert first.compilations > 0
    assert second.compilations > 0
    cost = plan.candidates[0].scenarios[0].compile_cost
    assert cost is not None
    assert cost.cached_first_call_s is not None
    # A cache that an earlier run had filled would make both alike.
    assert cost.first_call_s > 1.5 * cost.cached_first_call_s
    (other,) = [event for event in events if isinstance(event, AnotherLength)]
    assert (other.launch, other.failure) == (first.launch, None)
    assert other.prompt_tokens == profile.scenarios[0].prompt_tokens - 1
    of_launch = [type(event).__name__ for event in events if getattr(event, "launch", None) == first.launch]
    assert of_launch[-4:] == ["Sample", "Measured", "AnotherLength", "LaunchEnd"]
    # A decoding step has the same shapes whatever the prompt, as long as the slots are the same.
    assert other.compilations == cost.another_length_graphs == 0
    assert cost.another_length_s is not None
    assert cost.another_length_s < cost.compile_s
    assert "The first call compiles" in (tmp_path / "out" / "snippet.py").read_text()
    assert plan.candidates[0].state == "ok"
    assert len(lines(tmp_path / "out" / "snippet.py")) == 1


def test_without_a_compiler_a_compiled_candidate_is_unsupported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(python))
    monkeypatch.delenv("CXX", raising=False)
    pinned = {"grad_mode": "no_grad", "attention": "sdpa"}
    profile = QUICK.model_copy(update={"launches": 1})
    plan = tuned(tmp_path / "out", "builtin:llama", space="default", pinned=pinned, profile=profile)
    compiled = [candidate for candidate in plan.candidates if candidate.settings["compile"] == "default"]
    assert compiled
    assert all("found none; install g++" in (candidate.reason or "") for candidate in compiled)


def reachable(space: Space, devices: Sequence[str] = ("cpu", "cuda:0", "mps")) -> list[CandidateEntry]:
    """Every candidate that one of the devices could be given."""
    shape = ModelShape(architecture="llama", layers=2, attention=("full", "full"), dtype="bfloat16")
    found: dict[str, CandidateEntry] = {}
    for device in devices:
        probe = Probe(device=device, versions={}, threads=1)
        entries = enumerate_candidates(
            knobs.space(shape, probe, None),
            space,
            pinned={},
            excluded=(),
            incumbent={},
            check=lambda settings, probe=probe: knobs.check(settings, shape, probe),
        )
        found |= {entry.candidate.id: entry for entry in entries if entry.exclusion is None}
    return list(found.values())


@pytest.mark.parametrize(
    ("model_id", "space"),
    [
        ("builtin:mistral", "full"),
        ("random:smollm2-135m", "safe"),
        ("./mine", "safe"),
        ("random:./mine", "safe"),
        ("owner/name", "safe"),
        ('./my"\\model', "safe"),
    ],
)
def test_every_candidate_has_a_snippet_that_parses_and_carries_its_recipe(
    run: tuple[Path, Plan], model_id: str, space: Space
) -> None:
    _, plan = run
    for entry in reachable(space):
        candidate = entry.candidate
        winner = Choice(id=candidate.id, label=candidate.label, settings=candidate.settings)
        model = plan.model.model_copy(update={"id": model_id})
        text = TransformersEngine().snippet(plan.model_copy(update={"winner": winner, "model": model}))["snippet.py"]
        ast.parse(text)
        assert ("import kvat" in text or "from kvat" in text) == model_id.startswith(("builtin:", "random:"))
        assert f"torch.{candidate.settings['dtype']}" in text
        assert ("torch.inference_mode(" in text) == (candidate.settings["grad_mode"] == "inference_mode")
        assert ("sdpa_kernel(" in text) == candidate.settings["attention"].startswith("sdpa_")
        settings, kind = candidate.settings, CACHES[candidate.settings["cache"]]
        assert ('"max_cache_len": input_ids.shape[1] + max_new_tokens' in text) == kind.static
        assert ("CompileConfig(" in text) == (settings["compile"] not in ("off", "auto"))
        assert ("torch.compiler.reset()" in text) == (
            settings["compile"] != "off" or settings["attention"] == "flex_attention"
        )
        assert ("model.generate_batch(" in text) == (settings["cache"] == "paged")
        assert all(f'"{name}": {value!r}'.replace("'", '"') in text for name, value in kind.quantised.items())


KERNELS = {
    "MATH": torch.backends.cuda.math_sdp_enabled,
    "FLASH_ATTENTION": torch.backends.cuda.flash_sdp_enabled,
    "EFFICIENT_ATTENTION": torch.backends.cuda.mem_efficient_sdp_enabled,
    "CUDNN_ATTENTION": torch.backends.cuda.cudnn_sdp_enabled,
}
"""Whether a kernel of SDPA may be chosen, whatever the device."""


def recipes_of_the_cpu(call: str, scenario: Scenario) -> list[Recipe]:
    """One of each that is handed over as other code."""
    target = Target(model=ModelRef(id="builtin:llama"), device="cpu", threads=1)
    entries = reachable("full", devices=["cpu"])
    made = [recipe(entry.candidate.settings, scenario, target) for entry in entries]
    return list({handover.source(one, STEP_TOKENS): one for one in made if one.call == call}.values())


def comparable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = {torch.Tensor: torch.Tensor.tolist, CompileConfig: vars}
    return {name: plain.get(type(value), lambda same: same)(value) for name, value in arguments.items()}


def test_every_candidate_of_the_cpu_runs_from_its_snippet_as_its_recipe_says(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than any chunk.
    scenario = Scenario(prompt_tokens=2 * max(knobs.PREFILL_CHUNKS), output_tokens=3)
    adapter, _ = prepared("builtin:llama")
    padding = adapter.model.generation_config.pad_token_id
    ids = padding + 1 + torch.arange(scenario.prompt_tokens)[None]
    seen: list[tuple[dict[str, Any], bool, set[str]]] = []

    def allowed() -> set[str]:
        return {kernel for kernel, is_enabled in KERNELS.items() if is_enabled()}

    def generate(**arguments: Any) -> torch.Tensor:
        seen.append((arguments, torch.is_inference_mode_enabled(), allowed()))
        return ids

    monkeypatch.setitem(vars(adapter.model), "generate", generate)
    made = recipes_of_the_cpu("generate", scenario)
    for one in made:
        handover.imported(one, STEP_TOKENS).generate(adapter.model, ids, 3)
        arguments, in_inference_mode, kernels = seen.pop()
        expected = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **actions.arguments(one)}
        assert comparable(arguments) == comparable(expected)
        assert in_inference_mode == (reading.grad_mode(one) == "inference_mode")
        forced = reading.forced_kernel(one)
        assert kernels == (allowed() if forced is None else {forced})
    assert {one.arguments["cache_implementation"] for one in made} >= {"dynamic", "static"}
    assert {one.arguments["prefill_chunk_size"] for one in made} == {None, *knobs.PREFILL_CHUNKS}
    assert {reading.forced_kernel(one) for one in made} == {None, "MATH", "FLASH_ATTENTION"}


@pytest.mark.uses("paged")
def test_every_paged_candidate_of_the_cpu_runs_from_its_snippet_as_its_recipe_says(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = Scenario(prompt_tokens=300, output_tokens=3, batch_size=2)
    adapter, _ = prepared("builtin:llama", cache="paged")
    row = adapter.model.generation_config.pad_token_id + 1 + torch.arange(300)
    ids = torch.stack([row, row.flip(0)])
    run, seen = adapter.model.generate_batch, []

    def generate_batch(rows: list[list[int]], **arguments: Any) -> Any:
        seen.append({name: dict(vars(arguments[name])) for name in ("generation_config", "continuous_batching_config")})
        return run(rows, **arguments)

    greedy = adapter.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    monkeypatch.setitem(vars(adapter.model), "generate_batch", generate_batch)
    made = recipes_of_the_cpu("generate_batch", scenario)
    for one in made:
        output = handover.imported(one, STEP_TOKENS).generate(adapter.model, ids, 3, eos_token_id=None)
        assert torch.equal(output, greedy)
        expected = dict(one.arguments)
        pool = expected.pop("continuous_batching_config")
        assert isinstance(pool, dict)
        found = seen.pop()
        assert expected.items() <= found["generation_config"].items()
        assert pool.items() <= found["continuous_batching_config"].items()
    assert len(made) == len(("shared blocks", "blocks of their own"))


def test_a_snippet_measures_prompts_without_padding(
    make_plan: Callable[..., Plan], tmp_path: Path, prepared: Prepared
) -> None:
    # Among ids that are drawn from the whole vocabulary are those of padding, too.
    script = tmp_path / "snippet.py"
    script.write_text(TransformersEngine().snippet(make_plan({"winner": {}}))["snippet.py"])
    module = runpy.run_path(str(script))
    masks: list[torch.Tensor] = []

    def generate(model: Any, input_ids: torch.Tensor, count: int, **options: Any) -> None:
        assert (input_ids == model.generation_config.pad_token_id).any()
        masks.append(options["attention_mask"])
        for _ in range(count + 1):
            options["streamer"].put(None)

    measure = module["measure"]
    measure.__globals__["generate"] = generate
    adapter, _ = prepared("builtin:llama")
    measure(adapter.model, 2048, 3, 2)
    assert masks
    assert all(bool(mask.all()) and mask.shape == (2, 2048) for mask in masks)


def test_the_snippet_keeps_the_chunks_of_the_longest_prompt(make_plan: Callable[..., Plan]) -> None:
    # The scenario that is longest in all has a prompt that is not cut.
    scenarios = (Scenario(prompt_tokens=200, output_tokens=8), Scenario(prompt_tokens=100, output_tokens=300))
    plan = make_plan({"chunked": {"prefill_chunk": "128"}}, profile=QUICK.model_copy(update={"scenarios": scenarios}))
    assert '"prefill_chunk_size": 128' in TransformersEngine().snippet(plan)["snippet.py"]
