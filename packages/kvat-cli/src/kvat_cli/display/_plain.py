"""Lines for logs and pipes: one per launch and one per failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvat_cli.display._known import labels, state
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
        if run is None:
            return
        names = labels(run)
        for order in run.launches[self._launches :]:
            print(_launch_line(order, names, state(progress)), flush=True)
        for failed in run.failed[self._failures :]:
            print(_failure_line(failed, names), flush=True)
        self._launches, self._failures = len(run.launches), len(run.failed)


def _launch_line(order: LaunchOrder, names: Mapping[str, str], standing: str) -> str:
    candidates = list(dict.fromkeys(names[cell.candidate] for cell in order.cells))
    what = "; ".join(candidates) if len(candidates) <= _NAMED else f"{len(candidates)} candidates"
    return one_line(f"launch {order.launch} for {order.purpose}: {what} ({standing})")


def _failure_line(failed: Failed, names: Mapping[str, str]) -> str:
    failure, label = failed.failure, names[failed.cell.candidate]
    return one_line(f"failed: {label} in {failed.cell.scenario}: {failure.kind} ({failure.phase}): {failure.reason}")
