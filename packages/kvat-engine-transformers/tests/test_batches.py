"""Batches from the request to the snippet, of equal and of unequal prompts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from kvat_core import Objective, Plan, Profile, Scenario, TuneRequest, metrics, tune
from kvat_core.engine import EngineError
from kvat_core.journal import read_journal
from kvat_core.schema import PromptSource, Recipe, Sample
from kvat_engine_transformers import TransformersAdapter, builtin_path
from kvat_engine_transformers.calling import actions, batching
from kvat_engine_transformers.calling.prompts import model_inputs, unpadded
from kvat_engine_transformers.measuring.adapter import digest
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.settings.recipes import PAGE_TOKENS, STEP_TOKENS

QUICK = Profile(
    name="quick",
    scenarios=(Scenario(prompt_tokens=24, output_tokens=4),),
    objective=Objective(ttft=1, decode=1),
    launches=2,
    samples=1,
)
ONE_LOAD = {"attention": "sdpa", "dtype": "float32", "cache": "dynamic"}


def tuned(out: Path, profile: Profile, **changes: object) -> Plan:
    fields = {"model": "builtin:llama", "threads": 1, "pinned": ONE_LOAD, **changes}
    return tune(TuneRequest(out=out, profile=profile, **fields)).plan  # type: ignore[arg-type]


def printed(snippet: Path) -> list[dict[str, str]]:
    done = subprocess.run([sys.executable, str(snippet)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [dict(pair.split("=") for pair in line.split()) for line in done.stdout.splitlines()]


def test_batch_sizes_are_measured_reported_and_handed_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = tuned(out, QUICK, batches=(1, 4))
    assert [scenario.key for scenario in plan.profile.scenarios] == ["24+4x1", "24+4x4"]
    (one, four) = plan.candidates[0].scenarios
    assert (one.batch_size, four.batch_size) == (1, 4)
    assert four.kv_cache_bytes == four.kv_cache_predicted_bytes is not None
    samples = [event for event in read_journal(out / "journal.jsonl") if isinstance(event, Sample)]
    for sample in samples:
        (request,) = sample.requests
        assert request.count == int(sample.scenario.rpartition("x")[2])
        # Of all requests together: what each decodes in the time of one.
        assert metrics.decode_tps(sample) == pytest.approx(request.count / metrics.tpot_s(sample))
    assert [line["batch_size"] for line in printed(out / "snippet.py")] == ["1", "4"]
    assert "| 24+4x4 | 24 | 4 | 4 | 50 % |" in (out / "report.md").read_text()


UNEQUAL = Scenario(prompt_tokens=24, output_tokens=6, batch_size=3, shortest_prompt_tokens=6)
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]


def test_a_shorter_prompt_is_padded_on_the_left(prepared: Prepared) -> None:
    adapter, _ = prepared("builtin:llama", UNEQUAL)
    prompt = adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1)
    assert [len(row) for row in unpadded(prompt)] == [6, 15, 24]
    inputs = model_inputs(prompt)
    assert inputs["attention_mask"].sum(1).tolist() == [6, 15, 24]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert int(inputs["input_ids"].min()) >= 0
    even = adapter.make_prompt(TEXT, [24] * 3, 1)
    assert torch.equal(model_inputs(even)["attention_mask"], torch.ones_like(even))


@pytest.mark.parametrize("model_id", ["builtin:llama", "builtin:mistral"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cache": "static"}, {"attention": "eager"}, {"attention": "sdpa_math"}, {"cache": "paged"}],
    ids=str,
)
def test_padding_changes_no_answer_and_no_count(prepared: Prepared, model_id: str, settings: dict[str, str]) -> None:
    adapter, _ = prepared(model_id, UNEQUAL, **settings)
    prompt = adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1)
    assert adapter.applied(prompt).mismatches == ()
    timeline = adapter.run_decode(prompt, UNEQUAL.output_tokens)
    assert metrics.invalid_reason(timeline, UNEQUAL) is None
    together = adapter.generate(prompt, UNEQUAL.output_tokens).tokens[:, 24:].tolist()
    alone = []
    for row in unpadded(prompt):
        single = Scenario(prompt_tokens=len(row), output_tokens=UNEQUAL.output_tokens)
        adapter, _ = prepared(model_id, single, **settings)
        alone.append(adapter.generate(torch.tensor([row]), UNEQUAL.output_tokens).tokens[0, len(row) :].tolist())
    assert together == alone


def test_the_snippet_measures_unequal_prompts_as_the_plan_did(tmp_path: Path) -> None:
    out = tmp_path / "out"
    profile = QUICK.model_copy(update={"scenarios": (UNEQUAL,)})
    plan = tuned(out, profile)
    assert [result.key for result in plan.candidates[0].scenarios] == ["24+6x3from6"]
    (line,) = printed(out / "snippet.py")
    assert (line["prompt_tokens"], line["shortest_prompt_tokens"], line["batch_size"]) == ("24", "6", "3")
    assert "| 24+6x3from6 | 6 to 24 | 6 | 3 |" in (out / "report.md").read_text()


@pytest.mark.uses("paged")
def test_the_snippet_of_a_paged_cache_pads_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    profile = QUICK.model_copy(update={"scenarios": (UNEQUAL,)})
    tuned(out, profile, pinned={**ONE_LOAD, "cache": "paged"}, space="full")
    assert "kept.bool()" in (out / "snippet.py").read_text()
    (line,) = printed(out / "snippet.py")
    assert float(line["decode_tps"]) > 0


@pytest.mark.uses("paged")
def test_handed_over_a_paged_batch_has_the_rows_of_generate(prepared: Prepared) -> None:
    adapter, recipe = prepared("builtin:llama", UNEQUAL, cache="paged")
    handed_over = handover.imported(recipe, STEP_TOKENS)
    inputs = model_inputs(adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1))
    free = adapter.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 24:].tolist()
    # The third token of a row, which no other row has, and itself not before: that row ends early.
    end = next(row[2] for row in free if row[2] not in row[:2] and sum(row[2] in other for other in free) == 1)
    for options in ({}, {"pad_token_id": 5}, {"eos_token_id": [end, 300]}):
        how = {"max_new_tokens": 12, "eos_token_id": end, **options}
        expected = adapter.model.generate(**inputs, do_sample=False, **how)
        assert sum(row[3:].unique().numel() == 1 for row in expected[:, 24:]) >= 1, "a row is padded"
        assert torch.equal(handed_over.generate(adapter.model, **inputs, **how), expected)
    twice = handed_over.generate(adapter.model, **inputs, max_new_tokens=4, num_return_sequences=2, do_sample=True)
    assert torch.equal(twice[:, :24], inputs["input_ids"].repeat_interleave(2, dim=0))


@pytest.mark.uses("paged")
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("DefaultCPUAllocator: can't allocate memory", "oom_host"),
        ("CUDA out of memory. Tried to allocate 9.00 GiB.", "oom_device"),
        ("CUDA error: device-side assert triggered", "device_error"),
        ("a defect", None),
    ],
)
def test_handed_over_a_batch_that_failed_is_no_answer(prepared: Prepared, text: str, kind: str | None) -> None:
    adapter, _ = prepared("builtin:llama", UNEQUAL, cache="paged")
    prompt = adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1)

    def fail(*arguments: object) -> None:
        raise RuntimeError(text)

    hook = adapter.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises((RuntimeError, EngineError)) as caught:
            adapter.answer(prompt, 4, UNEQUAL.total_tokens)
        with pytest.raises(EngineError) as timed:
            adapter.run_decode(prompt, 4)
    finally:
        hook.remove()
    assert getattr(caught.value, "kind", None) == kind
    assert timed.value.kind == (kind or "error")


@pytest.mark.uses("paged")
def test_handed_over_a_batch_that_is_given_up_is_no_answer(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = prepared("builtin:llama", UNEQUAL, cache="paged")
    monkeypatch.setitem(vars(adapter.model), "generate_batch", lambda *arguments, **options: {})
    with pytest.raises(RuntimeError, match=r"^3 of 3 prompts have no answer$"):
        adapter.answer(adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1), 4, UNEQUAL.total_tokens)


def test_nothing_is_no_answer(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = prepared("builtin:llama", UNEQUAL)
    monkeypatch.setitem(vars(adapter.model), "generate", lambda input_ids, **options: input_ids)
    with pytest.raises(EngineError, match="the code that is handed over answered nothing") as caught:
        adapter.answer(adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1), 4, UNEQUAL.total_tokens)
    assert caught.value.kind == "no_output"


@pytest.mark.parametrize("cache", ["dynamic", "static", "paged"])
def test_the_code_that_is_handed_over_answers_unequal_prompts_as_they_are_timed(prepared: Prepared, cache: str) -> None:
    adapter, _ = prepared("builtin:llama", UNEQUAL, cache=cache)
    prompt = adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1)
    timed = adapter.generate(prompt, UNEQUAL.output_tokens).tokens
    assert adapter.answer(prompt, UNEQUAL.output_tokens, UNEQUAL.total_tokens).tokens == digest(timed, prompt)


@pytest.mark.uses("paged")
@pytest.mark.parametrize(
    ("habit", "reason"),
    [
        ({"repetition_penalty": 1.1}, "generate_batch has no RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 4}, "generate_batch has no MinNewTokensLengthLogitsProcessor"),
        ({"max_time": 60.0}, "generate_batch does not stop by max_time, which the generation_config sets"),
    ],
)
def test_a_paged_cache_is_refused_where_it_would_answer_otherwise(
    prepared: Prepared, tmp_path: Path, habit: dict[str, float], reason: str
) -> None:
    shutil.copytree(builtin_path("llama"), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **habit}))
    adapter, _ = prepared(str(tmp_path / "model"), UNEQUAL, cache="paged")
    with pytest.raises(EngineError, match=reason) as caught:
        adapter.applied(adapter.make_prompt(TEXT, UNEQUAL.prompt_lengths, 1))
    assert caught.value.kind == "unsupported"


@pytest.mark.uses("paged")
def test_the_gradient_mode_of_continuous_batching_is_seen_where_it_computes(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = prepared("builtin:llama", cache="paged")
    prompt = adapter.make_prompt(TEXT, [48], 1)
    assert adapter.applied(prompt).values["grad_mode"] == "no_grad"
    run = threading.Thread.run

    def run_otherwise(self: threading.Thread) -> None:
        with torch.inference_mode():
            run(self)

    # Since Transformers 5.24 the caller's mode is handed on to the thread, before that the thread keeps what it has.
    monkeypatch.setattr(threading.Thread, "run", run_otherwise)
    with torch.inference_mode():
        applied = adapter.applied(prompt)
    assert "grad mode: the recipe says no_grad, it is inference_mode" in applied.mismatches


@pytest.mark.uses("paged")
def test_blocks_are_shared_by_equal_beginnings_which_prompts_that_are_measured_have_not(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request finds the blocks of one whose prompt is in, so here one prompt is computed at a time."""
    found: list[int] = []
    search = PagedAttentionCache.search_prefix_match

    def search_and_note(self: PagedAttentionCache, *arguments: Any) -> int:
        found.append(search(self, *arguments))
        return found[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", search_and_note)
    scenario = Scenario(prompt_tokens=600, output_tokens=4, batch_size=2)
    adapter, made = prepared("builtin:llama", scenario, cache="paged", block_sharing="on")
    fields = actions.arguments(made)
    fields["continuous_batching_config"]["max_batch_tokens"] = scenario.prompt_tokens
    prompt = adapter.make_prompt(TEXT, scenario.prompt_lengths, 1)
    batching.generate(adapter.model, prompt.tolist(), fields)
    batching.generate(adapter.model, prompt[:1].repeat(2, 1).tolist(), fields)
    assert found == [0, 0, 0, 2 * PAGE_TOKENS]
