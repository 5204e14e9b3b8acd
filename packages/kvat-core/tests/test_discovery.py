"""Discovery, with real distributions: wheels that pip installs, seen by a fresh interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pytest

CORE = version("kvat-core")

ENGINE = """
    from kvat_core.fake import FakeEngine

    class {class_name}(FakeEngine):
        name = "{name}"
        own_models = {own_models}
        contract = {contract}
"""

REPORT = """
    class Lines:
        name = "lines"
        file_name = "lines.txt"

        def render(self, plan):
            return "one line"
"""


@dataclass(frozen=True)
class Package:
    """A distribution with one module and one entry point."""

    distribution: str
    version: str
    source: str
    name: str
    target: str
    group: str = "kvat.engines"

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    def wheel(self, folder: Path) -> Path:
        """Write the wheel by hand: no build tool, no network."""
        path = folder / f"{self.module}-{self.version}-py3-none-any.whl"
        info = f"{self.module}-{self.version}.dist-info"
        files = {
            f"{self.module}.py": textwrap.dedent(self.source),
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {self.distribution}\nVersion: {self.version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by-hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": f"[{self.group}]\n{self.name} = {self.module}:{self.target}\n",
        }
        record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in {**files, f"{info}/RECORD": record}.items():
                archive.writestr(name, text)
        return path


def engine(name: str, *, version: str = "1.0", own_models: tuple[str, ...] = (), contract: int = 1) -> Package:
    source = ENGINE.format(class_name="Mine", name=name, own_models=own_models, contract=contract)
    return Package(f"kvat-{name}", version, source, name, "Mine")


FINE = engine("fine", version="1.2", own_models=("fine:", "borrowed"))
OTHER = engine("other", version="1.3", own_models=("borrowed",))
FUTURE = engine("future", version="7.1", contract=99)
BROKEN = Package("kvat-broken", "0.3", "raise RuntimeError('no driver,\\n  sorry')", "broken", "Mine")
QUITTER = Package("kvat-quitter", "0.4", "raise SystemExit('bye')", "quitter", "Mine")
GONE = Package("kvat-gone", "0.5", "import a_module_that_is_not_there", "gone", "Mine")
STRANGER = Package("kvat-stranger", "0.6", "class Mine: pass", "stranger", "Mine")
UNFINISHED = Package(
    "kvat-unfinished",
    "0.7",
    "from kvat_core.engine import Engine\nclass Mine(Engine):\n    name = 'unfinished'",
    "unfinished",
    "Mine",
)
MISNAMED = Package("kvat-misnamed", "0.8", FINE.source, "alias", "Mine")
TWIN = Package("kvat-twin", "2.0", engine("fake").source, "fake", "Mine")
LINES = Package("kvat-lines", "3.0", REPORT, "lines", "Lines", "kvat.reports")
SMUDGE = Package("kvat-smudge", "3.1", "raise ImportError('no ink')", "smudge", "Lines", "kvat.reports")
BLANK = Package("kvat-blank", "3.2", "class Lines: name = 'blank'", "blank", "Lines", "kvat.reports")
COPY_A = Package("kvat-copy-a", "3.3", REPORT, "copy", "Lines", "kvat.reports")
COPY_B = Package("kvat-copy-b", "3.4", REPORT, "copy", "Lines", "kvat.reports")

ZOO = [FINE, FUTURE, BROKEN, QUITTER, GONE, STRANGER, UNFINISHED, MISNAMED, TWIN, LINES, SMUDGE, BLANK, COPY_A, COPY_B]

# Imports everything that this process can import, but sees no distributions except those on PYTHONPATH.
ISOLATE = f"""
import json, sys
from importlib.machinery import PathFinder

class Elsewhere:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, {sys.path!r} if path is None else path, target)

