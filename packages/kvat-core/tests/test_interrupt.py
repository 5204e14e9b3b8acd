"""Signals to a real process that tunes with real workers: it ends as asked, leaves no process, and can be resumed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvat_core import Plan, TuneRequest, read_plan, tune
from kvat_core.errors import Interrupted, UsageError
from kvat_core.journal import read_journal
from kvat_core.measure.child import MARK
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.interrupt import Stop, stop_on_signals
from kvat_core.schema import LaunchEnd, Stopped

pytestmark = pytest.mark.slow

RUN = "KVAT_TEST_RUN"
"""Variable by which the processes of a test are told from all others."""
AT_ONCE = 70

TUNE = f"""
import sys
import psutil
from kvat_core import TuneRequest, tune
from kvat_core.errors import KvatError
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.interrupt import stop_on_signals

out, pinned, first_token_s, grace_s = sys.argv[1:]
pairs = dict(pair.split("=") for pair in pinned.split(",") if pair)
request = TuneRequest(out=out, model="fake:hang", profile="ci-micro", pinned=pairs)
deadlines = Deadlines(first_token_s=float(first_token_s), grace_s=float(grace_s))
try:
    with stop_on_signals() as stop:
        result = tune(request, stop=stop, deadlines=deadlines)
except KvatError as error:
    print(error)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    print("children left:", len(psutil.Process().children(recursive=True)))
    sys.exit({AT_ONCE})
print("partial" if result.plan.partial else "complete")
sys.exit(0 if result.stopped is None else result.stopped.exit_code)
"""

TELLS = """
import pathlib, time

sleep = time.sleep
time.sleep = lambda seconds: pathlib.Path("hangs").touch() or sleep(seconds)
"""
"""A worker that tells when the call begins from which it does not come back."""
STUBBORN = (
    TELLS
    + """
import signal
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("asked").touch())
"""
)
"""One that besides does not end when it is asked to, but tells that it was."""
SLOW = """
import pathlib, time
pathlib.Path("starts").touch()
time.sleep(600)
"""
"""One that does not come to itself."""


@dataclass
class Tuning:
    """A process that tunes."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def wait_until_its_worker(self, tells: str) -> None:
        """Return when the worker has made a file of that name."""
        while not (self.folder / tells).exists():
            assert self.process.poll() is None, f"it ended without {tells!r}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it has printed."""
        printed, _ = self.process.communicate()
        return self.process.returncode, printed.rstrip("\n")

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker


Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start tuning with workers that execute some code first; at the end of the test no process may be left."""
    name = secrets.token_hex(8)

    @contextmanager
    def started(
        workers: str = TELLS, pinned: str = "", first_token_s: float = 600, grace_s: float = 600
    ) -> Iterator[Tuning]:
        (tmp_path / "sitecustomize.py").write_text(f"import os\nif {MARK!r} in os.environ: exec({workers!r})\n")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        with subprocess.Popen(
            [sys.executable, "-c", TUNE, str(tmp_path / "out"), pinned, str(first_token_s), str(grace_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, RUN: name, "PYTHONPATH": path},
        ) as process:
            try:
                yield Tuning(process, tmp_path)
            finally:
                process.kill()

    yield started
    assert left_of(name) == []


def left_of(name: str) -> list[str]:
    """Command lines of the processes of a test that have not ended within some seconds."""
    deadline = time.monotonic() + 10
    while (left := running(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def running(name: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN) == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def decided(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(exclude={"journal", "created"})


def resumed(out: Path) -> Plan:
    """The plan of the resumed run, in which what hangs is ended soon."""
    request = TuneRequest(out=out, model="fake:hang", profile="ci-micro", resume=True)
    return tune(request, deadlines=Deadlines(first_token_s=2)).plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan of a run that nobody interrupted."""
    request = TuneRequest(out=tmp_path_factory.mktemp("whole") / "out", model="fake:hang", profile="ci-micro")
    return tune(request, deadlines=Deadlines(first_token_s=2)).plan


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_run_with_a_partial_plan(start: Start, whole: Plan, number: signal.Signals) -> None:
    with start() as tuning:
        tuning.wait_until_its_worker("hangs")
        tuning.process.send_signal(number)
        assert tuning.end() == (Interrupted.exit_code, "partial")
    assert read_plan(tuning.out / "best_plan.json").partial
    events = list(read_journal(tuning.out / "journal.jsonl"))
    assert isinstance(events[-1], Stopped)
    assert not any(isinstance(event, LaunchEnd) for event in events)
    assert {path.name for path in tuning.out.iterdir()} >= {"journal.jsonl", "best_plan.json", "snippet.py"}
    assert not (tuning.out / "journal.lock").exists()
    assert decided(resumed(tuning.out)) == decided(whole)


