"""A run as its journal tells it: the one view that search, scoring, planner and display share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from pydantic import JsonValue

from kvat_core.schema import (
    CandidateEntry,
    Cell,
    End,
    Event,
    Failed,
    Header,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Measured,
    Proof,
    Resources,
    Sample,
    Scenario,
)


class Run:
    """Everything that has happened so far; grows with each journal record, decides nothing."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.candidates: list[CandidateEntry] = []
        self.launches: list[LaunchOrder] = []
        self.loaded: list[Loaded] = []
        self.proofs: list[Proof] = []
        self.samples: list[Sample] = []
        self.failed: list[Failed] = []
        self.measured: list[Measured] = []
        self.ended: list[LaunchEnd] = []
        self.end: End | None = None
        self._by_cell: dict[Cell, dict[int, list[Sample]]] = {}
        self._applied: dict[Cell, dict[str, JsonValue]] = {}

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Run:
        """Rebuild a run from its journal.

        Raises:
            ValueError: the first record is not a header.
        """
        stream = iter(events)
        header = next(stream, None)
        if not isinstance(header, Header):
            raise ValueError("a journal starts with its header")
        run = cls(header)
        for event in stream:
            run.add(event)
        return run

    def add(self, event: Event) -> None:
        """Take in the next record."""
        match event:
            case CandidateEntry():
                self.candidates.append(event)
            case LaunchOrder():
                self.launches.append(event)
            case Loaded():
                self.loaded.append(event)
            case Proof():
                self.proofs.append(event)
                self._applied[event.cell] = event.applied.values
            case Sample():
                self.samples.append(event)
                cell = Cell(candidate=event.candidate, scenario=event.scenario)
                self._by_cell.setdefault(cell, {}).setdefault(event.round, []).append(event)
            case Failed():
                self.failed.append(event)
            case Measured():
                self.measured.append(event)
            case LaunchEnd():
                self.ended.append(event)
            case End():
                self.end = event
            case Header():
                raise ValueError("a journal has one header")

    @cached_property
    def scenarios(self) -> dict[str, Scenario]:
        """Scenarios of the profile by key."""
        return {scenario.key: scenario for scenario in self.header.profile.scenarios}

    @property
    def incumbent(self) -> str:
        """Id of the candidate that every other one is compared with."""
        return next(entry.candidate.id for entry in self.candidates if entry.incumbent)

    @property
    def live(self) -> list[str]:
        """Ids of the candidates that are neither excluded nor failed, in the order of the space."""
        return [
            entry.candidate.id
            for entry in self.candidates
            if entry.exclusion is None and entry.candidate.id not in self.failures
        ]

    @property
    def failures(self) -> dict[str, Failed]:
        """How each failed candidate ended first; where only its peak memory could not be read, its figures stand."""
        memory = {order.launch for order in self.launches if order.purpose == "memory"}
        first: dict[str, Failed] = {}
        for failed in self.failed:
            if failed.launch not in memory:
                first.setdefault(failed.cell.candidate, failed)
        return first

    @property
    def own_memory(self) -> dict[Cell, Resources]:
        """Peaks of the cells that had a process of their own, without a profiler."""
        alone = {order.launch: order.cells[0] for order in self.launches if order.purpose == "memory"}
        return {alone[one.launch]: one.resources for one in self.measured if one.launch in alone}

    def original(self, cell: Cell) -> Cell:
        """The cell that stands for this one: the first of the space that was proven to run the very same thing."""
        return self._same_as(cell)[0]

    def alias_of(self, candidate_id: str) -> str | None:
        """The other candidate that stands for this one in every scenario, if there is one."""
        originals = {self.original(Cell(candidate=candidate_id, scenario=key)).candidate for key in self.scenarios}
        return originals.pop() if len(originals) == 1 and candidate_id not in originals else None

    def samples_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """Timed calls of a cell, under whichever of its aliases they were taken, by round."""
        rounds: dict[int, list[Sample]] = {}
        for same in self._same_as(cell):
            for number, samples in self._by_cell.get(same, {}).items():
                rounds.setdefault(number, []).extend(samples)
        return rounds

    def _same_as(self, cell: Cell) -> list[Cell]:
        """Cells that run the very same thing as this one, itself among them, in the order of the space."""
        values = self._applied.get(cell)
        if values is None or cell.candidate in self.failures:
            return [cell]
        candidates = [
            name for name in self.live if self._applied.get(cell.model_copy(update={"candidate": name})) == values
        ]
        return [Cell(candidate=name, scenario=cell.scenario) for name in candidates]
