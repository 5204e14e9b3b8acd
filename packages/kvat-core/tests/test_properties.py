"""What holds of every run: its plan tells of candidates and machine, not of how or in which order it was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Candidate,
    CandidateEntry,
    Cell,
    Confidence,
    End,
    Event,
    Failed,
    Failure,
    Header,
    JournalRef,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Machine,
    Measured,
    ModelRef,
    ModelShape,
    Objective,
    Plan,
    Profile,
    Proof,
    RequestTiming,
    Resources,
    Resumed,
    Sample,
    Scenario,
    Stopped,
    Target,
)
from kvat_core.search import Grid, Race, Search
from kvat_core.stats import DRAWS

pytestmark = pytest.mark.slow  # of numbers alone: one Python tells as much as four

REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
SCENARIOS = (Scenario(prompt_tokens=8, output_tokens=3), Scenario(prompt_tokens=64, output_tokens=3, weight=2))
TODAY = "c00"
MANY = 30
"""More than a race takes for a small space, so that it screens."""
DOUBT = 5 * math.sqrt(0.25 / DRAWS)
"""Five standard errors of a probability that is drawn."""


@dataclass(frozen=True)
class World:
    """Times that follow from candidate, block and call alone: they are the same whenever they are measured."""

    seed: int
    size: int
    noise: float
    """Standard deviation of the logarithm of a launch's times, and of a call's."""
    per_load: int = 1
    broken: Literal["oom_device", "crash"] | None = None
    """How the second candidate fails."""
    hopeless: bool = False
    """Whether the last one takes three times as long as what runs today."""
    launch_s: float = 2.0
    """Loading the model, and twice what each cell adds."""

    @property
    def names(self) -> list[str]:
        return [f"c{number:02d}" for number in range(self.size)]

    @property
    def load_keys(self) -> dict[Cell, str]:
        keys = {name: f"load{number // self.per_load}" for number, name in enumerate(self.names)}
        return {Cell(candidate=name, scenario=one.key): key for name, key in keys.items() for one in SCENARIOS}

    def header(self) -> Header:
        return Header(
            kvat="0.1.0",
            created="2026-01-01T00:00:00Z",
            engine="invented",
            versions={},
            target=Target(model=ModelRef(id="invented:one"), device="cpu"),
            shape=ModelShape(architecture="invented", layers=1, attention=("full",)),
            machine=Machine(fingerprint="f", device="cpu", cpu="c", cores=2, memory_bytes=1000, os="o", python="3"),
            profile=Profile(
                name="two", scenarios=SCENARIOS, objective=Objective(ttft=0.5, decode=0.5), launches=3, samples=2
            ),
            space="safe",
            pinned={},
            excluded=(),
            seed=self.seed,
            probe_s=0.0,
            instrument=(),
        )

    def entries(self) -> list[CandidateEntry]:
        """What runs today first; none is as plain as another."""
        candidates = [
            Candidate(id=name, label=name, settings={"knob": name}, complexity=rank)
            for rank, name in enumerate(self.names)
        ]
        return [CandidateEntry(candidate=one, incumbent=one.id == TODAY) for one in candidates]

    def launch(self, order: LaunchOrder) -> Iterator[Event]:
        """What a launch leaves in the journal after its order."""
        yield Loaded(launch=order.launch, start_s=0.0, load_s=self.launch_s)
        if order.purpose == "memory":
            resources = Resources(
                processes=("worker",), peak_host_bytes=100 + self.names.index(order.cells[0].candidate)
            )
            yield Measured(launch=order.launch, cells=order.cells, resources=resources)
        else:
            yield from self._timed(order)
        wall_s = self.launch_s * (1 + len(order.cells) / 2)
        yield LaunchEnd(launch=order.launch, wall_s=wall_s, generate_s=wall_s - self.launch_s)

    def _timed(self, order: LaunchOrder) -> Iterator[Event]:
        for cell in order.cells:
            if self.broken is not None and cell.candidate == self.names[1]:
                failure = Failure(kind=self.broken, phase="prove", reason="made to fail")
                yield Failed(launch=order.launch, cell=cell, failure=failure)
                return
            yield Proof(launch=order.launch, cell=cell, applied=Applied(values={"runs": cell.candidate}))
        for cell in order.cells:
            for index in range(order.samples or 2):
                yield self._sample(order, cell, index)

    def _sample(self, order: LaunchOrder, cell: Cell, index: int) -> Sample:
        place = f"{self.seed}/{cell.candidate}/{cell.scenario}/{order.round}"
        launch = random.Random(place).gauss(self._level(cell.candidate), self.noise)
        call = random.Random(f"{place}/{index}")
        ttft_s, gap_s = (math.exp(call.gauss(launch, self.noise)) for _ in range(2))
        scenario = next(one for one in SCENARIOS if one.key == cell.scenario)
        request = RequestTiming(
            prompt_tokens=scenario.prompt_tokens,
            output_tokens=scenario.output_tokens,
            ttft_s=ttft_s,
            e2e_s=ttft_s + 2 * gap_s,
            token_gaps_s=(gap_s, gap_s),
        )
        return Sample(
            clock="host",
            duration_s=request.e2e_s,
            requests=(request,),
            launch=order.launch,
            round=order.round,
            candidate=cell.candidate,
            scenario=cell.scenario,
            index=index,
        )

    def _level(self, candidate: str) -> float:
        """Logarithm of how long it takes, relative to what runs today."""
        if self.hopeless and candidate == self.names[-1]:
            return math.log(3)
        return 0.0 if candidate == TODAY else random.Random(f"{self.seed}/{candidate}").gauss(0, 0.1)


MakeSearch = Callable[[Mapping[Cell, str], int], Search]


def went_on(search: MakeSearch, world: World, events: Sequence[Event]) -> list[Event]:
    """The records of a run that has these and goes on to its end."""
    run, recorded = Run.from_events(events), list(events)
    asked = search(world.load_keys, world.seed)
    while (order := asked.next(run)) is not None:
        for event in (order, *world.launch(order)):
            run.add(event)
            recorded.append(event)
    return [*recorded, End(wall_s=1.0)]


def measured(search: MakeSearch, world: World) -> list[Event]:
    """The records of a whole run."""
    return went_on(search, world, [world.header(), *world.entries()])


def plan_of(events: Sequence[Event]) -> Plan:
    return make_plan(Run.from_events(events), REF)


def scaled(event: Event, factor: float) -> Event:
    """The same record with all that it says of a call's time so many times as long."""
    if not isinstance(event, Sample):
        return event
    requests = tuple(
        one.model_copy(
            update={
                "ttft_s": factor * one.ttft_s,
                "e2e_s": factor * one.e2e_s,
                "token_gaps_s": tuple(factor * gap for gap in one.token_gaps_s or ()),
            }
        )
        for one in event.requests
    )
    return event.model_copy(update={"duration_s": factor * event.duration_s, "requests": requests})


