"""Exhaustive search: every live candidate once per round, rounds interleaved, then memory in own processes."""

from __future__ import annotations

import random
from collections.abc import Mapping

from kvat_core import scoring
from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder


class Grid:
    """A round measures every candidate in every scenario; candidates that share a load share its launch.

    Launches and the candidates in them come in random order, so that drift meets all alike; only
    the very first launch is the incumbent's, so that a run cut short knows what it compares with.

    Args:
        load_keys: key of the load each cell needs.
        seed: of the random order.
    """

    def __init__(self, load_keys: Mapping[Cell, str], seed: int) -> None:
        self._load_keys = load_keys
        self._seed = seed

    def next(self, run: Run) -> LaunchOrder | None:
        """See `Search.next`."""
        for number in range(run.header.profile.launches):
            groups = self._outstanding(run, number)
            if groups:
                return LaunchOrder(launch=len(run.launches), round=number, purpose="timing", cells=tuple(groups[0]))
        cells = self._unmeasured(run)
        if not cells:
            return None
        return LaunchOrder(
            launch=len(run.launches), round=run.header.profile.launches, purpose="memory", cells=(cells[0],)
        )

    def remaining(self, run: Run) -> int:
        """See `Search.remaining`."""
        rounds = range(run.header.profile.launches)
        timing = sum(len(self._outstanding(run, number)) for number in rounds)
        # Until the winner is known, it counts as another one than the incumbent.
        return timing + (2 if timing else len(self._unmeasured(run)))

    def _outstanding(self, run: Run, number: int) -> list[list[Cell]]:
        """Cells of a round that still lack samples, grouped by load, in the round's order.

        Who has ended a process before has its next one for itself.
        """
        groups: dict[tuple[str, str], list[Cell]] = {}
        suspects = run.suspects
        for candidate in run.live:
            for scenario in run.scenarios:
                cell = Cell(candidate=candidate, scenario=scenario)
                if run.original(cell) == cell and number not in run.complete_rounds(cell):
                    alone = candidate if candidate in suspects else ""
                    groups.setdefault((self._load_keys[cell], alone), []).append(cell)
        order = random.Random(f"{self._seed}/{number}")
        ordered = [groups[key] for key in sorted(groups)]
        order.shuffle(ordered)
        for cells in ordered:
            order.shuffle(cells)
        if number == 0:
            ordered.sort(key=lambda cells: all(cell.candidate != run.incumbent for cell in cells))
            for cells in ordered[:1]:
                cells.sort(key=lambda cell: cell.candidate != run.incumbent)
        return ordered

    def _unmeasured(self, run: Run) -> list[Cell]:
        """Largest scenario of each candidate whose own peak memory the plan needs and nobody has read."""
        decision = decide(run)
        if decision is None:
            return []
        finalists = {run.incumbent, decision.winner}
        wanted = run.live if scoring.memory_binds(run) else [name for name in run.live if name in finalists]
        largest = max(run.scenarios.values(), key=lambda scenario: scenario.total_tokens * scenario.batch_size).key
        cells = {run.original(Cell(candidate=name, scenario=largest)): None for name in wanted}
        return [cell for cell in cells if cell not in run.memory_tried]
