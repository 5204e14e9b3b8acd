"""Faults that pass for speed, in real child processes: each is caught, named, and never wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvat_core.journal import read_journal
from kvat_core.run import Run

pytestmark = pytest.mark.slow

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
def run_with_faults(with_engines: Callable[..., Callable[..., None]]) -> Callable[..., None]:
    return with_engines("faulty_engine", NAMES)


@pytest.mark.parametrize(
    ("engine", "kind", "reason"),
    [
        ("secretly-dynamic", "not_applied", "cache: the recipe says StaticCache, it is DynamicCache"),
        ("forgetful", "wrong_output", "differs from its reference: KL"),
        ("sharing", "leak", "a request is answered differently after a longer and after a shorter one"),
    ],
)
def test_a_planted_fault_is_caught_by_its_kind(
    run_with_faults: Callable[..., None], tmp_path: Path, engine: str, kind: str, reason: str
) -> None:
    run_with_faults(TUNE, str(tmp_path / "out"), engine)
    run = Run.from_events(read_journal(tmp_path / "out" / "journal.jsonl"))
    assert run.failures, "it was caught"
    assert {one.failure.kind for one in run.failures.values()} == {kind}
    assert all(reason in one.failure.reason for one in run.failures.values())
    assert run.live == ()
