"""A worker process ends, one way or another, and says how."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvat_core.errors import CannotWrite, EndedAtOnce, Interrupted, UsageError
from kvat_core.fake import FakeEngine
from kvat_core.measure.child import MARK, Child
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.interrupt import Stop
from kvat_core.measure.messages import PromptSpec
from kvat_core.measure.supervisor import WorkerFailed, WorkerProcess
from kvat_core.schema import Failure, ModelRef, PromptSource, Scenario, Target, Timeline

pytestmark = pytest.mark.slow


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess({}, grace_s=0.5) as worker:
        worker.call("start", {"engine": "fake", "scratch": "/nowhere"}, "start", Limits(60))
        yield worker


def child() -> psutil.Process:
    (process,) = psutil.Process().children()
    return process


def test_a_worker_answers_and_leaves_nothing_behind() -> None:
    with WorkerProcess({}) as worker:
        worker.call("start", {"engine": "fake", "scratch": None}, "start", Limits(60))
        probe = worker.call("probe", {"device": None, "options": {}}, "probe", Limits(60))
        process = child()
    assert isinstance(probe, dict)
    assert probe["device"] == "cpu"
    assert not process.is_running()


def test_the_environment_is_set_before_anything_is_imported(tmp_path: Path) -> None:
    marker = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, pathlib; pathlib.Path({str(marker)!r}).write_text(os.environ['KVAT_TEST_VALUE'])"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with WorkerProcess({"KVAT_TEST_VALUE": "early", "PYTHONPATH": path}) as worker:
        worker.call("start", {"engine": "fake", "scratch": None}, "start", Limits(60))
    assert marker.read_text() == "early"


def test_a_file_in_the_current_directory_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("import pathlib; pathlib.Path('imported').touch(); raise ImportError")
    monkeypatch.chdir(tmp_path)
    # On Python 3.10 the variable does nothing, and the worker has to see to it itself.
    with WorkerProcess({"PYTHONSAFEPATH": ""}) as worker:
        worker.call("start", {"engine": "fake", "scratch": "/nowhere"}, "start", Limits(60))
    assert not (tmp_path / "imported").exists()


def test_a_death_by_signal_is_a_crash_with_its_name(worker: WorkerProcess) -> None:
    child().send_signal(signal.SIGSEGV)
    with pytest.raises(WorkerFailed) as caught:
        worker.call("resources", {}, "resources", Limits(60))
    assert (caught.value.failure.kind, caught.value.failure.phase) == ("crash", "resources")
    assert "SIGSEGV" in caught.value.failure.reason
    assert not caught.value.alive


def test_what_does_not_answer_in_time_is_ended(worker: WorkerProcess) -> None:
    process = child()
    process.suspend()
    with pytest.raises(WorkerFailed) as caught:
        worker.call("resources", {}, "resources", Limits(0.2))
    assert caught.value.failure.kind == "timeout"
    assert not process.is_running()


def test_an_exception_in_the_caller_ends_the_worker_at_once() -> None:
    def interrupted() -> None:
        with WorkerProcess({}) as worker:
            worker.call("start", {"engine": "fake", "scratch": "/nowhere"}, "start", Limits(60))
            seen.append(child())
            raise KeyboardInterrupt

    seen: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].is_running()


def test_a_grandchild_does_not_outlive_its_worker(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, subprocess\n"
        "if 'KVAT_GRANDCHILD' in os.environ:\n"
        "    del os.environ['KVAT_GRANDCHILD']\n"
        "    subprocess.Popen(['sleep', '600'])\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with WorkerProcess({"KVAT_GRANDCHILD": "1", "PYTHONPATH": path}) as worker:
        worker.call("start", {"engine": "fake", "scratch": None}, "start", Limits(60))
        (grandchild,) = child().children()
    deadline = time.monotonic() + 10
    while grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_a_foreign_exception_tells_its_type_and_not_its_text(worker: WorkerProcess) -> None:
    # A prompt spec without its fields fails validation inside the worker, with the input in the text.
    with pytest.raises(WorkerFailed) as caught:
        worker.call("prove", {"source": {"kind": "text", "value": "my secret"}}, "prove", Limits(60))
    assert caught.value.alive
    assert caught.value.failure.kind == "error"
    assert "ValidationError" in caught.value.failure.reason
    assert "secret" not in caught.value.failure.model_dump_json()


def test_unusable_input_is_no_failure_of_a_candidate(worker: WorkerProcess) -> None:
    with pytest.raises(UsageError, match="has no device 'tpu'"):
        worker.call("probe", {"device": "tpu", "options": {}}, "probe", Limits(60))


def test_a_message_that_is_too_long_is_refused(worker: WorkerProcess) -> None:
    source = PromptSource(kind="text", value="x" * (9 * 2**20))
    with pytest.raises(WorkerFailed, match="a message of"):
        worker.call("prove", {"source": source.model_dump()}, "prove", Limits(60))


@pytest.mark.skipif(sys.platform != "linux", reason="parent death signals are Linux's")
def test_a_worker_dies_with_its_parent() -> None:
    code = (
        "import os, signal\n"
        "from kvat_core.measure.deadlines import Limits\n"
        "from kvat_core.measure.supervisor import WorkerProcess\n"
        "worker = WorkerProcess({})\n"
        "worker.call('start', {'engine': 'fake', 'scratch': '/nowhere'}, 'start', Limits(60))\n"
        "print(worker.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


# A scripted adapter

SCRIPTED = '''
import os, re, signal, sys, time
from kvat_core.engine import Probe
from kvat_core.fake import FakeEngine

class ScriptedAdapter(type(FakeEngine().adapter(None))):
    """The name of the model is what a call does first."""

    tokens = 0

    def load_model(self, model_id, **more):
        super().load_model(model_id="fake:tiny", **more)
        self.script = model_id

    def run_decode(self, prompt, max_new_tokens):
        exec(self.script)
        return super().run_decode(prompt, max_new_tokens)

    def tokens_seen(self):
        if self.tokens == "uncountable":
            raise RuntimeError("uncountable")
        return self.tokens

class ScriptedEngine(FakeEngine):
    name = "scripted"

    def probe(self, device, options):
        return Probe(device="cpu", versions={}, facts={"stdin": sys.stdin.read()})

    def adapter(self, scratch):
        return ScriptedAdapter()
'''
SCENARIO = Scenario(prompt_tokens=8, output_tokens=3)
LONG_S = 500.0
"""A time that no test waits for."""
FOREVER = "time.sleep(600)"
DEAF = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'deaf'); time.sleep(600)"

Scripted = Callable[..., AbstractContextManager[WorkerProcess]]


@pytest.fixture
def scripted(tmp_path: Path) -> Scripted:
    """A worker that is ready for a call, which a script begins; before its start it may run code of its own."""
    info = tmp_path / "kvat_scripted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-scripted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvat.engines]\nscripted = kvat_scripted:ScriptedEngine\n")
    (tmp_path / "kvat_scripted.py").write_text(SCRIPTED)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    recipe = FakeEngine().recipe(
        {"cache": "dynamic", "kernel": "auto", "graph": "off"},
        SCENARIO,
        Target(model=ModelRef(id="fake:tiny"), device="cpu"),
    )

    @contextmanager
    def run(script: str, *, first: str = "", **options: Any) -> Iterator[WorkerProcess]:
        (tmp_path / "sitecustomize.py").write_text(first)
        with WorkerProcess({"PYTHONPATH": path}, **{"grace_s": 0.5, **options}) as worker:
            worker.call("start", {"engine": "scripted", "scratch": "/nowhere"}, "start", Limits(60))
            worker.call("load", {**recipe.load, "model_id": script}, "load", Limits(60))
            worker.call("prepare", recipe.model_dump(mode="json"), "prepare", Limits(60))
            yield worker

    return run


def decode(
    worker: WorkerProcess, limits: Limits, text: str = "some words", output_tokens: int = SCENARIO.output_tokens
) -> Timeline:
    """A timed call of a scripted worker."""
    spec = PromptSpec(source=PromptSource(kind="text", value=text), tokens=SCENARIO.prompt_lengths, nonce=0)
    arguments = {"prompt": spec.model_dump(mode="json"), "max_new_tokens": output_tokens}
    return Timeline.model_validate(worker.call("decode", arguments, "sample", limits))


def failure_of(worker: WorkerProcess, limits: Limits) -> Failure:
    """How a call that ends its worker fails; long before the longest deadline."""
    process = psutil.Process(worker.pid)
    started = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        decode(worker, limits)
    assert time.monotonic() - started < LONG_S / 2
    assert not caught.value.alive
    assert not process.is_running()
    return caught.value.failure


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that belong to the worker with this mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_nothing_that_is_printed_is_taken_for_a_message(scripted: Scripted) -> None:
    chatter = "import os; print('x' * 100_000, flush=True); os.write(1, b'\\0\\0\\0\\2{}'); os.write(2, b'y' * 100_000)"
    with scripted(chatter, first=chatter) as worker:
        assert decode(worker, Limits(60)).requests[0].output_tokens == SCENARIO.output_tokens


def test_an_answer_that_is_too_long_for_a_message_fails_its_call_alone(scripted: Scripted) -> None:
    with scripted("") as worker:
        with pytest.raises(WorkerFailed, match="which is too long") as caught:
            decode(worker, Limits(60), output_tokens=500_000)
        assert caught.value.failure.kind == "invalid_output"
        assert caught.value.alive
        assert decode(worker, Limits(60)).requests[0].output_tokens == SCENARIO.output_tokens


@contextmanager
def typed(text: bytes) -> Iterator[None]:
    """Standard input of this process that somebody has typed into."""
    before = os.dup(0)
    reading, writing = os.pipe()
    os.write(writing, text)
    os.dup2(reading, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        for descriptor in (before, reading, writing):
            os.close(descriptor)


def test_a_workers_input_is_empty(scripted: Scripted) -> None:
    with typed(b"for the parent"), scripted("") as worker:
        probe = worker.call("probe", {"device": None, "options": {}}, "probe", Limits(60))
    assert isinstance(probe, dict)
    assert probe["facts"] == {"stdin": ""}


@pytest.mark.skipif(sys.platform != "linux", reason="the out-of-memory killer is Linux's")
def test_when_memory_is_short_a_worker_dies_before_its_parent(worker: WorkerProcess) -> None:
    mine = Path("/proc/self/oom_score_adj").read_text()
    assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text() == "1000\n"
    with WorkerProcess({}):
        assert Path("/proc/self/oom_score_adj").read_text() == mine != "1000\n"


# Deadlines and heartbeats


def test_a_call_without_a_first_token_is_ended(scripted: Scripted) -> None:
    with scripted(FOREVER) as worker:
        failure = failure_of(worker, Limits(LONG_S, first_token_s=1, gap_s=LONG_S))
    assert (failure.kind, failure.phase) == ("timeout", "first token")
    assert failure.reason == "no first token in 1 s (sample)"


def test_a_call_that_stops_delivering_tokens_is_ended(scripted: Scripted) -> None:
    with scripted(f"self.tokens = 3; {FOREVER}") as worker:
        failure = failure_of(worker, Limits(LONG_S, first_token_s=LONG_S, gap_s=1))
    assert (failure.kind, failure.phase) == ("timeout", "token gap")
    assert failure.reason == "no token for 1 s after 3 (sample)"


def test_a_call_that_goes_on_delivering_tokens_is_not(scripted: Scripted) -> None:
    slowly = "for self.tokens in range(1, 17): time.sleep(0.25)"
    with scripted(slowly) as worker:
        assert decode(worker, Limits(LONG_S, first_token_s=3, gap_s=3)).requests


@pytest.mark.parametrize("tokens", ["None", "'a lot'", "'uncountable'"])
def test_where_tokens_cannot_be_seen_only_the_whole_call_has_a_deadline(scripted: Scripted, tokens: str) -> None:
    with scripted(f"self.tokens = {tokens}; time.sleep(4)") as worker:
        assert decode(worker, Limits(LONG_S, first_token_s=3, gap_s=3)).requests


def test_a_worker_without_a_heartbeat_is_said_to_be_silent(scripted: Scripted) -> None:
    with scripted("re.match('(a+)+b', 'a' * 60)") as worker:
        failure = failure_of(worker, Limits(LONG_S, first_token_s=6))
    assert re.fullmatch(r"no first token in 6 s \(sample\); its last heartbeat came \d+ s before", failure.reason)


def test_what_does_not_obey_is_killed(scripted: Scripted) -> None:
    with scripted(DEAF) as worker:
        failure = failure_of(worker, Limits(1))
    assert (failure.kind, failure.phase, failure.stderr_tail) == ("timeout", "sample", "deaf")


def test_what_cannot_be_killed_is_said_to_be_so(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(FOREVER) as worker:
        process = psutil.Process(worker.pid)
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", lambda *_: None)
            with pytest.raises(WorkerFailed) as caught:
                decode(worker, Limits(1))
        assert process.is_running()
    assert (caught.value.failure.kind, caught.value.alive) == ("unkillable", False)
    assert caught.value.failure.reason == "no answer in 1 s; and it cannot be killed"
    assert not process.is_running()


def test_what_cannot_be_killed_is_said_to_be_so_after_a_failure_of_another_kind(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(FOREVER) as worker, monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        patch.setattr(Child, "close_requests", lambda _: None)
        with pytest.raises(WorkerFailed) as caught, worker:
            raise ValueError("of the launch")
        assert psutil.pid_exists(worker.pid)
    assert caught.value.failure.kind == "unkillable"


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (CannotWrite("the disk is full"), CannotWrite, "the disk is full; besides, a worker cannot be killed"),
        (Interrupted("interrupted"), Interrupted, "interrupted; besides, a worker cannot be killed"),
        (KeyboardInterrupt(), EndedAtOnce, "interrupted, but a worker cannot be killed"),
    ],
)
def test_what_cannot_be_killed_is_said_to_be_so_after_what_ends_a_run(
    scripted: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    told: type[BaseException],
    message: str,
) -> None:
    with scripted(FOREVER) as worker, monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        patch.setattr(Child, "close_requests", lambda _: None)
        with pytest.raises(told, match=f"^{message} and may hold its device: wait until it is gone"), worker:
            raise error


def test_a_prompt_that_nobody_reads_ends_by_its_deadline(scripted: Scripted) -> None:
    with scripted("") as worker:
        process = psutil.Process(worker.pid)
        process.suspend()
        with pytest.raises(WorkerFailed, match="no answer in 1 s"):
            decode(worker, Limits(1), text="x" * 2**20)
    assert not process.is_running()


def test_a_prompt_longer_than_a_pipe_arrives(scripted: Scripted) -> None:
    with scripted("") as worker:
        assert decode(worker, Limits(60), text="word " * 2**18).requests[0].prompt_tokens == SCENARIO.prompt_tokens


# The end of a worker


def test_a_descendant_that_holds_the_pipes_hides_no_death(scripted: Scripted) -> None:
    with scripted("if os.fork() == 0: os.setsid(); time.sleep(600)\nos.write(2, b'last words'); os._exit(3)") as worker:
        mark = psutil.Process(worker.pid).environ()[MARK]
        assert [process.pid for process in marked(mark)] == [worker.pid]
        failure = failure_of(worker, Limits(LONG_S))
    assert (failure.kind, failure.reason) == ("no_output", "the worker ended with exit code 3 and no answer")
    assert failure.stderr_tail == "last words"
    assert not marked(mark)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"\xff\xff\xff\xff", "the worker sent a message of 4294967295 bytes"),
        (b"\0\0\0\1[", "the worker sent an answer"),
    ],
)
def test_a_library_that_writes_among_the_messages_costs_its_worker(
    scripted: Scripted, written: bytes, reason: str
) -> None:
    with scripted(f"os.write(int(sys.orig_argv[-1].split()[-1][:-1]), {written!r}); {FOREVER}") as worker:
        failure = failure_of(worker, Limits(LONG_S))
    assert failure.kind == "no_output"
    assert failure.reason.startswith(reason)


@pytest.mark.parametrize("reading", [True, False])
def test_a_wish_to_stop_ends_a_call_that_waits(scripted: Scripted, reading: bool) -> None:
    stop, started = Stop(), time.monotonic()

    def interrupted() -> None:
        with scripted(FOREVER, stop=stop) as worker:
            processes.append(psutil.Process(worker.pid))
            if not reading:
                processes[0].suspend()
            threading.Timer(0.5, stop.ask).start()
            decode(worker, Limits(LONG_S), text="words" if reading else "x" * 2**20)

    processes: list[psutil.Process] = []
    with pytest.raises(Interrupted):
        interrupted()
    assert time.monotonic() - started < LONG_S / 2
    assert not processes[0].is_running()


def test_an_interrupt_while_a_worker_is_given_time_to_end_kills_it(scripted: Scripted) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        with scripted(DEAF, stop=stop, grace_s=LONG_S) as worker:
            processes.append(psutil.Process(worker.pid))
            threading.Timer(1, stop.ask).start()
            impatience.start()
            decode(worker, Limits(LONG_S))

    stop, started = Stop(), time.monotonic()
    processes: list[psutil.Process] = []
    impatience = threading.Timer(2, os.kill, (os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        impatience.cancel()
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - started < LONG_S / 2
    assert not processes[0].is_running()
