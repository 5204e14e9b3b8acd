"""A child process ends when it shall, with all it has started, and nobody else does."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kvat_core.measure.child import MARK, STDERR_TAIL_BYTES, Child
from kvat_core.measure.supervisor import WorkerFailed, WorkerProcess

Preload = Callable[[str], dict[str, str]]
LONG_S = 500.0
"""A time that no test waits for."""


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return psutil.Process().num_fds(), psutil.Process().num_threads()


@pytest.fixture
def preload(tmp_path: Path) -> Preload:
    """Environment in which a child runs some code, in the test's folder, before anything else."""

    def write(code: str) -> dict[str, str]:
        lines = ["import os, signal, sys, time", "from pathlib import Path", f"here = Path({str(tmp_path)!r})"]
        (tmp_path / "sitecustomize.py").write_text("\n".join([*lines, textwrap.dedent(code)]))
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}

    return write


@contextmanager
def started(environment: dict[str, str], grace_s: float = LONG_S) -> Iterator[Child]:
    """A child that is ended whatever the test finds."""
    child = Child(environment, grace_s)
    try:
        yield child
    finally:
        child.end(at_once=True)


def appeared(path: Path) -> str:
    """Content of a file that a child writes."""
    return wait_until(lambda: path.exists() and path.read_text(), "the child writes its file")


def wait_until(condition: Callable[[], str | bool], what: str) -> str:
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)
    return str(value)


def is_gone(process: psutil.Process) -> bool:
    """Whether it is over; where nobody collects orphans, its entry stays."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


DEAF = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / "deaf").write_text("yes")
"""
STRAY = """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            (here / "half").write_text(str(os.getpid()))
            (here / "half").rename(here / "stray")
            os.execvp("sleep", ["sleep", "600"])
        os._exit(0)
    os.wait()
"""
"""Leaves a process behind in a session of its own, whose parent is over."""


def test_a_child_is_asked_first() -> None:
    with started({}) as child:
        assert child.end() == -signal.SIGTERM


def test_who_is_to_end_at_once_is_not_asked(preload: Preload, tmp_path: Path) -> None:
    environment = preload("""
        signal.signal(signal.SIGTERM, lambda *_: (here / "asked").touch())
        (here / "ready").write_text("yes")
    """)
    with started(environment) as child:
        appeared(tmp_path / "ready")
        assert child.end(at_once=True) == -signal.SIGKILL
    assert not (tmp_path / "asked").exists()


def test_who_ignores_being_asked_is_killed_after_the_grace(preload: Preload, tmp_path: Path) -> None:
    with started(preload(DEAF), grace_s=0.5) as child:
        appeared(tmp_path / "deaf")
        assert child.end() == -signal.SIGKILL


def test_who_is_stopped_is_ended_as_well() -> None:
    with started({}, grace_s=0.5) as child:
        process = psutil.Process(child.pid)
        process.suspend()
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "the child is stopped")
        assert child.end() in (-signal.SIGTERM, -signal.SIGKILL)
    assert is_gone(process)


def test_who_has_ended_keeps_its_exit_code(preload: Preload) -> None:
    with started(preload("os._exit(7)")) as child:
        assert child.wait(60)
        assert child.end() == 7


def test_a_sound_child_ends_when_nothing_more_will_be_asked() -> None:
    with started({}) as child:
        child.close_requests()
        assert child.wait(60)
        assert child.end() == 0


def test_ending_twice_is_as_good_as_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with started({}) as child:
        code = child.end()
        # The next descriptors get the numbers of those that the child had.
        mine = [descriptor for _ in range(3) for descriptor in os.pipe()]
        signalled: list[int] = []
        monkeypatch.setattr(os, "killpg", lambda group, _: signalled.append(group))
        assert child.end() == child.end(at_once=True) == code
        assert not signalled
        for descriptor in mine:
            os.close(descriptor)


def test_no_descriptor_and_no_thread_is_left() -> None:
    with started({}):
        pass
    before = held()
    for _ in range(3):
        with started({}) as child:
            assert held() > before
            child.end()
    assert held() == before


