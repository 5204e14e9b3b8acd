"""One process writes a run; who died left no lock behind that keeps others out."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvat_core import lock
from kvat_core.errors import UsageError
from kvat_core.lock import Owner

MakeCommand = Callable[..., Any]
"""Makes a command of `conftest.py`."""
LOCK = "journal.lock"

HOLD = """
import sys
from pathlib import Path
from kvat_core import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[int]:
    """A process that holds the lock file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.communicate("\n")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def without_file_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none: then the owner that the file names decides."""

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)


@pytest.mark.parametrize("file_locks", [True, False])
def test_a_second_writer_is_refused(command: MakeCommand, monkeypatch: pytest.MonkeyPatch, file_locks: bool) -> None:
    stopped = command()
    stopped.run(40)
    with held_by_another_process(stopped.out / LOCK) as pid:
        if not file_locks:
            without_file_locks(monkeypatch)
        before = files(stopped.out)
        with pytest.raises(UsageError, match=f"process {pid} is writing into .*; wait for its end"):
            stopped.resume()
        with pytest.raises(UsageError, match=f"process {pid} is writing into"):
            stopped.run()
        assert files(stopped.out) == before
    assert stopped.resume().stopped is None
    assert not (stopped.out / LOCK).exists()


def test_a_second_writer_in_the_same_process_is_refused(command: MakeCommand) -> None:
    stopped = command()
    stopped.run(40)
    with lock.locked(stopped.out / LOCK), pytest.raises(UsageError, match=f"process {os.getpid()} is writing"):
        stopped.resume()
    assert stopped.resume().stopped is None


@pytest.mark.parametrize("file_locks", [True, False])
def test_force_does_not_move_aside_what_another_process_writes(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch, file_locks: bool
) -> None:
    stopped = command()
    stopped.run(40)
    with held_by_another_process(stopped.out / LOCK):
        if not file_locks:
            without_file_locks(monkeypatch)
        before = files(stopped.out)
        with pytest.raises(UsageError, match="is writing into"):
            stopped.run(force=True)
        assert files(stopped.out) == before
        assert [path.name for path in stopped.out.parent.iterdir()] == ["out"]
    assert stopped.run(force=True).stopped is None
    assert {path.name for path in stopped.out.parent.iterdir()} == {"out", "out.1"}


def dead() -> Owner:
    with subprocess.Popen(["true"]) as process:
        pass
    return alive().model_copy(update={"pid": process.pid})


def alive() -> Owner:
    """Of the process that runs the tests, as it would name itself."""
    parent = psutil.Process(os.getppid())
    return Owner(pid=parent.pid, boot=lock._boot(), started=parent.create_time())


STALE: dict[str, Callable[[], bytes]] = {
    "of a process that is no more": lambda: dead().model_dump_json().encode(),
    "of one whose id came back": lambda: alive().model_copy(update={"started": 1.0}).model_dump_json().encode(),
    "of another boot": lambda: alive().model_copy(update={"boot": "another"}).model_dump_json().encode(),
    "torn": lambda: alive().model_dump_json().encode()[:-9],
    "empty": lambda: b"",
}


@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("file_locks", [True, False])
def test_a_lock_left_behind_is_taken_over(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch, stale: str, file_locks: bool
) -> None:
    stopped = command()
    stopped.run(40)
    if not file_locks:
        without_file_locks(monkeypatch)
    (stopped.out / LOCK).write_bytes(STALE[stale]())
    assert stopped.resume().stopped is None
    assert not (stopped.out / LOCK).exists()


def test_a_lock_that_names_a_living_owner_is_respected_without_file_locks(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = command()
    stopped.run(40)
    without_file_locks(monkeypatch)
    (stopped.out / LOCK).write_text(alive().model_dump_json())
    with pytest.raises(UsageError, match=f"process {os.getppid()} is writing"):
        stopped.resume()


def test_the_lock_names_its_owner_while_it_is_held(tmp_path: Path) -> None:
    with lock.locked(tmp_path / LOCK):
        owner = json.loads((tmp_path / LOCK).read_text())
    assert owner["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()
