"""A child process that can be ended whatever it does, with everything it started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO

import psutil

from kvat_core.probes import control_group

STDERR_TAIL_BYTES = 2000
MARK = "KVAT_WORKER"
"""Variable in the environment of a child and of all its descendants that says whose they are."""

_BOOTSTRAP = "import sys; sys.path[:] = filter(None, sys.path); from kvat_core.measure.worker import main; main({}, {})"
"""Takes the current directory off the path first: a file there could pass for a library."""
_POLL_S = 0.02
_FIRST_OF_OUR_OWN = 3
"""Descriptors below are the standard streams."""


class Child:
    """A worker in a session of its own; stdin is empty, stdout and stderr are kept apart from the messages.

    Args:
        environment: variables added to the parent's, set before the child imports anything.
        grace_s: time it has to obey SIGTERM, and to be gone after SIGKILL.
    """

    def __init__(self, environment: Mapping[str, str], grace_s: float) -> None:
        self._grace_s = grace_s
        self._mark = secrets.token_hex(8)
        self._oom_kills = control_group.oom_kills()
        self._released = False
        requests, self.requests = _pipe()
        try:
            self.replies, replies = _pipe()
        except OSError:
            os.close(requests)
            os.close(self.requests)
            raise
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP.format(requests, replies)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests, replies),
                # The safe path is for whatever else the worker starts.
                env={**os.environ, "PYTHONSAFEPATH": "1", **environment, MARK: self._mark},
                start_new_session=True,
            )
        except OSError:
            os.close(self.requests)
            os.close(self.replies)
            raise
        finally:
            os.close(requests)
            os.close(replies)
        try:
            self._started = psutil.Process(self.pid).create_time()
            os.set_blocking(self.requests, False)
            assert self._process.stdout is not None
            self._output = _Tail(self._process.stdout)
        except BaseException:
            # A system that is out of threads has started the process all the same.
            with self._process:
                self._process.kill()
            os.close(self.requests)
            os.close(self.replies)
            raise

    @property
    def pid(self) -> int:
        """Process id, valid until the child was ended."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether the process is over; where the system allows, without reaping it, so that its id stays its own."""
        if self._process.returncode is not None:
            return True
        if hasattr(os, "waitid"):
            # Without children to wait for, somebody else has reaped it.
            with contextlib.suppress(ChildProcessError):
                return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether it ends by itself within a time."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self.has_ended()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return ended

    def close_requests(self) -> None:
        """Tell it that nothing more will be asked, upon which a sound worker ends."""
        if self.requests >= 0:
            os.close(self.requests)
            self.requests = -1

    def end(self, *, at_once: bool = False) -> int | None:
        """End it and all it started, by force if it must be, and close its pipes. Twice is as good as once.

        Args:
            at_once: do not ask it first.

        Returns:
            Its exit code, negative for a signal; None if it cannot be killed.
        """
        if not at_once and not self.has_ended():
            self._signal_group(signal.SIGTERM)
            self.wait(self._grace_s)
        # Also when it has ended: whoever it started may be left in its group.
        self._signal_group(signal.SIGKILL)
        if not self.wait(self._grace_s):
            return None
        if not self._released:
            self._process.wait()
            self._kill_strays()
            self._released = True
            self.close_requests()
            os.close(self.replies)
            self._output.close()
        return self._process.returncode

    def output_tail(self) -> str:
        """The end of what it has printed."""
        return self._output.text()

    def was_killed_for_memory(self) -> bool:
        """Whether the kernel's out-of-memory killer has struck somewhere since it was started."""
        return self._oom_kills is not None and self._oom_kills != control_group.oom_kills()

    def _signal_group(self, number: signal.Signals) -> None:
        # Not after it was reaped: then its id may be somebody else's.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _kill_strays(self) -> None:
        """Kill descendants that left the group; the mark proves that they are our own."""
        for stray in self._strays():
            with contextlib.suppress(psutil.Error):
                stray.kill()

    def _strays(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                # Of older ones the environment is not read: of a process that hangs in the kernel it may not come.
                if process.create_time() >= self._started and process.environ().get(MARK) == self._mark:
                    yield process


def _pipe() -> tuple[int, int]:
    """A pipe whose ends do not stand in for standard streams that are closed: a child has such of its own."""
    low: list[int] = []
    try:
        while min(ends := os.pipe()) < _FIRST_OF_OUR_OWN:
            low += ends
    finally:
        for end in low:
            os.close(end)
    return ends


class _Tail:
    """Keeps reading a stream so that its writer never blocks; remembers only the end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._end = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while chunk := os.read(self._stream.fileno(), 65536):
            self._end = (self._end + chunk)[-STDERR_TAIL_BYTES:]

    def text(self) -> str:
        # A process that has just died may have bytes on the way; a moment is enough for a local pipe.
        self._thread.join(0.2)
        return self._end.decode(errors="replace")

    def close(self) -> None:
        self._thread.join(1.0)
        # Somebody who cannot be found may hold the other end; the thread then waits on, and costs nothing.
        if not self._thread.is_alive():
            self._stream.close()