def test_a_child_of_a_parent_without_standard_streams_answers() -> None:
    code = (
        "import os, sys\n"
        "from kvat_core.measure.deadlines import Limits\n"
        "from kvat_core.measure.supervisor import WorkerProcess\n"
        "told = os.dup(1)\n"
        "os.closerange(0, 3)\n"
        "with WorkerProcess({}) as worker:\n"
        "    worker.call('start', {'engine': 'fake', 'scratch': None}, 'start', Limits(60))\n"
        "    probe = worker.call('probe', {'device': None, 'options': {}}, 'probe', Limits(60))\n"
        "os.write(told, probe['device'].encode())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).stdout == b"cpu"


@pytest.mark.parametrize("pipes", [0, 1])
def test_where_pipes_run_out_nothing_is_left(monkeypatch: pytest.MonkeyPatch, pipes: int) -> None:
    made: list[int] = []
    pipe = os.pipe

    def scarce() -> tuple[int, int]:
        if len(made) == pipes:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(1)
        return pipe()

    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe", scarce)
        with pytest.raises(WorkerFailed, match=r"no process can be started \(Too many open files\)"):
            WorkerProcess({})
    assert held() == before


def test_where_its_output_cannot_be_read_no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WorkerFailed, match=r"no process can be started \(can't start new thread\)") as caught:
            WorkerProcess({})
    assert (caught.value.failure.kind, caught.value.failure.phase) == ("error", "start")
    assert held() == before
    assert not psutil.Process().children()


def test_what_cannot_be_killed_is_said_to_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with started({}, grace_s=0.2) as child:
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", lambda *_: None)
            assert child.end() is None
            assert not child.has_ended()
        assert child.end() == -signal.SIGTERM


@pytest.mark.parametrize("waitid", [True, False])
def test_a_descendant_in_a_session_of_its_own_is_ended_too(
    preload: Preload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waitid: bool
) -> None:
    if not waitid:  # as on macOS, where a process cannot be looked at without reaping it
        monkeypatch.delattr(os, "waitid", raising=False)
    with started(preload(STRAY)) as child:
        stray = psutil.Process(int(appeared(tmp_path / "stray")))
        assert os.getsid(stray.pid) not in (os.getsid(0), child.pid)
        assert not is_gone(stray)
        child.end()
        wait_until(lambda: is_gone(stray), "the descendant is gone")


def test_a_descendant_is_ended_even_if_the_child_ended_by_itself(preload: Preload, tmp_path: Path) -> None:
    with started(preload(STRAY)) as child:
        stray = psutil.Process(int(appeared(tmp_path / "stray")))
        child.close_requests()
        assert child.wait(60)
        assert not is_gone(stray)
        child.end()
        wait_until(lambda: is_gone(stray), "the descendant is gone")


def test_nobody_elses_process_is_signalled(preload: Preload, tmp_path: Path) -> None:
    """Neither one of the same name in this session, nor one of the same name and another mark in its own."""
    sleep = ["sleep", "600"]
    with started({}) as neighbour, started(preload(STRAY)) as child:
        stray = psutil.Process(int(appeared(tmp_path / "stray")))
        strangers = [
            subprocess.Popen(sleep),
            subprocess.Popen(sleep, env={**os.environ, MARK: "another"}, start_new_session=True),
        ]
        try:
            wait_until(lambda: {psutil.Process(one.pid).name() for one in strangers} == {stray.name()}, "all sleep")
            child.end()
            wait_until(lambda: is_gone(stray), "the descendant is gone")
            assert [one.poll() for one in strangers] == [None, None]
            assert not neighbour.has_ended()
        finally:
            for one in strangers:
                one.kill()
                one.wait()


def test_each_child_has_a_mark_of_its_own() -> None:
    def mark(child: Child) -> str:
        # The environment of a process that has only just begun is empty.
        return wait_until(lambda: psutil.Process(child.pid).environ().get(MARK, ""), "the child has its environment")

    with started({}) as one, started({MARK: "chosen"}) as other:
        assert len({mark(one), mark(other), "chosen"}) == 3


def test_of_what_is_printed_the_end_is_kept(preload: Preload, tmp_path: Path) -> None:
    environment = preload("""
        os.write(1, b"x" * 100_000)
        os.write(2, b"the end")
        (here / "written").write_text("yes")
    """)
    with started(environment) as child:
        appeared(tmp_path / "written")
        wait_until(lambda: child.output_tail().endswith("the end"), "its output has arrived")
        assert len(child.output_tail()) == STDERR_TAIL_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="the out-of-memory killer is Linux's")
def test_an_ordinary_end_is_none_by_the_out_of_memory_killer() -> None:
    with started({}) as child:
        child.end()
        assert not child.was_killed_for_memory()
