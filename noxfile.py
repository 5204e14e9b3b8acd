"""Everything that is done to this tree: `nox -l` lists the sessions, `nox -s NAME` runs one.

Sessions that need the packages share one environment per Python (`environment-3.11` and
so on), because torch alone is 190 MB. The packages in it are editable.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["test"]
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"
RESULTS = ENVIRONMENTS / "results"

LIBRARIES = ("kvat-core", "kvat-report", "kvat-cli")
ENGINES = ("kvat-engine-transformers",)
PACKAGES = (*LIBRARIES, *ENGINES)
CROSS_PACKAGE = "cross-package"
EXAMPLE = "examples/kvat-engine-minimal"

TORCH_PYTHON = "3.11"
PINNED = ("-c", "constraints.txt")
AS_USERS_HAVE_IT = {"PYTHONUNBUFFERED": None, "PYTHONDONTWRITEBYTECODE": None}
"""What build machines set and users do not: it hides output that nobody takes, and slows every import."""


def supported_pythons() -> list[str]:
    """The versions that the libraries promise to run on."""
    return nox.project.python_versions(nox.project.load_toml(ROOT / "packages/kvat-core/pyproject.toml"))


def find_python(version: str) -> Path | None:
    """An interpreter of that version that really runs: a pyenv shim may exist for a version it cannot start."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = shutil.which(f"python{version}")
    for python in filter(None, [on_path, *sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))]):
        if subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return Path(python)
    return None


FOUND = {version: python for version in supported_pythons() if (python := find_python(version))}
ALWAYS = [version for version in FOUND if version in (supported_pythons()[0], TORCH_PYTHON)]
"""Pythons of every test run: the oldest, which refuses most, and the one with torch; `nox -s full` has the others."""
os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *(str(python.parent) for python in FOUND.values())])


class Part(NamedTuple):
    """A session that has run."""

    name: str
    seconds: float
    passed: bool


DONE: list[Part] = []


def part(run: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
    """Note how long a session takes and how it ends, for the table after `nox -s test`."""

    @functools.wraps(run)
    def timed(session: nox.Session) -> None:
        start, passed = time.monotonic(), False
        try:
            run(session)
            passed = True
        finally:
            DONE.append(Part(session.name, time.monotonic() - start, passed))

    return timed


def group(*names: str) -> list[str]:
    """The development tools of these dependency groups."""
    return list(nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), *names))


def editable(*folders: str) -> list[str]:
    """Arguments of pip that install what is in these folders from the tree."""
    return ["--no-build-isolation", *(word for folder in folders for word in ("-e", folder))]


def source(package: str) -> str:
    """The folder of a package."""
    return f"packages/{package}"


def program(name: str, python: str = TORCH_PYTHON) -> str:
    """A program of the shared environment of that Python."""
    return str(ENVIRONMENTS / f"environment-{python.replace('.', '-')}" / "bin" / name)


# Environments and checks


@nox.session(python=sorted({*FOUND, TORCH_PYTHON}, key=lambda version: int(version.split(".")[1])))
@part
def environment(session: nox.Session) -> None:
    """Install the packages from the tree, with what tests them; the engines where torch runs."""
    with_torch = session.python == TORCH_PYTHON
    session.install(*PINNED, *group("build"))
    tools = group("test", "types", "layers", "quantised", "placement", "replay") if with_torch else group("test")
    session.install(*PINNED, *tools, *editable(*map(source, PACKAGES if with_torch else LIBRARIES)))


@nox.session
@part
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*PINNED, *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
@part
def layers(session: nox.Session) -> None:
    """Check the direction of imports between and inside the packages."""
    session.install(*PINNED, *group("layers"))
    sources = os.pathsep.join(f"{source(package)}/src" for package in PACKAGES)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})


@nox.session(venv_backend="none", requires=[f"environment-{TORCH_PYTHON}"])
@part
def types(session: nox.Session) -> None:
    """Check the types of each package, the libraries as the oldest Python sees them."""
    for package in PACKAGES:
        oldest = supported_pythons()[0] if package in LIBRARIES else TORCH_PYTHON
        session.run(program("mypy"), "--python-version", oldest, f"{source(package)}/src", external=True)
    session.run(program("mypy"), f"{EXAMPLE}/src", external=True)


# Tests


def pytest(session: nox.Session, python: str, suite: str, *arguments: str, options: tuple[str, ...] = ()) -> None:
    """Run one suite out of a shared environment."""
    session.run(
        *(program("python", python), "-m", *arguments, "pytest", *pytest_options(session.name), *selection(python)),
        *options,
        folder(suite),
        *session.posargs,
        env=AS_USERS_HAVE_IT,
        external=True,
    )


