"""Command lines run as a user would, in this process or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvat_cli.boundary import main


@dataclass(frozen=True)
class Outcome:
    """What a command line left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ceilings are kept in a cache of the tests' own; no home folder is written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def kvat(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def kvat_process() -> Run:
    """Run a command line in a process of its own."""

    def run(*words: object) -> Outcome:
        command = [sys.executable, "-m", "kvat_cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of one finished run of the fake engine."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["tune", "--engine", "fake", "--model", "fake:tiny", "--quiet", "--out", str(out)]) == 0
    return out
