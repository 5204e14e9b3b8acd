"""Lines for logs and pipes: one per launch and one per failure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvat_cli.display._known import labels, state
from kvat_report import one_line

if TYPE_CHECKING:
    from kvat_core.run import Run
    from kvat_core.schema import Failed, Failure, Health, LaunchOrder
    from kvat_core.tuner import Progress

_NAMED = 3
"""Candidates of a launch that are named; more are counted."""


class PlainLines:
    """Prints what is new since the call before."""

    def __init__(self) -> None:
        self._launches = 0
        self._failures = 0
        self._ends = 0
        self._checks = 0
        self._begun = False

    def __call__(self, progress: Progress) -> None:
        """Show this moment of a run."""
        run = progress.run
        if run is None:
            return
        if not self._begun:
            # What a resumed run has from before is no news.
            self._begun = True
            self._take_note(run)
        names = labels(run)
        for order in run.launches[self._launches :]:
            _say(_launch_line(order, names, state(progress)))
        for failed in run.failed[self._failures :]:
            _say(_failure_line(failed, names, run))
        for end in run.ended[self._ends :]:
            if end.failure:
                _say(_end_line(end.launch, end.failure))
        for health in run.health[self._checks :]:
            _say(_health_line(health, run.header.target.device))
        self._take_note(run)

    def _take_note(self, run: Run) -> None:
        self._launches, self._failures = len(run.launches), len(run.failed)
        self._ends, self._checks = len(run.ended), len(run.health)


def _say(line: str) -> None:
    """Print a line; a reader that went away must not end a long run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def _launch_line(order: LaunchOrder, names: Mapping[str, str], standing: str) -> str:
    candidates = list(dict.fromkeys(names[cell.candidate] for cell in order.cells))
    what = "; ".join(candidates) if len(candidates) <= _NAMED else f"{len(candidates)} candidates"
    return one_line(f"launch {order.launch} for {order.purpose.replace('_', '-')}: {what} ({standing})")


def _health_line(health: Health, device: str) -> str:
    if health.ok:
        return f"after failures: checked that {device} still works, going on"
    return one_line(f"after failures: {device} does not work: {health.reason}")


def _end_line(launch: int, failure: Failure) -> str:
    return one_line(f"after the work of launch {launch}: {failure.kind} ({failure.phase}): {failure.reason}")


def _failure_line(failed: Failed, names: Mapping[str, str], run: Run) -> str:
    failure, candidate = failed.failure, failed.cell.candidate
    what = "peak memory not read" if run.is_about_memory(failed) else "failed"
    where = f" in {failed.cell.scenario}" if failed.phase_is_of_a_cell else ""
    # A crash may come from outside.
    again = "; it is tried once more" if run.forgiven.get(candidate) == failed.launch and candidate in run.live else ""
    return one_line(f"{what}: {names[candidate]}{where}: {failure.kind} ({failure.phase}): {failure.reason}{again}")
