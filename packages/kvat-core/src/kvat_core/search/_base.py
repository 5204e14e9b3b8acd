"""The contract of a search, and what all searches have in common."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvat_core import scoring
from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder

MEMORY = 10_000
"""Round of all launches for memory, which belong to no block."""


@dataclass(frozen=True)
class Allowance:
    """What a run may take from its start, or from where it was resumed. None = no limit."""

    wall_s: float | None = None
    """Of all launches together."""
    launches: int | None = None
    """Loads of the model."""


class Search(ABC):
    """Asked "what next?" after every launch. Equal journals give equal answers, so runs can be replayed.

    A search never measures and keeps no state of a run: whatever it has to know is in the journal. Whoever asks it sees
    to it that the allowance holds; a search uses it to spend in time on what matters.

    A package registers a subclass under the entry-point group `kvat.searches`; users choose it with `--search NAME`.

    Args:
        load_keys: key of the load each cell needs; one launch takes cells of one load.
        seed: of every random order.
        allowance: what the run may take.
    """

    name: ClassVar[str]
    """Name under which the user selects it; equal to the entry point's name."""

    def __init__(self, load_keys: Mapping[Cell, str], seed: int, allowance: Allowance = Allowance()) -> None:
        self._load_keys = load_keys
        self._seed = seed
        self._allowance = allowance

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot be used here and what to do, such as to install what it needs; None = it can."""
        return None

    @abstractmethod
    def next(self, run: Run) -> LaunchOrder | None:
        """The next launch, or None when enough is known."""

    @abstractmethod
    def remaining(self, run: Run) -> int:
        """Launches still to come if nothing fails, for the display."""

    def outstanding(self, run: Run, number: int, candidates: Collection[str]) -> list[list[Cell]]:
        """Cells that a round still lacks of some candidates, grouped by load.

        Where another candidate is proven to run the very same thing in a scenario, its cell is measured instead.

        Groups and the cells in them come in random order, the same however much of the round is done, so that drift
        meets all alike. Who has ended a process before has its next one for itself.
        """
        groups: dict[tuple[str, str], list[Cell]] = {}
        suspects = run.suspects
        wanted = (cell for name in run.live if name in candidates for cell in run.cells(name))
        for cell in dict.fromkeys(map(run.original, wanted)):
            if number not in run.complete_rounds(cell):
                alone = cell.candidate if cell.candidate in suspects else ""
                groups.setdefault((self._load_keys[cell], alone), []).append(cell)
        order = random.Random(f"{self._seed}/{number}")
        ordered = [groups[key] for key in sorted(groups)]
        order.shuffle(ordered)
        for cells in ordered:
            order.shuffle(cells)
        return ordered


def incumbent_first(groups: list[list[Cell]], incumbent: str) -> list[list[Cell]]:
    """The same groups with that of the incumbent in front: a run cut short knows what it compares with."""
    ordered = sorted(groups, key=lambda cells: all(cell.candidate != incumbent for cell in cells))
    return [sorted(cells, key=lambda cell: cell.candidate != incumbent) for cells in ordered[:1]] + ordered[1:]


def peaks_of_a_plan(run: Run) -> list[Cell]:
    """What `unmeasured_peaks` are if the run were decided now."""
    decision = decide(run)
    return [] if decision is None else unmeasured_peaks(run, {run.incumbent, decision.winner})


def unmeasured_peaks(run: Run, finalists: Collection[str]) -> list[Cell]:
    """Largest scenario of each candidate whose own peak memory the plan needs and nobody has read.

    Those are the finalists, and all to whom memory matters.
    """
    matters = scoring.memory_matters_to(run)
    wanted = dict.fromkeys([name for name in run.live if name in finalists])
    if matters:
        # It is compared with that of what runs today.
        wanted = dict.fromkeys(name for name in run.live if name in {*finalists, *matters, run.incumbent})
    largest = max(run.scenarios.values(), key=lambda scenario: scenario.total_tokens * scenario.batch_size).key
    cells = {run.original(Cell(candidate=name, scenario=largest)): None for name in wanted}
    return [cell for cell in cells if cell not in run.memory_tried]


def memory_order(run: Run, cells: Sequence[Cell]) -> LaunchOrder | None:
    """A process for the first of these cells alone; None if there is none."""
    if not cells:
        return None
    return LaunchOrder(launch=len(run.launches), round=MEMORY, purpose="memory", cells=(cells[0],))
