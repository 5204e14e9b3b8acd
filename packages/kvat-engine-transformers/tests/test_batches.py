"""Batches from the request to the snippet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvat_core import Objective, Plan, Profile, Scenario, TuneRequest, metrics, tune
from kvat_core.journal import read_journal
from kvat_core.schema import Sample

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
