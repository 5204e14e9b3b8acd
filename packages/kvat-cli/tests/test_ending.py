"""A run that is ended early, or whose reader is gone, still hands over what it has."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvat_cli.display import open_display
from kvat_core import Progress, read_plan

pytestmark = pytest.mark.slow

Run = Callable[..., Any]
FILES = {"journal.jsonl", "best_plan.json", "snippet.py", "report.md"}
# One candidate of this model does not come back for an hour.
HANGING = ("tune", "--model", "fake:hang", "--profile", "ci-micro")
HEALTHY = ("tune", "--model", "fake:tiny", "--profile", "ci-micro", "--space", "full")
AT_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'kvat_cli', *sys.argv[1:]])"
)
"""Makes standard input the terminal of this session, so that its loss is told to it, and becomes `kvat`."""

DEAF = """
import os, pathlib, signal, time

if "KVAT_WORKER" in os.environ:
    here = pathlib.Path({!r})
    signal.signal(signal.SIGTERM, lambda *_: (here / "asked").touch())
    (here / "ready").touch()
    time.sleep(3600)
"""
"""A worker that neither reads a request nor obeys."""


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """A command line in a process of its own, still running."""
    command = [sys.executable, "-m", "kvat_cli", *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, encoding="utf-8", **pipes)


def start_at_a_terminal(*words: object) -> tuple[subprocess.Popen[bytes], int]:
    """A command line at a terminal of its own, and the descriptor that holds this terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", AT_A_TERMINAL, *map(str, words)]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    return process, leader


def records(out: Path) -> list[str]:
    """Types of the whole records in a journal; none before there is one."""
    journal = out / "journal.jsonl"
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    return [json.loads(line)["type"] for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(process: subprocess.Popen[Any], out: Path, kind: str) -> None:
    """Return when a running process has written such a record."""
    while kind not in records(out):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_a_partial_plan_and_is_completed_by_resume(
    kvat: Run, tmp_path: Path, number: signal.Signals
) -> None:
    words = (*HANGING, "--out", tmp_path / "run")
    with start(*words) as process:
        wait_for(process, tmp_path / "run", "measured")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "kvat: error: interrupted; go on with --resume\n"
    assert "\nSettings:\n" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert read_plan(tmp_path / "run" / "best_plan.json").partial

    outcome = kvat(*words, "--resume", "--deadline", "first-token=3")
    assert (outcome.code, outcome.err) == (0, "")
    # The launch that was cut off is no news.
    assert outcome.out.startswith("launch 1 for ")
    plan = read_plan(tmp_path / "run" / "best_plan.json")
    assert not plan.partial
    assert [candidate.label for candidate in plan.candidates if candidate.state == "failed"] == [
        "cache=static kernel=eager"
    ]
    kinds = records(tmp_path / "run")
    assert (kinds.count("header"), kinds.count("stopped"), kinds.count("resumed")) == (1, 1, 1)


def test_what_ends_before_anything_can_be_decided_names_resume_too(tmp_path: Path) -> None:
    words = ("--set", "cache=static", "--set", "kernel=eager", "--out", tmp_path / "run")
    with start(*HANGING, *words) as process:
        wait_for(process, tmp_path / "run", "proof")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "kvat: error: interrupted; go on with --resume; nothing can be decided yet\n"


def test_the_second_interrupt_waits_for_nobody(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DEAF.format(str(tmp_path)))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = (*HANGING, "--deadline", "grace=500", "--out", tmp_path / "run")
    with start(*words, env={**os.environ, "PYTHONPATH": path}) as process:
        for moment in ("ready", "asked"):
            while not (tmp_path / moment).exists():
                time.sleep(0.01)
            (worker,) = psutil.Process(process.pid).children()
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "kvat: error: interrupted; if a run had begun, go on with --resume\n"
    assert not worker.is_running()


@pytest.mark.parametrize("option", ["--space=full", "--json"])
def test_a_terminal_that_is_gone_stops_no_run(tmp_path: Path, option: str) -> None:
    process, leader = start_at_a_terminal(*HEALTHY, option, "--out", tmp_path / "run")
    with process:
        wait_for(process, tmp_path / "run", "launch")
        os.close(leader)
        assert "end" not in records(tmp_path / "run")
        assert process.wait(timeout=60) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert not read_plan(tmp_path / "run" / "best_plan.json").partial


class GoneTerminal(io.StringIO):
    """What standard output is once its terminal was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(errno.EIO, "gone")


def test_a_terminal_that_is_gone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", gone := GoneTerminal())
    with open_display(silent=False) as show:
        assert show is not None
        for _ in range(100):
            show(Progress(run=None, activity="a", launches_done=0, launches_left=0, elapsed_s=0.0, left_s=None))
    assert 0 < gone.tries < 10
    assert sys.stdout is gone


def test_the_exit_code_of_an_interrupted_run_needs_no_terminal(tmp_path: Path) -> None:
    process, leader = start_at_a_terminal(*HANGING, "--quiet", "--out", tmp_path / "run")
    with process:
        wait_for(process, tmp_path / "run", "measured")
        os.close(leader)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    assert read_plan(tmp_path / "run" / "best_plan.json").partial


def test_a_reader_that_goes_away_stops_no_run(tmp_path: Path) -> None:
    with start(*HEALTHY, "--out", tmp_path / "run") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("launch 0 for ")
        process.stdout.close()
        assert "end" not in records(tmp_path / "run")
        assert process.wait(timeout=60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert not read_plan(tmp_path / "run" / "best_plan.json").partial
