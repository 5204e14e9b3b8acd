"""Exhaustive search: every live candidate once per block, blocks interleaved, then memory and contexts."""

from __future__ import annotations

from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder
from kvat_core.scoring import memory_matters_to
from kvat_core.search._base import Search, incumbent_first, memory_order, peaks_of_a_plan
from kvat_core.search._context import context_trials_left, next_context_trial


class Grid(Search):
    """A block measures every candidate in every scenario; candidates that share a load share its launch."""

    name = "grid"

    def next(self, run: Run) -> LaunchOrder | None:
        """See `Search.next`."""
        for number in range(run.header.profile.launches):
            groups = self._groups(run, number)
            if groups:
                return LaunchOrder(launch=len(run.launches), round=number, purpose="timing", cells=tuple(groups[0]))
        return memory_order(run, peaks_of_a_plan(run)) or next_context_trial(run)

    def remaining(self, run: Run) -> int:
        """See `Search.remaining`."""
        timing = sum(len(self._groups(run, number)) for number in range(run.header.profile.launches))
        if not timing:
            return len(peaks_of_a_plan(run)) + context_trials_left(run)
        # Until the winner is known, it counts as another one than the incumbent.
        return timing + max(2, len(memory_matters_to(run)))

    def _groups(self, run: Run, number: int) -> list[list[Cell]]:
        groups = self.outstanding(run, number, run.live)
        return incumbent_first(groups, run.incumbent) if number == 0 else groups
