"""Candidates that are the very same thing, on a real model: whatever noise there is, none is called better."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvat_core.schema import read_plan

pytestmark = pytest.mark.slow

ENGINE = Path(__file__).parent / "twin_engine"
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
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the engine of twins is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ENGINE, site, dirs_exist_ok=True)
    info = site / "kvat_twin_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-twin-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvat.engines]\ntwins = kvat_twin_engine:TwinEngine\n")
    return site


@pytest.mark.parametrize("seed", [0, 1])
def test_of_twins_none_is_better(site: Path, tmp_path: Path, seed: int) -> None:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", TUNE, str(tmp_path / "out"), str(seed)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = read_plan(tmp_path / "out" / "best_plan.json")
    assert [one.state for one in plan.candidates] == ["ok"] * 4
    assert not any(one.aliases for one in plan.candidates)
    assert plan.verdict in ("tie", "undecided")
    assert plan.winner == plan.incumbent