sys.meta_path.append(Elsewhere)
from kvat_core.errors import UsageError
from kvat_core import discovery
"""


class Site:
    """A directory of installed distributions, kvat-core among them."""

    def __init__(self, root: Path, packages: list[Package]) -> None:
        self.path = root / "site"
        metadata = Path(str(distribution("kvat-core").locate_file(f"kvat_core-{CORE}.dist-info")))
        shutil.copytree(metadata, self.path / metadata.name)
        if packages:
            wheels = [str(package.wheel(root)) for package in packages]
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir"]
            subprocess.run([*pip, "--target", str(self.path), *wheels], check=True)

    def ask(self, expression: str, *more: Path) -> Any:
        """Value of the expression in a fresh interpreter; of a UsageError its text."""
        program = f"{ISOLATE}\ntry:\n    answer = {expression}\nexcept UsageError as error:\n    answer = str(error)\n"
        program += "print(json.dumps(answer))"
        path = os.pathsep.join(str(folder) for folder in (self.path, *more))
        command = [sys.executable, "-S", "-c", program]
        done = subprocess.run(command, env={"PYTHONPATH": path}, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def pick(self, name: str | None = None, model: str | None = None) -> Any:
        return self.ask(f"discovery.pick_engine({name!r}, {model!r}).name")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("zoo"), ZOO)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("bare"), [])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("one"), [FINE])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("two"), [FINE, OTHER])


def test_every_engine_is_listed_with_who_is_to_blame(zoo: Site) -> None:
    statuses = zoo.ask("[[s.name, s.distribution, s.version, s.state, s.cause] for s in discovery.engine_statuses()]")
    twins = f"registered by kvat-core {CORE} and by kvat-twin 2.0"

    assert statuses == [
        ["alias", "kvat-misnamed", "0.8", "broken", "registered as 'alias', but the class is named 'fine'"],
        ["broken", "kvat-broken", "0.3", "broken", "RuntimeError: no driver, sorry"],
        ["fake", "kvat-core", CORE, "duplicate", twins],
        ["fake", "kvat-twin", "2.0", "duplicate", twins],
        ["fake-server", "kvat-core", CORE, "ok", None],
        ["fine", "kvat-fine", "1.2", "ok", None],
        [
            "future",
            "kvat-future",
            "7.1",
            "too_new",
            "written for contract 99, this kvat-core supports 1; upgrade kvat-core",
        ],
        ["gone", "kvat-gone", "0.5", "broken", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"],
        ["quitter", "kvat-quitter", "0.4", "broken", "SystemExit: bye"],
        [
            "stranger",
            "kvat-stranger",
            "0.6",
            "broken",
            "its entry point names no subclass of kvat_core.engine.Engine",
        ],
        ["unfinished", "kvat-unfinished", "0.7", "broken", statuses[-1][-1]],
    ]
    assert statuses[-1][-1].startswith("TypeError: Can't instantiate abstract class Mine")


def test_healthy_engine_loads_among_broken_ones(zoo: Site) -> None:
    assert zoo.ask("[type(discovery.load_engine('fine')).__module__, discovery.load_engine('fine').name]") == [
        "kvat_fine",
        "fine",
    ]


def test_loading_one_engine_imports_no_other(zoo: Site) -> None:
    assert zoo.ask("[discovery.load_engine('fine').name, 'kvat_future' in sys.modules]") == ["fine", False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken",
            "engine 'broken' of kvat-broken 0.3 is broken: RuntimeError: no driver, sorry; "
            "repair or uninstall kvat-broken",
        ),
        (
            "future",
            "engine 'future' of kvat-future 7.1 is written for contract 99, this kvat-core supports 1; "
            "upgrade kvat-core",
        ),
        ("fake", f"engine 'fake' is registered by kvat-core {CORE} and by kvat-twin 2.0; uninstall one of them"),
        (
            "absent",
            "no engine is called 'absent'; available: alias, broken, fake, fake-server, fine, future, gone, quitter, "
            "stranger, unfinished; others come with their own package, e.g. pip install kvat-engine-NAME",
        ),
    ],
)
def test_unusable_engine_is_refused_in_one_line(zoo: Site, name: str, message: str) -> None:
    assert zoo.ask(f"discovery.load_engine({name!r}).name") == message
    assert zoo.pick(name, model="fine:small") == message


def test_distribution_that_is_on_the_path_twice_counts_once(one: Site, two: Site) -> None:
    names = one.ask("[status.name for status in discovery.engine_statuses()]", two.path)

    assert names == ["fake", "fake-server", "fine", "other"]


def test_named_engine_wins_over_the_owner_of_the_model(two: Site) -> None:
    assert two.pick("other", model="fine:small") == "other"


def test_model_names_its_engine(two: Site) -> None:
    assert two.pick(model="fine:small") == "fine"
    assert two.pick(model="fake-server:crash") == "fake-server"


def test_broken_engines_do_not_hide_the_owner_of_a_model(zoo: Site) -> None:
    assert zoo.pick(model="fine:small") == "fine"


def test_model_with_two_owners_is_ambiguous(two: Site) -> None:
    assert (
        two.pick(model="borrowed")
        == "model 'borrowed' belongs to several engines: fine, other; choose one with --engine"
    )


def test_prefix_needs_its_colon(two: Site) -> None:
    assert two.pick(model="finer") == "several engines are installed: fine, other; choose one with --engine"


def test_only_installed_engine_is_the_default(one: Site) -> None:
    assert one.pick() == "fine"
    assert one.pick(model="some/model") == "fine"


def test_several_engines_leave_the_choice_to_the_user(two: Site) -> None:
    assert two.pick() == "several engines are installed: fine, other; choose one with --engine"


def test_demonstration_is_no_default(bare: Site) -> None:
    message = "no engine is installed; pip install kvat-engine-NAME, or see a demonstration with --engine fake"

    assert bare.pick() == message
    assert bare.pick(model="some/model") == message
    assert bare.pick("fake") == "fake"


def test_reports_are_loaded_and_broken_ones_named(zoo: Site) -> None:
    usable, complaints = zoo.ask(
        "[[[r.name, r.file_name, r.render(None)] for r in discovery.reports()[0]], discovery.reports()[1]]"
    )

    assert usable == [["lines", "lines.txt", "one line"]]
    assert complaints == [
        "report 'blank' of kvat-blank 3.2 is broken: its entry point names no class with file_name and render, "
        "as in kvat_core.report; repair or uninstall kvat-blank",
        "report 'copy' is registered by kvat-copy-a 3.3 and by kvat-copy-b 3.4; uninstall one of them",
        "report 'smudge' of kvat-smudge 3.1 is broken: ImportError: no ink; repair or uninstall kvat-smudge",
    ]
