"""The benchmark for accelerators: what ends a stage is a result, and not begun anew for ever."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.setattr(sys, "path", [str(GPU), str(GPU.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_benchmark", GPU / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_tests_that_outlast_a_stage_have_failed_and_are_not_begun_again(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "test_endless.py"
    endless.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_endless():\n    time.sleep(3600)\n")
    monkeypatch.setattr(benchmark, "TESTS", endless)
    options = Namespace(directory=tmp_path)

    benchmark.run_tests(options, benchmark.Stage(minutes=0.05))
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["exit_code"] > 0
    assert "no end within 3 s" in found["summary"]

    endless.unlink()
    benchmark.run_tests(options, benchmark.Stage(minutes=1))
    assert json.loads((tmp_path / "tests.json").read_text()) == found
