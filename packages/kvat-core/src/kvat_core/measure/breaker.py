"""When failures pile up, is it the candidates or the machine?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import JsonValue

from kvat_core.errors import Paused, UsageError
from kvat_core.measure.deadlines import Deadlines, Limits
from kvat_core.measure.launch import held
from kvat_core.measure.redaction import anonymous
from kvat_core.measure.session import OpenWorker
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.run import OF_THE_CANDIDATE, Run
from kvat_core.schema import Event, Failure, Health

FAILURES_IN_A_ROW = 3
"""Launches without a single sample, after which the machine itself is checked."""


class Breaker:
    """Pauses a run whose device no longer works, rather than failing every candidate that is left.

    Args:
        run: what has happened.
        record: journals an event.
        announce: shows what is being done now.
        open_worker: starts a worker.
        deadlines: limits per phase.
        options: of the engine, as the user gave them.
    """

    def __init__(
        self,
        run: Run,
        record: Callable[[Event], None],
        announce: Callable[[str], None],
        open_worker: OpenWorker,
        deadlines: Deadlines,
        options: Mapping[str, str],
    ) -> None:
        self._run = run
        self._record = record
        self._announce = announce
        self._open_worker = open_worker
        self._deadlines = deadlines
        self._options: dict[str, JsonValue] = dict(options)
        self._in_a_row = 0

    def after_launch(self) -> None:
        """Look at the launch that has just ended.

        Raises:
            Paused: the device does not work, or is held by a process that cannot be killed.
        """
        launch = self._run.launches[-1].launch
        failures = [failed.failure for failed in self._run.failed if failed.launch == launch]
        failures += [one.failure for one in self._run.context_trials if one.launch == launch and one.failure]
        lengths = self._run.other_lengths.values()
        failures += [one.failure for one in lengths if one.launch == launch and one.failure]
        failures += [one.failure for one in self._run.judged if one.launch == launch and one.failure]
        failures += [one.failure for one in self._run.looked_for_leaks if one.launch == launch and one.failure]
        failures += [end.failure for end in self._run.ended[-1:] if end.launch == launch and end.failure]
        if any(failure.kind == "unkillable" for failure in failures):
            raise held(self._run.header.target.device)
        failed = any(failure.kind not in OF_THE_CANDIDATE for failure in failures)
        sampled = any(sample.launch == launch for sample in self._run.samples)
        self._in_a_row = self._in_a_row + 1 if failed and not sampled else 0
        if self._in_a_row >= FAILURES_IN_A_ROW or _broke_the_device(failures):
            self._in_a_row = 0
            self._check_health()

    def _check_health(self) -> None:
        device = self._run.header.target.device
        self._announce(f"pausing after failures: does {device} still work?")
        reason = self._ask_fresh_worker()
        self._record(Health(ok=reason is None, reason=reason or ""))
        if reason is not None:
            raise Paused(
                f"after failures a fresh process cannot work on {device} either ({reason}): mend that, "
                "then go on with --resume"
            )

    def _ask_fresh_worker(self) -> str | None:
        """Why the device does not work, or None."""
        header = self._run.header
        limits = Limits(self._deadlines.start_s)
        try:
            with self._open_worker({}) as worker:
                worker.call("start", {"engine": header.engine, "scratch": None}, "health", limits)
                asked: dict[str, JsonValue] = {"device": header.target.device, "options": self._options}
                worker.call("probe", asked, "health", limits)
        except WorkerFailed as failed:
            return f"{failed.failure.kind}: {anonymous(failed.failure.reason)}"
        except UsageError as error:
            return anonymous(str(error))
        return None


def _broke_the_device(failures: list[Failure]) -> bool:
    return any(failure.kind == "device_error" for failure in failures)
