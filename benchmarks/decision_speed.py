"""How long does a run wait for its next decision, and its user for the plan, when there are many candidates?

    python benchmarks/decision_speed.py [--candidates 500] [--questions 20] [--plans 3] [--out FILE]

Invents the records of a run up to where each candidate has at least 20 timed calls, 64 tokens each, with the time of
every token; every 25th fails. A grid is then in the middle of its blocks; a race has screened everybody, and races.
From there the search is asked for launch after launch, each answered with invented records, as a run does: the
proofs of a launch make the run forget what it had worked out. The clock runs from the last record of a launch until
the next order is there, with and without an allowance that never binds. Then a plan is made of the records, each time
by a run that has worked out nothing yet.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from _record import Bound, Record, at_least_one, option_parser
from journal_speed import invented_header, invented_resources, invented_sample

from kvat_core import Scenario
from kvat_core.machine import read_machine
from kvat_core.planner import make_plan, stand_ins
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Candidate,
    CandidateEntry,
    Cell,
    Event,
    Failed,
    Failure,
    Header,
    JournalRef,
    LaunchEnd,
    LaunchOrder,
    Limit,
    Limits,
    Loaded,
    Machine,
    Measured,
    Proof,
    Sample,
    digest,
)
from kvat_core.search import Allowance, Grid, Race, Rationed, Search, Vetted

MAX_DECISION_S = 0.2
MAX_PLAN_S = 2.0
SCENARIO = Scenario(prompt_tokens=256, output_tokens=64)
BLOCKS, SAMPLES = 4, 5
"""Blocks of the grid that are complete, and timed calls of a candidate in each."""
SCREENING_SAMPLES = BLOCKS * SAMPLES
PER_LOAD = 4
"""Candidates that share a launch."""
FAILING = 25
"""Of so many candidates one fails."""
ALLOWANCES = {"without an allowance": Allowance(), "with one": Allowance(wall_s=1e9, launches=10**9)}

MakeSearch = Callable[[Mapping[Cell, str], int, Allowance], Search]


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--candidates", type=at_least_one, default=500, metavar="N")
    parser.add_argument("--questions", type=at_least_one, default=20, metavar="N")
    parser.add_argument("--plans", type=at_least_one, default=3, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    machine = read_machine("cpu", None)
    searches: dict[str, tuple[MakeSearch, Callable[[Invented, Search], None]]] = {
        "grid": (Grid, complete_blocks),
        "race": (Race, complete_screening),
    }
    values: dict[str, Any] = {}
    bounds = []
    for name, (make, begin) in searches.items():
        for kind, allowance in ALLOWANCES.items():
            invented = Invented(machine, options.candidates)
            search = make(invented.load_keys, 0, allowance)
            begin(invented, search)
            vetted = Vetted(search, stand_ins)
            questions = ask(invented, Rationed(vetted, invented.load_keys, allowance), options.questions)
            seconds = [one["next_s"] for one in questions]
            print(f"{name} {kind}: next launch in {median(seconds):.3f} s, at worst {max(seconds):.3f} s", flush=True)
            values[f"{name} {kind}"] = questions
            bounds.append(
                Bound(f"seconds to the next launch at worst, {name} {kind}", max(seconds), "<=", MAX_DECISION_S)
            )
        plans_s = [plan_s(invented.events) for _ in range(options.plans)]
        values[f"{name} plan_s"] = plans_s
        values[f"{name} samples"] = len(invented.run.samples)
        bounds.append(Bound(f"seconds to the plan, {name}", median(plans_s), "<=", MAX_PLAN_S))
    return record.close(machine, bounds, values)


def ask(invented: Invented, search: Rationed, questions: int) -> list[dict[str, Any]]:
    """Orders and seconds to each, so many in a row or as many as the search has, each after an invented launch."""
    asked: list[dict[str, Any]] = []
    order = search.next(invented.run)
    while order is not None and len(asked) < questions:
        last = invented.carry_out(order)
        started = time.perf_counter()
        invented.add(last)
        gc.freeze()  # as `tune` does after each launch
        order = search.next(invented.run)
        next_s = time.perf_counter() - started
        asked.append({"purpose": "none" if order is None else order.purpose, "next_s": next_s})
    return asked


def plan_s(events: list[Event]) -> float:
    """Seconds to make a plan of the records of a run."""
    run = Run.from_events(events)
    started = time.perf_counter()
    plan = make_plan(run, JournalRef(file="journal.jsonl", sha256="", samples=len(run.samples)))
    made_s = time.perf_counter() - started
    assert plan.winner is not None, "it decides"
    return made_s


class Invented:
    """A run that grows by invented records, and all of these."""

    def __init__(self, machine: Machine, candidates: int) -> None:
        self._rng = random.Random(0)
        names = [digest(number) for number in range(candidates)]
        self._failing = frozenset(names[FAILING - 1 :: FAILING])
        self.load_keys = {
            Cell(candidate=name, scenario=SCENARIO.key): f"load{number // PER_LOAD}"
            for number, name in enumerate(names)
        }
        self.run = Run(_header(machine))
        self.events: list[Event] = [self.run.header]
        for number, name in enumerate(names):
            self.add(_entry(number, name))

    def add(self, event: Event) -> None:
        """Put the next record in the journal."""
        self.run.add(event)
        self.events.append(event)

    def carry_out(self, order: LaunchOrder) -> Event:
        """Put all records of a launch in the journal but the last one, which is returned."""
        self.add(order)
        self.add(Loaded(launch=order.launch, start_s=3.0, load_s=self._rng.uniform(0.1, 0.2)))
        for cell in order.cells:
            if order.purpose != "memory":
                self._prove(order, cell)
        for cell in order.cells:
            if cell.candidate in self.run.live:
                self._measure(order, cell)
        return LaunchEnd(launch=order.launch, wall_s=self._rng.uniform(10, 12), generate_s=self._rng.uniform(5, 6))

    def _prove(self, order: LaunchOrder, cell: Cell) -> None:
        if cell.candidate in self._failing:
            failure = Failure(kind="not_applied", phase="prove", reason="it runs something else")
            self.add(Failed(launch=order.launch, cell=cell, failure=failure))
        else:
            self.add(Proof(launch=order.launch, cell=cell, applied=Applied(values={"cache": cell.candidate})))

    def _measure(self, order: LaunchOrder, cell: Cell) -> None:
        samples: list[Sample] = []
        while order.purpose != "memory" and not self.run.has_enough(order.launch, samples):
            samples.append(invented_sample(self._rng, order.launch, order.round, cell, SCENARIO, len(samples)))
            self.add(samples[-1])
        self.add(Measured(launch=order.launch, cells=(cell,), resources=invented_resources(self._rng)))


def _header(machine: Machine) -> Header:
    """With a limit that some calls violate, which takes more to judge than one that all keep."""
    header = invented_header(machine, rounds=2 * BLOCKS)
    changes = {
        "scenarios": (SCENARIO,),
        "samples": SAMPLES,
        "limits": Limits(max_ttft_s=Limit(value=0.0205, percentile=95)),
    }
    return header.model_copy(update={"profile": header.profile.model_copy(update=changes)})


def _entry(number: int, name: str) -> CandidateEntry:
    settings = {"load": f"load{number // PER_LOAD}", "kernel": f"kernel{number % PER_LOAD}"}
    label = " ".join(f"{knob}={value}" for knob, value in settings.items())
    candidate = Candidate(id=name, label=label, settings=settings, complexity=number)
    return CandidateEntry(candidate=candidate, incumbent=number == 0)


def complete_blocks(invented: Invented, search: Search) -> None:
    """All launches of the first blocks, as the search asks for them."""
    for block in range(BLOCKS):
        for cells in search.outstanding(invented.run, block, invented.run.live):
            order = LaunchOrder(launch=len(invented.run.launches), round=block, purpose="timing", cells=tuple(cells))
            invented.add(invented.carry_out(order))


def complete_screening(invented: Invented, search: Search) -> None:
    """All launches before the blocks, as the search asks for them, with more calls than it asks for."""
    while (order := search.next(invented.run)) is not None and order.purpose in ("pilot", "screening"):
        more = order.model_copy(update={"samples": SCREENING_SAMPLES})
        invented.add(invented.carry_out(more))


if __name__ == "__main__":
    sys.exit(main())
