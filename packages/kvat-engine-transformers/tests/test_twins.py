"""Candidates that are the very same thing, on a real model: whatever noise there is, none is called better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvat_core.schema import read_plan

pytestmark = pytest.mark.slow

TUNE = """
import sys
from kvat_core import Profile, TuneRequest, tune
from kvat_core.schema import Objective, Scenario

profile = Profile(
    name="twins",
    scenarios=(Scenario(prompt_tokens=32, output_tokens=16),),
    objective=Objective(ttft=1, decode=1),
    launches=3,
    samples=3,
)
out, seed = sys.argv[1:]
tune(TuneRequest(out=out, engine="twins", model="builtin:llama", threads=1, profile=profile, seed=int(seed)))
"""


@pytest.fixture(scope="module")
def run_with_twins(with_engines: Callable[..., Callable[..., None]]) -> Callable[..., None]:
    return with_engines("twin_engine", {"twins": "TwinEngine"})


@pytest.mark.parametrize("seed", [0, 1])
def test_of_twins_none_is_better(run_with_twins: Callable[..., None], tmp_path: Path, seed: int) -> None:
    run_with_twins(TUNE, str(tmp_path / "out"), str(seed))
    plan = read_plan(tmp_path / "out" / "best_plan.json")
    assert [one.state for one in plan.candidates] == ["ok"] * 4
    assert not any(one.aliases for one in plan.candidates)
    assert plan.verdict in ("tie", "undecided")
    assert plan.winner == plan.incumbent
