"""Faults that pass for speed, in real child processes: each is caught, named, and never wins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvat_core.journal import read_journal
from kvat_core.run import Run

pytestmark = pytest.mark.slow

ENGINE = Path(__file__).parent / "faulty_engine"
TUNE = """
import sys
from kvat_core import Profile, TuneRequest, tune
from kvat_core.errors import AllFailed
from kvat_core.schema import Objective, Scenario

profile = Profile(
    name="planted",
    scenarios=(Scenario(prompt_tokens=96, output_tokens=8),),
    objective=Objective(ttft=1, decode=1),
    launches=1,
    samples=1,
)
out, engine = sys.argv[1:]
pinned = {"cache": "static", "attention": "sdpa", "dtype": "float32"}
try:
    tune(TuneRequest(out=out, engine=engine, model="builtin:llama", threads=1, profile=profile, pinned=pinned))
except AllFailed as error:
    print(error)
"""
NAMES = {
    "secretly-dynamic": "SecretlyDynamicEngine",
    "forgetful": "ForgetfulEngine",
    "sharing": "SharingEngine",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the faulty engines are installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ENGINE, site, dirs_exist_ok=True)
    info = site / "kvat_faulty_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-faulty-engine\nVersion: 1.0\n")
    lines = [f"{name} = kvat_faulty_engine:{engine}" for name, engine in NAMES.items()]
    (info / "entry_points.txt").write_text("\n".join(["[kvat.engines]", *lines, ""]))
    return site


def tuned(site: Path, out: Path, engine: str) -> Run:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", TUNE, str(out), engine]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Run.from_events(read_journal(out / "journal.jsonl"))


@pytest.mark.parametrize(
    ("engine", "kind", "reason"),
    [
        ("secretly-dynamic", "not_applied", "cache: the recipe says StaticCache, it is DynamicCache"),
        ("forgetful", "wrong_output", "differs from its reference: KL"),
        ("sharing", "leak", "a request is answered differently after a longer and after a shorter one"),
    ],
)
def test_a_planted_fault_is_caught_by_its_kind(site: Path, tmp_path: Path, engine: str, kind: str, reason: str) -> None:
    run = tuned(site, tmp_path / "out", engine)
    assert run.failures, "it was caught"
    assert {one.failure.kind for one in run.failures.values()} == {kind}
    assert all(reason in one.failure.reason for one in run.failures.values())
    assert run.live == ()
