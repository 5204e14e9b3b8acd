"""Batches from the request to the snippet, of equal and of unequal prompts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvat_core import Objective, Plan, Profile, Scenario, TuneRequest, metrics, tune
from kvat_core.journal import read_journal
from kvat_core.schema import PromptSource, Recipe, Sample
from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.prompts import model_inputs, unpadded

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


def test_the_snippet_of_a_paged_cache_pads_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    profile = QUICK.model_copy(update={"scenarios": (UNEQUAL,)})
    tuned(out, profile, pinned={**ONE_LOAD, "cache": "paged"}, space="full")
    assert "kept.bool()" in (out / "snippet.py").read_text()
    (line,) = printed(out / "snippet.py")
    assert float(line["decode_tps"]) > 0
