"""The parent's side of a worker: start it, ask it, and end it whatever it does."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Protocol

from pydantic import JsonValue
from typing_extensions import Self

from kvat_core.errors import UsageError
from kvat_core.measure import messages
from kvat_core.measure.messages import BadMessage, Operation, Reply, Request
from kvat_core.schema import Failure

STDERR_TAIL_BYTES = 2000
GRACE_S = 10.0
"""Time a worker has to end by itself, and to obey SIGTERM, before it is killed."""

_BOOTSTRAP = "import sys; sys.path[:] = filter(None, sys.path); from kvat_core.measure.worker import main; main()"
"""Takes the current directory off the path first: a file there could pass for a library."""


class WorkerFailed(Exception):
    """A request has no value.

    Args:
        failure: what happened.
        alive: whether the worker can go on.
    """

    def __init__(self, failure: Failure, alive: bool) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.alive = alive


class Client(Protocol):
    """Whoever answers requests: a child process, or in tests the same code in this process."""

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, timeout_s: float) -> JsonValue:
        """Ask and wait.

        Raises:
            WorkerFailed: an answer that is a failure, no answer in time, or an end of the process.
            UsageError: the engine says that the input cannot be used at all.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def value_or_raise(reply: Reply, phase: str) -> JsonValue:
    """Value of a reply; its failure as an exception.

    Raises:
        UsageError: the engine says that the input cannot be used at all.
        WorkerFailed: the request failed; the worker can go on.
    """
    if reply.usage:
        raise UsageError(reply.reason)
    if reply.failure is not None:
        raise WorkerFailed(Failure(kind=reply.failure, phase=phase, reason=reply.reason), alive=True)
    return reply.value


class WorkerProcess:
    """A worker in a process group of its own; a context manager that leaves no process behind.

    Args:
        environment: variables added to the parent's, set before the child imports anything.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # For whatever else the worker starts.
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._stderr = _Tail(self._process.stderr)

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, timeout_s: float) -> JsonValue:
        """See `Client.call`."""
        deadline = time.monotonic() + timeout_s
        try:
            self._stdin.write(messages.encode(Request(operation=operation, arguments=arguments)))
            self._stdin.flush()
            length = messages.body_bytes(self._read(messages.LENGTH_BYTES, deadline))
            reply = messages.decode_reply(self._read(length, deadline))
        except TimeoutError:
            self._kill()
            raise self._with_stderr(self._overdue(phase, timeout_s), alive=False) from None
        except (EOFError, BrokenPipeError):
            raise self._with_stderr(self._end_of_process(phase), alive=False) from None
        except BadMessage as error:
            self._kill()
            failure = Failure(kind="no_output", phase=phase, reason=f"the worker sent {error}")
            raise self._with_stderr(failure, alive=False) from None
        try:
            return value_or_raise(reply, phase)
        except WorkerFailed as failed:
            raise self._with_stderr(failed.failure, alive=True) from None

    def _read(self, size: int, deadline: float) -> bytes:
        """Exactly `size` bytes of the reply, or EOFError, or TimeoutError at the deadline."""
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(self._stdout.fileno(), size - len(data))
                if not chunk:
                    raise EOFError
                data += chunk
        return data

    def _with_stderr(self, failure: Failure, alive: bool) -> WorkerFailed:
        return WorkerFailed(failure.model_copy(update={"stderr_tail": self._stderr.text()}), alive)

    def _overdue(self, phase: str, timeout_s: float) -> Failure:
        reason = f"no answer in {timeout_s:g} s"
        if self._process.poll() is not None:
            return Failure(kind="timeout", phase=phase, reason=reason)
        return Failure(kind="unkillable", phase=phase, reason=f"{reason}, and it cannot be killed")

    def _end_of_process(self, phase: str) -> Failure:
        """Why the pipe is closed."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return Failure(kind="no_output", phase=phase, reason="the worker closed its pipe")
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
            return Failure(kind="crash", phase=phase, reason=f"ended by {name}{hint}")
        return Failure(kind="no_output", phase=phase, reason=f"the worker ended with exit code {code} and no answer")

    def _kill(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S if kind is None else 0)
        self._kill()
        self._stdout.close()
        self._stderr.close()


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
        self._thread.join(GRACE_S)
        self._stream.close()
