"""The examples do what they say, run as a user would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvat_core import Objective, Profile, Scenario, TuneRequest, tune

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_infer.py"
QUICK = Profile(
    name="quick",
    scenarios=(Scenario(prompt_tokens=16, output_tokens=4),),
    objective=Objective(decode=1),
    launches=1,
    samples=1,
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "llama"
    tune(TuneRequest(model="builtin:llama", profile=QUICK, pinned={"attention": "sdpa"}, threads=1, out=out))
    return out / "best_plan.json"


def infer(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_plan_continues_a_text(plan: Path) -> None:
    done = infer(plan, "<k07> <v31> .. <k02> <v05> .. <query> <k07>", "--max-new-tokens", 1)
    assert (done.returncode, done.stdout) == (0, "<v31>\n"), done.stderr


def test_a_plan_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = infer(tmp_path / "none.json", "text")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read plan")
    assert done.stderr.count("\n") == 1
