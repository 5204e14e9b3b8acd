"""A run as its journal tells it: the one view that search, scoring, planner and display share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from functools import cached_property

from kvat_core import metrics
from kvat_core.schema import (
    AnotherLength,
    Canary,
    CandidateEntry,
    Cell,
    ContextTrial,
    End,
    Event,
    Failed,
    Failure,
    Fidelity,
    FirstCall,
    Header,
    Health,
    Judged,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Measured,
    Profile,
    Proof,
    Purpose,
    Resources,
    Resumed,
    Sample,
    Scenario,
    Stopped,
)

ATTEMPTS_PER_SAMPLE = 2
"""Timed calls that a launch makes at most, per sample wanted, before it goes on with those it has."""
OF_THE_CANDIDATE = (
    "unsupported",
    "not_applied",
    "wrong_output",
    "invalid_output",
    "leak",
    "oom_device",
    "oom_host",
    "unkillable",
)
"""Kinds of failure for which the machine is never to blame."""
OF_THE_OUTPUT = ("wrong_output", "leak")
"""Of these the kinds that are as true of whoever runs the very same thing."""
MEMORY_TRIALS = 2
"""Processes that a cell gets at most for its peak memory: what ended the first may have come from outside."""
VETTING_TRIALS = 2
"""Times that a candidate is judged, or looked at for leaks, where something from outside may have ended the first."""
MAX_REJECTED = 0.2
"""Share of rejected calls above which the figures of a candidate are not to be relied on."""
_OF_CANDIDATES = ("live", "failures", "forgiven", "timing_failures", "aliases", "_twins")
"""What is worked out once from candidates, proofs and failures, and anew after the next of those."""
_OF_LAUNCHES = ("memory_launches", "memory_tried", "own_memory")
"""What is worked out once from all records but the samples, and anew after the next of those."""


class Run:
    """Everything that has happened so far; grows with each journal record, decides nothing."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.candidates: list[CandidateEntry] = []
        self._entries: dict[str, CandidateEntry] = {}
        self._cells: dict[str, tuple[Cell, ...]] = {}
        self.launches: list[LaunchOrder] = []
        self.loaded: list[Loaded] = []
        self.first_calls: list[FirstCall] = []
        self.other_lengths: dict[Cell, AnotherLength] = {}
        self.proofs: list[Proof] = []
        self.samples: list[Sample] = []
        self.failed: list[Failed] = []
        self.measured: list[Measured] = []
        self.context_trials: list[ContextTrial] = []
        """Without those for which a broken machine is to blame."""
        self.fidelity: dict[str, Fidelity] = {}
        """Of each candidate that was judged."""
        self.judged: list[Judged] = []
        self.looked_for_leaks: list[Canary] = []
        self.ended: list[LaunchEnd] = []
        self.health: list[Health] = []
        self._excused: list[Failed] = []
        self.stopped: Stopped | None = None
        self.resumed_at = 0
        """First launch since the run was started, or resumed."""
        self.end: End | None = None
        self.fastest_clock_mhz: int | None = None
        """Of the card that is measured on, in any sample so far."""
        self.gaps_told = True
        """Whether the token gaps of every sample are known."""
        self.before_the_blocks: set[int] = set()
        """Rounds of pilot and screening, whose figures choose who is compared and are no part of comparisons."""
        self.after_the_choice: set[int] = set()
        """Blocks of the run-off, which had no part in choosing its participants."""
        self._samples_wanted: dict[int, int] = {}
        self._by_cell: dict[Cell, dict[int, dict[int, list[Sample]]]] = {}
        self._applied: dict[Cell, str] = {}
        self._figures: dict[int, metrics.Figures] = {}
        self._launches: dict[Cell, dict[int, list[Sample]]] = {}
        self._used: dict[Cell, dict[int, list[Sample]]] = {}
        self._medians: dict[Cell, dict[int, metrics.Figures]] = {}
        """What has been worked out of a cell, as far as no later record can have changed it."""

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
        for name in ("scenarios", *_OF_CANDIDATES, *_OF_LAUNCHES):
            vars(other).pop(name, None)
        other.candidates, other._entries, other._cells = [], {}, {}
        other._launches, other._used, other._medians = {}, {}, {}
        for entry in self.candidates:
            is_it = entry.incumbent if incumbent is None else entry.candidate.id == incumbent
            other._take_in(entry.model_copy(update={"incumbent": is_it}))
        return other

    def add(self, event: Event) -> None:
        """Take in the next record."""
        self._forget(event)
        match event:
            case CandidateEntry():
                self._take_in(event)
            case LaunchOrder():
                self.launches.append(event)
                if event.samples is not None:
                    self._samples_wanted[event.launch] = event.samples
                if event.purpose in ("pilot", "screening"):
                    self.before_the_blocks.add(event.round)
                if event.purpose == "run_off":
                    self.after_the_choice.add(event.round)
            case Loaded():
                self.loaded.append(event)
            case FirstCall():
                self.first_calls.append(event)
            case AnotherLength():
                self.other_lengths[event.cell] = event
            case Proof():
                self.proofs.append(event)
                self._applied[event.cell] = json.dumps(event.applied.values, sort_keys=True)
            case Sample():
                self.samples.append(event)
                self.gaps_told = self.gaps_told and self.figures(event).jitter is not None
                if event.conditions and event.conditions.gpu and event.conditions.gpu.clock_mhz:
                    self.fastest_clock_mhz = max(self.fastest_clock_mhz or 0, event.conditions.gpu.clock_mhz)
                cell = Cell(candidate=event.candidate, scenario=event.scenario)
                launches = self._by_cell.setdefault(cell, {}).setdefault(event.round, {})
                launches.setdefault(event.launch, []).append(event)
            case Failed():
                self.failed.append(event)
            case Measured():
                self.measured.append(event)
            case ContextTrial():
                self.context_trials.append(event)
            case Judged():
                self.judged.append(event)
                if event.fidelity is not None:
                    self.fidelity[event.candidate] = event.fidelity
            case Canary():
                self.looked_for_leaks.append(event)
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
                self.resumed_at = len(self.launches)
            case End():
                self.end = event
            case Header():
                raise ValueError("a journal has one header")

    def _take_in(self, entry: CandidateEntry) -> None:
        name = entry.candidate.id
        self.candidates.append(entry)
        self._entries[name] = entry
        self._cells[name] = tuple(Cell(candidate=name, scenario=key) for key in self.scenarios)

    def _forget(self, event: Event) -> None:
        """Drop what was worked out from the records before, as far as another one may change it."""
        if isinstance(event, Sample):
            for cell in self._same_as(Cell(candidate=event.candidate, scenario=event.scenario)):
                for known in (self._launches, self._used, self._medians):
                    known.pop(cell, None)
            return
        of_candidates = isinstance(event, CandidateEntry | Proof | Failed | Health)
        for name in (*_OF_LAUNCHES, *(_OF_CANDIDATES if of_candidates else ())):
            vars(self).pop(name, None)
        if of_candidates:
            for known in (self._launches, self._used, self._medians):
                known.clear()

    @cached_property
    def scenarios(self) -> dict[str, Scenario]:
        """Scenarios of the profile by key."""
        return {scenario.key: scenario for scenario in self.header.profile.scenarios}

    @property
    def incumbent(self) -> str:
        """Id of the candidate that every other one is compared with."""
        return next(entry.candidate.id for entry in self.candidates if entry.incumbent)

    def entry(self, candidate_id: str) -> CandidateEntry:
        """The candidate of that id."""
        return self._entries[candidate_id]

    def cells(self, candidate_id: str) -> tuple[Cell, ...]:
        """A candidate in every scenario."""
        return self._cells[candidate_id]

    def ended_launches(self, purpose: Purpose) -> list[LaunchOrder]:
        """Launches for a purpose that are over; one that was interrupted is not, and was ordered again."""
        ended = {end.launch for end in self.ended}
        return [order for order in self.launches if order.purpose == purpose and order.launch in ended]

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
        """How each failed candidate ended; where only its peak memory could not be read, its figures stand.

        What is wrong with an output is wrong with that of whoever was proven to run the very same thing.
        """
        ends: dict[str, Failed] = {}
        forgiven = self.forgiven
        for failed in self.timing_failures:
            name = failed.cell.candidate
            if failed.launch != forgiven.get(name):
                ends.setdefault(name, failed)
                if failed.failure.kind in OF_THE_OUTPUT:
                    for twin in self._runs_the_same_as(name):
                        ends.setdefault(twin, failed)
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

    @property
    def fidelity_tried(self) -> set[str]:
        """Candidates that were judged, or could not be: for their own fault once, for another one twice."""
        return _tried((one.candidate, one.failure) for one in self.judged)

    @property
    def canaries_sent(self) -> set[str]:
        """The same of those that were looked at for leaks."""
        return _tried((one.candidate, one.failure) for one in self.looked_for_leaks)

    @property
    def canaries(self) -> Mapping[str, Canary]:
        """By candidate, what was found last."""
        return {one.candidate: one for one in self.looked_for_leaks}

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
        """Of failures since the last sound launch, with samples or a length that ran, a broken machine is to blame."""
        doubtful = [failed for failed in self.failed if failed.failure.kind not in OF_THE_CANDIDATE]
        sampled = {sample.launch for sample in self.samples}
        sampled |= {trial.launch for trial in self.context_trials if trial.failure is None}
        sampled |= {one.launch for one in self.judged if one.failure is None}
        sampled |= {one.launch for one in self.looked_for_leaks if one.failure is None}
        # A peak that could not be read says nothing of the times in its launch.
        unsound = {failed.launch for failed in doubtful if failed.failure.phase != "resources"}
        sound = max(sampled - unsound, default=-1)
        self._excused += [failed for failed in doubtful if failed.launch > sound]

        def stands(launch: int, failure: Failure | None) -> bool:
            return launch <= sound or failure is None or failure.kind in OF_THE_CANDIDATE

        self.context_trials = [one for one in self.context_trials if stands(one.launch, one.failure)]
        self.judged = [one for one in self.judged if stands(one.launch, one.failure)]
        self.looked_for_leaks = [one for one in self.looked_for_leaks if stands(one.launch, one.failure)]

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
        originals = {self.original(cell).candidate for cell in self.cells(candidate_id)}
        return originals.pop() if len(originals) == 1 and candidate_id not in originals else None

    @cached_property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """Candidates that stand for others in every scenario, each with those."""
        found: dict[str, list[str]] = {}
        for entry in self.candidates:
            original = self.alias_of(entry.candidate.id)
            if original is not None:
                found.setdefault(original, []).append(entry.candidate.id)
        return found

    def samples_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """Timed calls that count for a cell, under whichever of its aliases they were taken, by round.

        They are those of the last launch that got all it wanted: nothing half-measured is used. Of these the
        rejected ones are left out, unless there is no other; a call that compiled code is never used.
        """
        if cell not in self._used:
            launches = self._launches_of(cell).items()
            self._used[cell] = {
                number: used for number, one in launches if self._is_complete(one) and (used := _used(one))
            }
        return self._used[cell]

    def medians_of(self, cell: Cell) -> dict[int, metrics.Figures]:
        """Medians of the timed calls that count for a cell, by round."""
        if cell not in self._medians:
            rounds = self.samples_of(cell).items()
            self._medians[cell] = {
                number: metrics.medians([self.figures(one) for one in samples]) for number, samples in rounds
            }
        return self._medians[cell]

    def blocks_of(self, cell: Cell) -> dict[int, list[Sample]]:
        """The same in the rounds in which candidates are compared; of a cell that has none, what screening saw."""
        rounds = self.samples_of(cell)
        blocks = {number: samples for number, samples in rounds.items() if number not in self.before_the_blocks}
        return blocks or rounds

    def figures(self, sample: Sample) -> metrics.Figures:
        """Metrics of a sample of this run, worked out once."""
        if id(sample) not in self._figures:
            self._figures[id(sample)] = metrics.figures(sample)
        return self._figures[id(sample)]

    def calls_of(self, cell: Cell) -> list[Sample]:
        """Timed calls of a cell so far, for a display: also those of a launch that still goes on."""
        return [sample for one in self._launches_of(cell).values() for sample in one]

    def complete_rounds(self, cell: Cell) -> AbstractSet[int]:
        """Rounds in which nothing more is to be measured for a cell."""
        return self.samples_of(cell).keys()

    def has_enough(self, launch: int, samples: Sequence[Sample]) -> bool:
        """Whether a launch that made these calls of a cell need make no more."""
        wanted = self._samples_wanted.get(launch, self.header.profile.samples)
        trusted = sum(not sample.distrust for sample in samples)
        return trusted >= wanted or len(samples) >= ATTEMPTS_PER_SAMPLE * wanted

    def _is_complete(self, samples: Sequence[Sample]) -> bool:
        """Whether the launch that made these calls of a cell, at least one, made all it wanted."""
        return self.has_enough(samples[0].launch, samples)

    def rejected_share(self, candidate_id: str) -> float:
        """Share of a candidate's timed calls that were rejected, in the launches that count."""
        calls = [
            sample
            for cell in self.cells(candidate_id)
            for samples in self._launches_of(cell).values()
            if self._is_complete(samples)
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
        return next((samples for samples in last_first if self._is_complete(samples)), last_first[0])

    def _runs_the_same_as(self, candidate_id: str) -> list[str]:
        """Other candidates that were proven to run the very same thing in every scenario, whether live or not."""
        mine = [self._applied.get(cell) for cell in self._cells[candidate_id]]
        return [
            name
            for name, cells in self._cells.items()
            if name != candidate_id and None not in mine and [self._applied.get(cell) for cell in cells] == mine
        ]

    def _same_as(self, cell: Cell) -> Sequence[Cell]:
        """Cells that run the very same thing as this one, itself among them, in the order of the space."""
        return self._twins.get(cell, (cell,))

    @cached_property
    def _twins(self) -> Mapping[Cell, Sequence[Cell]]:
        """Live cells that were proven, each with those that run the very same thing."""
        alike: dict[tuple[str, str], list[Cell]] = {}
        order = {name: rank for rank, name in enumerate(self.live)}
        for cell, values in self._applied.items():
            if cell.candidate in order:
                alike.setdefault((cell.scenario, values), []).append(cell)
        for cells in alike.values():
            cells.sort(key=lambda cell: order[cell.candidate])
        return {cell: cells for cells in alike.values() for cell in cells}


def _tried(attempts: Iterable[tuple[str, Failure | None]]) -> set[str]:
    """Candidates of which nothing more is to be learnt: what ended an attempt may have come from outside once."""
    final: set[str] = set()
    doubtful: Counter[str] = Counter()
    for name, failure in attempts:
        if failure is None or failure.kind in OF_THE_CANDIDATE:
            final.add(name)
        else:
            doubtful[name] += 1
    return final | {name for name, number in doubtful.items() if number >= VETTING_TRIALS}


def _used(samples: Sequence[Sample]) -> list[Sample]:
    trusted = [sample for sample in samples if not sample.distrust]
    return trusted or [sample for sample in samples if not sample.compilations]