def pytest_options(name: str) -> list[str]:
    """Options of pytest that are the same in every session."""
    return ["--hypothesis-profile=ci", f"--junitxml={RESULTS / name}.xml"]


def selection(python: str) -> list[str]:
    """Options of pytest that leave the slowest tests to one Python."""
    return [] if python == TORCH_PYTHON else ["-m", "not slow"]


def folder(suite: str) -> str:
    """Where the tests of a suite are."""
    return "tests" if suite == CROSS_PACKAGE else f"{source(suite)}/tests"


def define_tests(python: str, suite: str) -> str:
    """Define the session that runs this suite on this Python, and return its name."""
    name = f"tests-{python}({suite})"

    @nox.session(name=name, tags=["tests"], venv_backend="none", requires=[f"environment-{python}"])
    @part
    def tests(session: nox.Session) -> None:
        """Run the tests of one package."""
        if (python, suite) == (TORCH_PYTHON, "kvat-core"):
            session.run(program("coverage"), "erase", external=True)
            pytest(session, python, suite, "coverage", "run", "-m")
            session.run(program("coverage"), "combine", "--quiet", external=True)
            session.run(program("coverage"), "report", external=True)
        elif suite in ENGINES:
            # What they wait for are child processes with one thread each. Tests of a file share what is loaded once.
            pytest(session, python, suite, options=("-n", "2", "--dist", "loadfile"))
        elif suite == CROSS_PACKAGE:
            pytest(session, python, suite)
        else:
            pytest(session, python, suite, options=("-n", "2"))

    return name


TESTS = {
    python: [
        define_tests(python, suite)
        for suite in (*LIBRARIES, *((*ENGINES, CROSS_PACKAGE) if python == TORCH_PYTHON else ()))
    ]
    for python in {**FOUND, TORCH_PYTHON: None}
}


@nox.session
@part
def example(session: nox.Session) -> None:
    """Run the tests of the example adapter, which needs no package but kvat-core."""
    session.install(*PINNED, *group("build"))
    session.install(*PINNED, *group("test"), *editable(source("kvat-core"), EXAMPLE))
    session.run("pytest", *pytest_options(session.name), f"{EXAMPLE}/tests", env=AS_USERS_HAVE_IT)


@nox.session(python=TORCH_PYTHON)
@part
def minimums(session: nox.Session) -> None:
    """Run the tests of all packages with the lowest versions that they accept; that torch brings gigabytes of CUDA."""
    pins = sorted({lowest for package in PACKAGES for lowest in lowest_versions(package)})
    session.install(*group("build"))
    session.install(*group("test", "layers", "quantised", "placement"), *pins, *editable(*map(source, PACKAGES)))
    warn_only = ("-W", "default")  # what old versions say of new ones is not ours to mend
    suites = map(folder, (*PACKAGES, CROSS_PACKAGE))
    command = ["pytest", *pytest_options(session.name), *warn_only, *suites, *session.posargs]
    session.run(*command, env=AS_USERS_HAVE_IT)


@nox.session(python=TORCH_PYTHON)
@part
def newest(session: nox.Session) -> None:
    """Run the engine's tests with the newest versions that it accepts, and with the back-ends that CI goes without."""
    session.install(*group("build"))
    session.install("torch==2.13.0", *group("test", "quantised", "placement"), *editable(*map(source, PACKAGES)))
    accepted = (one for package in ENGINES for one in requirements(package) if one.name == "transformers")
    session.install("--upgrade", *map(str, accepted))
    # Its import of the compiler makes each process slower to start, so the other environments lack it.
    session.install("--no-build-isolation", "hqq")
    warn_only = ("-W", "default")  # what these versions say of each other is not ours to mend
    suites = map(folder, ENGINES)
    session.run("pytest", *pytest_options(session.name), *warn_only, *suites, *session.posargs, env=AS_USERS_HAVE_IT)


def lowest_versions(package: str) -> Iterator[str]:
    """The lower ends of a package's requirements as pins, siblings apart."""
    for requirement in requirements(package):
        lower_ends = [bound.version for bound in requirement.specifier if bound.operator in {">=", "~="}]
        if lower_ends and requirement.name not in PACKAGES:
            yield f"{requirement.name}=={lower_ends[0]}"