def decided(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(exclude={"journal", "created"})


def verdict_of(plan: Plan) -> tuple[Any, ...]:
    return plan.winner, plan.verdict, set(plan.equivalents)


def same_confidence(one: Confidence | None, other: Confidence | None) -> bool:
    """Equal but for what is drawn."""
    assert one is not None
    assert other is not None
    exact = (one.noise_floor, one.epsilon) == pytest.approx((other.noise_floor, other.epsilon))
    return exact and abs(one.probability - other.probability) <= DOUBT


worlds = st.builds(
    World,
    seed=st.integers(0, 10_000),
    size=st.sampled_from([3, 6, MANY]),
    noise=st.sampled_from([0.0005, 0.01, 0.05]),
    per_load=st.sampled_from([1, 3]),
    broken=st.sampled_from([None, "oom_device", "crash"]),
)
searches = pytest.mark.parametrize("search", [Race, Grid])
few = settings(max_examples=25, deadline=None)


@searches
@few
@given(world=worlds, seed=st.integers(0, 10_000))
def test_the_order_of_calls_in_a_launch_says_nothing(search: MakeSearch, world: World, seed: int) -> None:
    events = measured(search, world)
    places = [place for place, event in enumerate(events) if isinstance(event, Sample)]
    groups: dict[tuple[int, str, str], list[int]] = {}
    for place in places:
        groups.setdefault((events[place].launch, events[place].candidate, events[place].scenario), []).append(place)
    shuffled, source = list(events), random.Random(seed)
    for group in groups.values():
        for to, origin in zip(group, source.sample(group, len(group)), strict=True):
            shuffled[to] = events[origin]
    assert decided(plan_of(shuffled)) == decided(plan_of(events))


@searches
@few
@given(world=worlds, seed=st.integers(0, 10_000))
def test_the_order_of_candidates_of_unlike_plainness_says_nothing(search: MakeSearch, world: World, seed: int) -> None:
    events = measured(search, world)
    entries = [event for event in events if isinstance(event, CandidateEntry)]
    random.Random(seed).shuffle(entries)
    others = [event for event in events if not isinstance(event, CandidateEntry)]
    one, other = plan_of(events), plan_of([others[0], *entries, *others[1:]])
    assert verdict_of(one) == verdict_of(other)
    assert one.ratio == other.ratio
    assert same_confidence(one.confidence, other.confidence)
    assert {result.id: result for result in one.candidates} == {result.id: result for result in other.candidates}


@searches
@few
@given(world=worlds, factor=st.floats(0.001, 1000))
def test_a_slower_machine_is_asked_the_same_and_decides_the_same(
    search: MakeSearch, world: World, factor: float
) -> None:
    class Slower(World):
        def launch(self, order: LaunchOrder) -> Iterator[Event]:
            return (scaled(event, factor) for event in super().launch(order))

    slower = Slower(**vars(world))
    events, others = measured(search, world), measured(search, slower)
    assert [event for event in events if isinstance(event, LaunchOrder)] == [
        event for event in others if isinstance(event, LaunchOrder)
    ]
    one, other = plan_of(events), plan_of(others)
    assert verdict_of(one) == verdict_of(other)
    assert one.ratio is not None
    assert other.ratio is not None
    for kind in ("score", "ttft", "decode"):
        assert getattr(one.ratio, kind).model_dump() == pytest.approx(getattr(other.ratio, kind).model_dump())
    assert same_confidence(one.confidence, other.confidence)


def without(events: Sequence[Event], name: str) -> Iterator[Event]:
    """The same records as if there had been no such candidate."""
    for event in events:
        if isinstance(event, LaunchOrder | Measured):
            if cells := tuple(cell for cell in event.cells if cell.candidate != name):
                yield event.model_copy(update={"cells": cells})
        elif isinstance(event, CandidateEntry):
            if event.candidate.id != name:
                yield event
        elif not (isinstance(event, Sample) and event.candidate == name) and not (
            isinstance(event, Proof | Failed) and event.cell.candidate == name
        ):
            yield event


@searches
@few
@given(world=worlds)
def test_to_try_something_hopeless_changes_no_decision(search: MakeSearch, world: World) -> None:
    worse = replace(world, hopeless=True)
    events = measured(search, worse)
    one, other = plan_of(events), plan_of(list(without(events, worse.names[-1])))
    assert verdict_of(one) == verdict_of(other)
    assert one.ratio == other.ratio
    assert same_confidence(one.confidence, other.confidence)


@searches
@few
@given(world=worlds, factor=st.floats(0.3, 0.99))
def test_a_winner_that_is_faster_still_wins(search: MakeSearch, world: World, factor: float) -> None:
    events = measured(search, world)
    winner = plan_of(events).require_winner().id
    faster = [
        scaled(event, factor) if isinstance(event, Sample) and event.candidate == winner else event for event in events
    ]
    assert plan_of(faster).require_winner().id == winner


def resumed(search: MakeSearch, world: World, events: Sequence[Event], kept: int, stopped: bool) -> list[Event]:
    """A run that ended after so many of its records, by a kill or with a word, and goes on."""
    end = [Stopped(kind="interrupted", reason="by the user")] if stopped else []
    return went_on(search, world, [*events[:kept], *end, Resumed(created="2026-01-02T00:00:00Z")])


@searches
@few
@given(world=worlds, cut=st.floats(0, 1), stopped=st.booleans())
def test_a_run_that_was_cut_anywhere_comes_to_the_plan_of_an_uninterrupted_one(
    search: MakeSearch, world: World, cut: float, stopped: bool
) -> None:
    # Where launches take time, the run-off of a small space ends by what the blocks took, and nobody knows that of a
    # launch that was cut.
    world = replace(world, launch_s=0.0)
    events = measured(search, world)
    least = 1 + world.size
    kept = least + round(cut * (len(events) - 1 - least))
    one, other = plan_of(events), plan_of(resumed(search, world, events, kept, stopped))
    # A launch that was cut is one launch more, over which drift is estimated: that may move a probability a little.
    assert same_confidence(one.confidence, other.confidence)
    assert decided(one.model_copy(update={"confidence": None})) == decided(
        other.model_copy(update={"confidence": None})
    )
