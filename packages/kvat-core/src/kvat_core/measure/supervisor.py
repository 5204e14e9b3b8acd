"""The parent's side of a worker: ask it, watch the deadlines, and say how it ended."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from pydantic import JsonValue
from typing_extensions import Self

from kvat_core.errors import EndedAtOnce, KvatError, UsageError
from kvat_core.measure import messages
from kvat_core.measure.child import Child
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.interrupt import Stop
from kvat_core.measure.messages import BadMessage, Beat, Operation, Reply, Request
from kvat_core.schema import Failure

HELD = "a worker cannot be killed and may hold {}: wait until it is gone, or restart the machine"

TICK_S = 0.25
"""How often a wait looks at deadlines, at the process, and at a wish to stop."""


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

    @property
    def pid(self) -> int | None:
        """The process that measures, where it is another one than this."""

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, limits: Limits) -> JsonValue:
        """Ask and wait.

        Raises:
            WorkerFailed: an answer that is a failure, no answer in time, or an end of the process.
            UsageError: the engine says that the input cannot be used at all.
            Interrupted: the user ended the run.
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
    """A worker in a process of its own; a context manager that leaves no process behind.

    Args:
        environment: variables added to the parent's, set before the child imports anything.
        stop: looked at wherever this waits.
        grace_s: time the worker has to end by itself, to obey SIGTERM, and to be gone after SIGKILL.

    Raises:
        WorkerFailed: the system starts no process; on leaving, if the worker cannot be killed.
        EndedAtOnce: on leaving by a `KeyboardInterrupt`, if the worker cannot be killed.
    """

    def __init__(self, environment: Mapping[str, str], *, stop: Stop | None = None, grace_s: float = 10.0) -> None:
        self._stop = stop or Stop()
        self._grace_s = grace_s
        try:
            self._child = Child(environment, grace_s)
        except (OSError, RuntimeError) as error:
            reason = f"no process can be started ({getattr(error, 'strerror', None) or error})"
            raise WorkerFailed(Failure(kind="error", phase="start", reason=reason), alive=False) from error

    @property
    def pid(self) -> int:
        """See `Client.pid`."""
        return self._child.pid

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, limits: Limits) -> JsonValue:
        """See `Client.call`."""
        # Here, too, because quick calls never wait for long.
        self._stop.check()
        clock = _Clock(limits, phase)
        try:
            self._send(messages.encode(Request(operation=operation, arguments=arguments)), clock)
            reply = self._receive(clock)
        except _Overdue as overdue:
            raise self._ended(overdue.failure) from None
        except (EOFError, BrokenPipeError):
            # Who ends a whole group, as schedulers do, ends this run and no candidate.
            self._stop.check()
            raise self._end_of_process(phase) from None
        except BadMessage as error:
            raise self._ended(Failure(kind="no_output", phase=phase, reason=f"the worker sent {error}")) from None
        try:
            return value_or_raise(reply, phase)
        except WorkerFailed as failed:
            raise WorkerFailed(self._with_output(failed.failure), alive=True) from None

    def _send(self, data: bytes, clock: _Clock) -> None:
        while data:
            self._wait(self._child.requests, selectors.EVENT_WRITE, clock)
            data = data[os.write(self._child.requests, data) :]

    def _receive(self, clock: _Clock) -> Reply:
        while True:
            length = messages.body_bytes(self._read(messages.LENGTH_BYTES, clock))
            answer = messages.decode_answer(self._read(length, clock))
            if isinstance(answer, Reply):
                return answer
            clock.hear(answer)

    def _read(self, size: int, clock: _Clock) -> bytes:
        data = b""
        while len(data) < size:
            self._wait(self._child.replies, selectors.EVENT_READ, clock)
            chunk = os.read(self._child.replies, size - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def _wait(self, descriptor: int, event: int, clock: _Clock) -> None:
        """Return when a pipe is ready; EOFError when the process is over, whoever else still holds its pipe."""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            while True:
                ended = self._child.has_ended()
                # What is there is read, however late: it may be this process that was stopped meanwhile.
                if selector.select(0 if ended else TICK_S):
                    return
                if ended:
                    raise EOFError
                self._stop.check()
                clock.check()

    def _end_of_process(self, phase: str) -> WorkerFailed:
        """How the process ended whose pipe is closed."""
        by_itself = self._child.wait(self._grace_s)
        code = self._child.end()
        if code is None or not by_itself:
            return self._ended(Failure(kind="no_output", phase=phase, reason="the worker closed its pipe"))
        if code >= 0:
            reason = f"the worker ended with exit code {code} and no answer"
            return self._ended(Failure(kind="no_output", phase=phase, reason=reason))
        name = _signal_name(-code)
        if -code == signal.SIGKILL and self._child.was_killed_for_memory():
            reason = "the kernel's out-of-memory killer ended the worker"
            return self._ended(Failure(kind="oom_host", phase=phase, reason=reason))
        return self._ended(Failure(kind="crash", phase=phase, reason=f"ended by {name}"))

    def _ended(self, failure: Failure) -> WorkerFailed:
        """The failure of a worker that is no more, or that nothing can end."""
        if self._child.end() is None:
            reason = f"{failure.reason}; and it cannot be killed"
            failure = failure.model_copy(update={"kind": "unkillable", "reason": reason})
        return WorkerFailed(self._with_output(failure), alive=False)

    def _with_output(self, failure: Failure) -> Failure:
        return failure.model_copy(update={"stderr_tail": self._child.output_tail()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._child.close_requests()
            if kind is None:
                self._child.wait(self._grace_s)
            code = self._child.end(at_once=kind is KeyboardInterrupt)
        except KeyboardInterrupt as interrupt:
            if self._child.end(at_once=True) is None:
                raise _held(interrupt) from interrupt
            raise
        if code is None:
            raise _held(error) from error


def _held(error: BaseException | None) -> Exception:
    """What ends a run is told with what it leaves behind; nothing else may hide that the device is held."""
    if isinstance(error, KeyboardInterrupt):
        return EndedAtOnce(f"interrupted, but {HELD.format('its device')}")
    if isinstance(error, KvatError):
        return type(error)(f"{error}; besides, {HELD.format('its device')}")
    failure = Failure(kind="unkillable", phase="cleanup", reason="it did not end, and cannot be killed")
    return WorkerFailed(failure, alive=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


class _Overdue(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class _Clock:
    """The deadlines of one request. Of single tokens it knows what the beats tell, so it may be a beat late."""

    def __init__(self, limits: Limits, phase: str) -> None:
        self._limits = limits
        self._phase = phase
        self._start_s = self._token_s = self._beat_s = time.monotonic()
        # Without any beat none is the safe guess: what blocks the interpreter delivers no tokens.
        self._tokens: int | None = 0

    def hear(self, beat: Beat) -> None:
        """Take in a beat."""
        self._beat_s = time.monotonic()
        if beat.tokens != self._tokens:
            self._token_s = self._beat_s
            self._tokens = beat.tokens

    def check(self) -> None:
        """Raise `_Overdue` if a deadline has passed."""
        now_s = time.monotonic()
        if now_s - self._start_s > self._limits.whole_s:
            raise self._overdue(self._phase, f"no answer in {self._limits.whole_s:g} s", now_s)
        first_token_s, gap_s = self._limits.first_token_s, self._limits.gap_s
        if self._tokens == 0 and first_token_s is not None and now_s - self._start_s > first_token_s:
            raise self._overdue("first token", f"no first token in {first_token_s:g} s ({self._phase})", now_s)
        if self._tokens and gap_s is not None and now_s - self._token_s > gap_s:
            reason = f"no token for {gap_s:g} s after {self._tokens} ({self._phase})"
            raise self._overdue("token gap", reason, now_s)

    def _overdue(self, phase: str, reason: str, now_s: float) -> _Overdue:
        silence_s = now_s - self._beat_s
        silent = f"; its last heartbeat came {silence_s:.0f} s before" if silence_s > 5 else ""
        return _Overdue(Failure(kind="timeout", phase=phase, reason=reason + silent))
