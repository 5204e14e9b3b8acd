"""A run as its journal tells it: the one view that search, scoring, planner and display share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property

from pydantic import JsonValue

from kvat_core.schema import (
    CandidateEntry,
    Cell,
    End,
    Event,
    Failed,
    FirstCall,
    Header,
    Health,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Measured,
    Profile,
    Proof,
    Resources,
    Resumed,
    Sample,
    Scenario,
    Stopped,
)

ATTEMPTS_PER_SAMPLE = 2
"""Timed calls that a launch makes at most, per sample wanted, before it goes on with those it has."""
OF_THE_CANDIDATE = ("unsupported", "not_applied", "invalid_output", "oom_device", "oom_host", "unkillable")
"""Kinds of failure for which the machine is never to blame."""
MEMORY_TRIALS = 2
"""Processes that a cell gets at most for its peak memory: what ended the first may have come from outside."""
MAX_REJECTED = 0.2
"""Share of rejected calls above which the figures of a candidate are not to be relied on."""
_DERIVED = (
    "live",
    "failures",
    "forgiven",
    "memory_launches",
    "memory_tried",
    "own_memory",
    "timing_failures",
    "_alike",
)
"""What is worked out once from all records but the samples, and anew after the next of those."""


class Run:
    """Everything that has happened so far; grows with each journal record, decides nothing."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.candidates: list[CandidateEntry] = []
        self.launches: list[LaunchOrder] = []
        self.loaded: list[Loaded] = []
        self.first_calls: list[FirstCall] = []
        self.proofs: list[Proof] = []
        self.samples: list[Sample] = []
        self.failed: list[Failed] = []
        self.measured: list[Measured] = []
        self.ended: list[LaunchEnd] = []
        self.health: list[Health] = []
        self._excused: list[Failed] = []
        self.stopped: Stopped | None = None
        self.end: End | None = None
        self.fastest_clock_mhz: int | None = None
        """Of the card that is measured on, in any sample so far."""
        self._by_cell: dict[Cell, dict[int, dict[int, list[Sample]]]] = {}
        self._applied: dict[Cell, dict[str, JsonValue]] = {}
        self._launches: dict[Cell, dict[int, list[Sample]]] = {}
        """What `_launches_of` has worked out since the last record."""

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

    def asked(self, profile: Profile, incumbent: str | None = None) -> Run:
        """The same records under another question, to be read only.

        Args:
            profile: scenarios and weights that count instead of the run's own.
            incumbent: id of what is compared with; None = as it was.
        """
        other = copy(self)
        other.header = self.header.model_copy(update={"profile": profile})
        if incumbent is not None:
            other.candidates = [
                entry.model_copy(update={"incumbent": entry.candidate.id == incumbent}) for entry in self.candidates
            ]
        other._launches = {}
        for name in ("scenarios", *_DERIVED):
            vars(other).pop(name, None)
        return other

    def add(self, event: Event) -> None:
        """Take in the next record."""
        self._forget(event)
        match event:
            case CandidateEntry():
                self.candidates.append(event)
            case LaunchOrder():
                self.launches.append(event)
            case Loaded():
                self.loaded.append(event)
            case FirstCall():
                self.first_calls.append(event)
            case Proof():
                self.proofs.append(event)
                self._applied[event.cell] = event.applied.values
            case Sample():
                self.samples.append(event)
                if event.conditions and event.conditions.gpu and event.conditions.gpu.clock_mhz:
                    self.fastest_clock_mhz = max(self.fastest_clock_mhz or 0, event.conditions.gpu.clock_mhz)
                cell = Cell(candidate=event.candidate, scenario=event.scenario)
                launches = self._by_cell.setdefault(cell, {}).setdefault(event.round, {})
                launches.setdefault(event.launch, []).append(event)
            case Failed():
                self.failed.append(event)
            case Measured():
                self.measured.append(event)
            case LaunchEnd():
                self.ended.append(event)
            case Health():
                self.health.append(event)
                if not event.ok:
                    self._excuse_since_the_last_sound_launch()
            case Stopped():
                self.stopped = event
            case Resumed():
                self.stopped = None
            case End():
                self.end = event
            case Header():
                raise ValueError("a journal has one header")

    def _forget(self, event: Event) -> None:
        """Drop what was worked out from the records before, as far as another one may change it."""
        self._launches.clear()
        if not isinstance(event, Sample):
            for name in _DERIVED:
                vars(self).pop(name, None)

    @cached_property
    def scenarios(self) -> dict[str, Scenario]:
        """Scenarios of the profile by key."""
        return {scenario.key: scenario for scenario in self.header.profile.scenarios}

    @property
    def incumbent(self) -> str:
        """Id of the candidate that every other one is compared with."""
        return next(entry.candidate.id for entry in self.candidates if entry.incumbent)

    @cached_property
    def live(self) -> tuple[str, ...]:
        """Ids of the candidates that are neither excluded nor failed, in the order of the space."""
        return tuple(
            entry.candidate.id
            for entry in self.candidates
            if entry.exclusion is None and entry.candidate.id not in self.failures
        )

    @cached_property
    def failures(self) -> Mapping[str, Failed]:
        """How each failed candidate ended; where only its peak memory could not be read, its figures stand."""
        ends: dict[str, Failed] = {}
        forgiven = self.forgiven
        for failed in self.timing_failures:
            name = failed.cell.candidate
            if failed.launch != forgiven.get(name):
                ends.setdefault(name, failed)
        return ends

    @cached_property
    def forgiven(self) -> Mapping[str, int]:
        """Candidates that get a second chance, with the launch in which they failed.

        A crash may come from outside, and so may a failure to start or load what had been loaded before: of these
        a candidate is forgiven the first, wherever its launch ended it.
        """
        first: dict[str, int] = {}
        for failed in self.timing_failures:
            too_early = not failed.phase_is_of_a_cell
            if failed.failure.kind == "crash" or (too_early and self._was_loaded(failed)):
                first.setdefault(failed.cell.candidate, failed.launch)
        return first

    @cached_property
    def timing_failures(self) -> list[Failed]:
        """Ends of timed cells, without those for which a broken machine is to blame."""
        return [failed for failed in self.failed if not self.is_about_memory(failed) and failed not in self._excused]

    @property
    def memory_failures(self) -> list[Failed]:
        """Why peaks are unknown, without what a broken machine is to blame for; the times of these cells stand."""
        return [failed for failed in self.failed if self.is_about_memory(failed) and failed not in self._excused]

    @cached_property
    def memory_launches(self) -> set[int]:
        """Launches whose one cell had the process to itself, for its peak memory."""
        return {order.launch for order in self.launches if order.purpose == "memory"}

    @cached_property
    def memory_tried(self) -> set[Cell]:
        """Cells that had their processes for peak memory: one, or a second one where the first failed.

        A launch without an end was interrupted, and one that a broken machine ended is no trial either. Where only the
        candidate can be to blame, as for running out of memory, there is no second one.
        """
        void = {failed.launch for failed in self._excused}
        ended = {end.launch for end in self.ended} - void
        trials = Counter(
            order.cells[0] for order in self.launches if order.purpose == "memory" and order.launch in ended
        )
        final = {
            failed.cell
            for failed in self.memory_failures
            if failed.launch in self.memory_launches and failed.failure.kind in OF_THE_CANDIDATE
        }
        return {
            cell
            for cell, number in trials.items()
            if cell in self.own_memory or cell in final or number >= MEMORY_TRIALS
        }

    @property
    def suspects(self) -> set[str]:
        """Candidates that ended a process by a cell of theirs, and have had no sample since: the next one is theirs."""
        culprits = {
            failed.cell.candidate: failed.launch for failed in self.timing_failures if failed.phase_is_of_a_cell
        }
        return {
            name
            for name, launch in self.forgiven.items()
            if culprits.get(name) == launch
            and not any(sample.candidate == name and sample.launch > launch for sample in self.samples)
        }

    def _excuse_since_the_last_sound_launch(self) -> None:
        """Of failures up to the last launch that had samples and none of them, a broken machine is to blame."""
        doubtful = [failed for failed in self.failed if failed.failure.kind not in OF_THE_CANDIDATE]
        sampled = {sample.launch for sample in self.samples}
        # A peak that could not be read says nothing of the times in its launch.
        unsound = {failed.launch for failed in doubtful if failed.failure.phase != "resources"}
        sound = max(sampled - unsound, default=-1)
        self._excused += [failed for failed in doubtful if failed.launch > sound]

    def _was_loaded(self, failed: Failed) -> bool:
        """Whether the candidate had been loaded in a launch before."""
        loaded = {one.launch for one in self.loaded if one.launch < failed.launch}
        return any(
            order.launch in loaded and any(cell.candidate == failed.cell.candidate for cell in order.cells)
            for order in self.launches
        )

    def is_about_memory(self, failed: Failed) -> bool:
        """Whether a failure costs its cell no more than the knowledge of its peak."""
        return failed.failure.phase == "resources" or failed.launch in self.memory_launches

    @cached_property
    def own_memory(self) -> Mapping[Cell, Resources]:
        """Peaks of the cells that had a process of their own, without a profiler."""
        return {one.cells[0]: one.resources for one in self.measured if one.launch in self.memory_launches}

    def original(self, cell: Cell) -> Cell:
        """The cell that stands for this one: the first of the space that was proven to run the very same thing."""
        return self._same_as(cell)[0]

    def alias_of(self, candidate_id: str) -> str | None:
        """The other candidate that stands for this one in every scenario, if there is one."""
        originals = {self.original(Cell(candidate=candidate_id, scenario=key)).candidate for key in self.scenarios}
        return originals.pop() if len(originals) == 1 and candidate_id not in originals else None

    def samples_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """Timed calls that count for a cell, under whichever of its aliases they were taken, by round.

        They are those of the last launch that got all it wanted: nothing half-measured is used. Of these the
        rejected ones are left out, unless there is no other; a call that compiled code is never used.
        """
        launches = self._launches_of(cell)
        return {number: used for number, one in launches.items() if self.has_enough(one) and (used := _used(one))}

    def calls_of(self, cell: Cell) -> list[Sample]:
        """Timed calls of a cell so far, for a display: also those of a launch that still goes on."""
        return [sample for one in self._launches_of(cell).values() for sample in one]

    def complete_rounds(self, cell: Cell) -> set[int]:
        """Rounds in which nothing more is to be measured for a cell."""
        return set(self.samples_of(cell))

    def has_enough(self, samples: Sequence[Sample]) -> bool:
        """Whether a launch that made these calls of a cell need make no more."""
        wanted = self.header.profile.samples
        trusted = sum(not sample.distrust for sample in samples)
        return trusted >= wanted or len(samples) >= ATTEMPTS_PER_SAMPLE * wanted

    def rejected_share(self, candidate_id: str) -> float:
        """Share of a candidate's timed calls that were rejected, in the launches that count."""
        cells = [Cell(candidate=candidate_id, scenario=key) for key in self.scenarios]
        calls = [
            sample
            for cell in cells
            for samples in self._launches_of(cell).values()
            if self.has_enough(samples)
            for sample in samples
        ]
        return sum(bool(sample.distrust) for sample in calls) / len(calls) if calls else 0.0

    def _launches_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """All calls of the launch that counts, by round: the last complete one, or the last."""
        if cell not in self._launches:
            self._launches[cell] = self._find_launches(cell)
        return self._launches[cell]

    def _find_launches(self, cell: Cell) -> dict[int, list[Sample]]:
        rounds: dict[int, dict[int, list[Sample]]] = {}
        for same in self._same_as(cell):
            for number, launches in self._by_cell.get(same, {}).items():
                rounds.setdefault(number, {}).update(launches)
        return {number: self._counting(launches) for number, launches in rounds.items()}

    def _counting(self, launches: dict[int, list[Sample]]) -> list[Sample]:
        last_first = [launches[number] for number in sorted(launches, reverse=True)]
        return next((samples for samples in last_first if self.has_enough(samples)), last_first[0])

    def _same_as(self, cell: Cell) -> list[Cell]:
        """Cells that run the very same thing as this one, itself among them, in the order of the space."""
        if cell not in self._alike:
            self._alike[cell] = self._find_same(cell)
        return self._alike[cell]

    @cached_property
    def _alike(self) -> dict[Cell, list[Cell]]:
        """What `_same_as` has worked out."""
        return {}

    def _find_same(self, cell: Cell) -> list[Cell]:
        values = self._applied.get(cell)
        if values is None or cell.candidate in self.failures:
            return [cell]
        candidates = [
            name for name in self.live if self._applied.get(cell.model_copy(update={"candidate": name})) == values
        ]
        return [Cell(candidate=name, scenario=cell.scenario) for name in candidates]


def _used(samples: Sequence[Sample]) -> list[Sample]:
    trusted = [sample for sample in samples if not sample.distrust]
    return trusted or [sample for sample in samples if not sample.compilations]