def test_a_signal_before_anything_is_decidable_is_a_clear_message(start: Start) -> None:
    with start(pinned="cache=static,kernel=eager") as tuning:
        tuning.wait_until_its_worker("hangs")
        tuning.process.send_signal(signal.SIGINT)
        message = "interrupted; go on with --resume; nothing can be decided yet"
        assert tuning.end() == (Interrupted.exit_code, message)
    assert {path.name for path in tuning.out.iterdir()} == {"journal.jsonl"}


def test_a_signal_while_the_machine_is_looked_at_leaves_nothing(
    start: Start,
) -> None:
    with start(SLOW) as tuning:
        tuning.wait_until_its_worker("starts")
        tuning.process.send_signal(signal.SIGTERM)
        message = "interrupted; measuring had not begun, and nothing was changed"
        assert tuning.end() == (Interrupted.exit_code, message)
    assert not tuning.out.exists()


def test_a_second_signal_ends_a_run_at_once(start: Start, whole: Plan) -> None:
    with start(STUBBORN) as tuning:
        tuning.wait_until_its_worker("hangs")
        tuning.process.send_signal(signal.SIGINT)
        tuning.wait_until_its_worker("asked")
        tuning.process.send_signal(signal.SIGINT)
        assert tuning.end() == (AT_ONCE, "children left: 0")
    assert not (tuning.out / "best_plan.json").exists()
    assert not (tuning.out / "journal.lock").exists()
    assert list(read_journal(tuning.out / "journal.jsonl"))
    assert decided(resumed(tuning.out)) == decided(whole)


def test_a_lost_terminal_changes_nothing(start: Start, whole: Plan) -> None:
    with start(first_token_s=2) as tuning:
        tuning.wait_until_its_worker("hangs")
        tuning.process.send_signal(signal.SIGHUP)
        tuning.worker().send_signal(signal.SIGHUP)
        assert tuning.end() == (0, "complete")
    assert decided(read_plan(tuning.out / "best_plan.json")) == decided(whole)


def test_a_killed_run_leaves_no_worker_and_can_be_resumed(start: Start, whole: Plan) -> None:
    with start() as tuning:
        tuning.wait_until_its_worker("hangs")
        tuning.process.kill()
        assert tuning.process.wait() == -signal.SIGKILL
    assert (tuning.out / "journal.lock").exists()
    with pytest.raises(UsageError, match="is not empty; go on with its run with --resume"):
        tune(TuneRequest(out=tuning.out, model="fake:hang", profile="ci-micro"))
    assert decided(resumed(tuning.out)) == decided(whole)
    assert not (tuning.out / "journal.lock").exists()


def test_a_wish_to_stop_is_heard_between_quick_calls(tmp_path: Path) -> None:
    stop = Stop()

    def ask_soon(progress: Any) -> None:
        if progress.activity.startswith("timing"):
            stop.ask()

    with pytest.raises(Interrupted, match="nothing can be decided yet"):
        tune(TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro"), ask_soon, stop=stop)
    assert not any(isinstance(event, LaunchEnd) for event in read_journal(tmp_path / "out" / "journal.jsonl"))


def test_signals_mean_afterwards_what_they_meant_before() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals() as stop:
        assert [signal.getsignal(number) for number in numbers] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before
