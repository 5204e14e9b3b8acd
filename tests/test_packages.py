"""What every package owes its users, whoever wrote it."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGES = sorted(path.parent for path in Path(__file__).parents[1].glob("packages/*/pyproject.toml"))

pytestmark = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)


def metadata(package: Path) -> importlib.metadata.PackageMetadata:
    return importlib.metadata.metadata(package.name)


def test_it_installs_one_typed_package_of_its_own_name(package: Path) -> None:
    import_name = package.name.replace("-", "_")
    assert [path.name for path in (package / "src").iterdir() if path.is_dir()] == [import_name]
    assert (package / "src" / import_name / "py.typed").exists()
    assert import_name != "kvat"  # another distribution on the public index installs that one


def test_it_introduces_itself(package: Path) -> None:
    assert (package / "README.md").read_text().startswith(f"# {package.name}\n")
    assert metadata(package)["Summary"]


def test_its_changelog_describes_its_version(package: Path) -> None:
    released = re.findall(r"^## \[?(\d[^\]\s]*)", (package / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[:1] == [metadata(package)["Version"]]


def test_all_packages_have_one_version(package: Path) -> None:
    assert metadata(package)["Version"] == metadata(PACKAGES[0])["Version"]


def test_its_licence_is_in_its_metadata(package: Path) -> None:
    assert metadata(package)["License-Expression"] == "Apache-2.0"


def test_it_accepts_a_range_of_its_siblings(package: Path) -> None:
    siblings = {path.name for path in PACKAGES}
    requirements = map(Requirement, importlib.metadata.requires(package.name) or [])
    for requirement in (requirement for requirement in requirements if requirement.name in siblings):
        operators = {bound.operator for bound in requirement.specifier}
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name))
        assert operators in ({">=", "<"}, {"~="}), f"{requirement} is no compatible range"


def test_nothing_in_it_runs_what_it_reads(package: Path) -> None:
    modules = r"\b(?:import|from) (?:pickle|dill|marshal|shelve)\b"
    calls = r"\btorch\.load\(|(?<![.\w])(?:eval|exec)\(|yaml\.load\(|shell=True"
    forbidden = re.compile(f"{modules}|{calls}")
    for module in (package / "src").rglob("*.py"):
        found = [line for line in module.read_text().splitlines() if forbidden.search(line)]
        assert not found, f"{module.name}: {found[0]}"