def requirements(package: str) -> list[Requirement]:
    """What a package declares to need."""
    project = nox.project.load_toml(ROOT / source(package) / "pyproject.toml")["project"]
    return [Requirement(one) for one in project["dependencies"]]


# What is published


@nox.session
@part
def build(session: nox.Session) -> None:
    """Build the sdists and, from them, the wheels, into dist/."""
    session.install(*PINNED, *group("build"))
    shutil.rmtree("dist", ignore_errors=True)
    with tempfile.TemporaryDirectory() as from_tree:
        for package in PACKAGES:
            command = ["python", "-m", "build", "--no-isolation", source(package)]
            session.run(*command, "--outdir", "dist", silent=True)
            session.run(*command, "--outdir", from_tree, "--wheel", silent=True)
        for wheel in sorted(Path("dist").glob("*.whl")):
            if wheel.read_bytes() != (Path(from_tree) / wheel.name).read_bytes():
                session.error(f"{wheel.name} from the sdist differs from the one from the tree: the sdist lacks a file")


@nox.session(python=TORCH_PYTHON, reuse_venv=False, requires=["build"])
@part
def wheels(session: nox.Session) -> None:
    """Install the wheels, and nothing of the tree, into a clean environment; tune there and run the snippet."""
    session.install("--no-index", "--no-deps", "--find-links", "dist", *PACKAGES)
    session.install(*PINNED, *PACKAGES)  # what they depend on; they themselves are there already
    session.run("pip", "check")
    session.run("python", "-c", "from importlib.util import find_spec; assert find_spec('kvat') is None")
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        session.run("kvat", "tune", "--out", "out")
        session.run("python", "out/snippet.py")


# What it is for


@nox.session(venv_backend="none", requires=[f"environment-{TORCH_PYTHON}"])
@part
def demo(session: nox.Session) -> None:
    """Tune the built-in model, into ./kvat-out."""
    session.run(program("kvat"), "tune", *(session.posargs or ["--force"]), external=True)


@nox.session(venv_backend="none", requires=[f"environment-{TORCH_PYTHON}"])
@part
def bench(session: nox.Session) -> None:
    """Run the project's own benchmarks, and keep their results; one that misses its bound keeps none from running."""
    missed = []
    for script in [*sorted(Path("benchmarks").glob("[!_]*.py")), Path("benchmarks/replay")]:
        result = f"benchmarks/results/{script.stem}.json"
        try:
            session.run(program("python"), str(script), "--out", result, env=AS_USERS_HAVE_IT, external=True)
        except CommandFailed:
            missed.append(script.name)
    if missed:
        session.error(f"outside its bounds, or without a result: {', '.join(missed)}")


# All of it


@nox.session(venv_backend="none")
def test(session: nox.Session) -> None:
    """Run everything that CI does."""
    for version in supported_pythons():
        left_out = "left to nox -s full" if version in FOUND else "not found, left out"
        session.log(f"Python {version}: {FOUND[version] if version in ALWAYS else left_out}")
    shutil.rmtree(RESULTS, ignore_errors=True)
    atexit.register(print_results)  # nox's own closing lines come before it
    for name in ("lint", "layers", "build", *on(*ALWAYS)[0], "types", *on(*ALWAYS)[1], "example", "wheels"):
        session.notify(name)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Run what takes longer than CI should."""
    shutil.rmtree(RESULTS, ignore_errors=True)
    atexit.register(print_results)
    environments, tests = on(*(python for python in FOUND if python not in ALWAYS))
    for name in (f"environment-{TORCH_PYTHON}", *environments, *tests, "minimums", "newest", "bench"):
        session.notify(name)


def on(*pythons: str) -> tuple[list[str], list[str]]:
    """Sessions that make the environments of these Pythons, and those that run tests there."""
    return [f"environment-{python}" for python in pythons], [name for python in pythons for name in TESTS[python]]


def print_results() -> None:
    """Print the seconds of each part, and the sum of all tests as the last line."""
    for done in DONE:
        print(f"{done.seconds:8.1f} s  {'passed' if done.passed else 'FAILED'}  {done.name}")
    print(f"{sum(done.seconds for done in DONE):8.1f} s  in all\n")
    suites = [suite for file in RESULTS.glob("*.xml") for suite in ElementTree.parse(file).iter("testsuite")]
    total, failed, skipped = (
        sum(int(suite.get(kind, 0)) for suite in suites for kind in kinds)
        for kinds in (("tests",), ("failures", "errors"), ("skipped",))
    )
    print(f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped")
