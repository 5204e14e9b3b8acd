"""The direction of imports is checked, and the check can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources of all packages."""
    for package in (ROOT / "packages").glob("*/src/*"):
        if package.is_dir():
            shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint_imports(sources: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINTER, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": str(sources), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tree_keeps_to_its_layers(sources: Path) -> None:
    result = lint_imports(sources)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("planted", ["torch", "kvat_cli", "kvat_engine_transformers"])
def test_what_core_must_not_import_is_named_with_module_and_line(sources: Path, planted: str) -> None:
    module = sources / "kvat_core" / "errors.py"
    line = len(module.read_text().splitlines()) + 1
    with module.open("a") as text:
        text.write(f"import {planted}\n")

    result = lint_imports(sources)

    assert result.returncode == 1
    assert f"kvat_core.errors -> {planted} (l.{line})" in result.stdout


def test_what_can_be_set_knows_nothing_of_a_plan_at_work(sources: Path) -> None:
    (sources / "kvat_engine_transformers/settings/planted.py").write_text(
        "import kvat_engine_transformers.serving.runtime\n"
    )

    result = lint_imports(sources)

    assert result.returncode == 1
    assert "settings.planted -> kvat_engine_transformers.serving.runtime (l.1)" in result.stdout


@pytest.mark.parametrize("package", ["kvat_cli", "kvat_report"])
def test_only_entry_points_lead_to_an_engine(sources: Path, package: str) -> None:
    (sources / package / "planted.py").write_text("import kvat_engine_transformers\n")

    result = lint_imports(sources)

    assert result.returncode == 1
    assert f"{package}.planted -> kvat_engine_transformers (l.1)" in result.stdout
