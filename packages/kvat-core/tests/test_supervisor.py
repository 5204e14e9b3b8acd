"""A worker process ends, one way or another, and says how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.supervisor import WorkerFailed, WorkerProcess
from kvat_core.schema import PromptSource


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
        probe = worker.call("probe", {"device": None}, "probe", Limits(60))
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
        worker.call("probe", {"device": "tpu"}, "probe", Limits(60))


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
