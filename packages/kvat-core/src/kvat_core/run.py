"""A run as its journal tells it: the one view that search, scoring, planner and display share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

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
        """How each failed candidate ended first."""
        first: dict[str, Failed] = {}
        for failed in self.failed:
            first.setdefault(failed.cell.candidate, failed)
        return first

    def original(self, cell: Cell) -> Cell:
        """The cell that stands for this one: itself, or the first cell proven to run the very same thing."""
        mine = next((proof for proof in self.proofs if proof.cell == cell), None)
        if mine is None:
            return cell
        return next(
            proof.cell
            for proof in self.proofs
            if proof.cell.scenario == cell.scenario
            and proof.applied.values == mine.applied.values
            and (proof.cell == cell or proof.cell.candidate not in self.failures)
        )

    def samples_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """Timed calls of a cell, or of the cell that stands for it, by round."""
        return self._by_cell.get(self.original(cell), {})
