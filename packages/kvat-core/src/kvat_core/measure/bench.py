"""What all launches of a run share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvat_core.measure.conditions import Watch
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.messages import PromptSpec, Scored
from kvat_core.measure.session import OpenWorker, Session
from kvat_core.run import Run
from kvat_core.schema import Cell, Event, Failure, PromptSource, Recipe, Scenario

References = Callable[[Cell], tuple[Recipe, Recipe | None, str | None]]
"""Of a candidate that has a reference: the recipe of that, of the same in full precision, or why that cannot be."""


@dataclass(frozen=True)
class Bench:
    """The run so far, what is measured in it, and by whom."""

    run: Run
    recipes: Mapping[Cell, Recipe]
    """Of all cells that are timed."""
    recipe_at: Callable[[Cell], Recipe]
    """The same for scenarios that are none of the profile's."""
    references: References
    source: PromptSource
    """With its text, unlike the profile in the journal."""
    scratch: Path
    """Of this process's part of the run; see `Engine.adapter`."""
    record: Callable[[Event], None]
    """Journals an event; returns when it is on disk."""
    announce: Callable[[str], None]
    """Shows what is being done now."""
    open_worker: OpenWorker
    watch: Watch
    process_device_bytes: Callable[[int | None], int | None]
    """Memory of a process on the device by its driver."""
    deadlines: Deadlines
    options: Mapping[str, str]
    """Of the engine, as the user gave them."""
    compiled: set[str] = field(default_factory=set)
    """Keys of the loads for which the compiler has cached something in `scratch`."""

    references_scored: dict[tuple[str, str | None], Scored | Failure] = field(default_factory=dict)
    """By key of the recipe, and of the one it was held against: what came of scoring it."""

    def prompt(
        self, scenario: Scenario, *, round_number: int, index: int, source: PromptSource | None = None
    ) -> PromptSpec:
        """The prompts of a call: the same for all candidates of a block, different for everything else.

        Args:
            scenario: lengths and number of the prompts.
            round_number: of the block.
            index: of the call.
            source: of another text than that of the run.
        """
        name = f"{self.run.header.seed}/{round_number}/{scenario.key}/{index}"
        return PromptSpec(
            source=source or self.source,
            tokens=scenario.prompt_lengths,
            nonce=int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"),
        )

    def label(self, cell: Cell) -> str:
        """A cell as a display names it."""
        return f"{self.run.entry(cell.candidate).candidate.label} at {cell.scenario}"

    def session(self, load: Recipe) -> Session:
        """A new worker for this recipe's load."""
        engine = self.run.header.engine
        return Session(engine, load, self.scratch, self.open_worker, self.deadlines, self.source)
