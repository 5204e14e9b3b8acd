"""Lines for logs and pipes: one per launch and one per failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvat_report import one_line

if TYPE_CHECKING:
    from kvat_core.schema import Failed, LaunchOrder
    from kvat_core.tuner import Progress

_NAMED = 3
"""Candidates of a launch that are named; more are counted."""


class PlainLines:
    """Prints what is new since the call before."""

    def __init__(self) -> None:
        self._launches = 0
        self._failures = 0

    def __call__(self, progress: Progress) -> None:
        """Show this moment of a run."""
        run = progress.run
        for order in run.launches[self._launches :]:
            print(_launch_line(order, progress), flush=True)
        for failed in run.failed[self._failures :]:
            print(_failure_line(failed, progress), flush=True)
        self._launches, self._failures = len(run.launches), len(run.failed)


def _launch_line(order: LaunchOrder, progress: Progress) -> str:
    from kvat_cli.display._known import labels, state

    names = labels(progress.run)
    candidates = list(dict.fromkeys(names[cell.candidate] for cell in order.cells))
    what = "; ".join(candidates) if len(candidates) <= _NAMED else f"{len(candidates)} candidates"
    return one_line(f"launch {order.launch} for {order.purpose}: {what} ({state(progress)})")


def _failure_line(failed: Failed, progress: Progress) -> str:
    from kvat_cli.display._known import labels

    failure = failed.failure
    label = labels(progress.run)[failed.cell.candidate]
    return one_line(f"failed: {label} in {failed.cell.scenario}: {failure.kind} ({failure.phase}): {failure.reason}")
