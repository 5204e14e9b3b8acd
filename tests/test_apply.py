"""`kvat apply` with the Transformers engine, which must not wake torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvat_cli.boundary import main
from kvat_core import read_plan
from kvat_core.engine import Probe
from kvat_core.schema import ModelShape
from kvat_engine_transformers.settings import knobs


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the fake engine, as if the Transformers engine had made it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["tune", "--engine", "fake", "--model", "fake:tiny", "--quiet", "--out", str(out)]) == 0
    made = read_plan(out / "best_plan.json")
    shape = ModelShape(architecture="llama", layers=1, attention=("full",))
    defaults = {knob.name: knob.default for knob in knobs.space(shape, Probe(device="cpu", versions={}), None)}
    assert made.winner is not None
    winner = made.winner.model_copy(update={"settings": {**defaults, "cache": "static", "threads": "1"}})
    engine = made.engine.model_copy(update={"name": "transformers"})
    path = out / "transformers.json"
    path.write_text(made.model_copy(update={"winner": winner, "engine": engine}).model_dump_json())
    return path


@pytest.mark.parametrize("words", [["--print-snippet"], ["--partial", "--generation-config"]])
def test_apply_imports_no_engine_library(plan: Path, tmp_path: Path, words: list[str]) -> None:
    folder = [str(tmp_path)] if "--partial" in words else []
    code = (
        "import sys; from kvat_cli.boundary import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'scipy', 'numpy', 'rich', 'jinja2'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "apply", "--plan", str(plan), *words, *folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if folder:
        assert "does not fit generation_config.json: threads=1, for torch.set_num_threads" in done.stdout
