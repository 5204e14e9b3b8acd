"""kvat's own searches as they are, fed in a world with the events of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from worlds import SAMPLES, Call, Choice, Launch, World

from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import (
    Candidate,
    CandidateEntry,
    Cell,
    Event,
    Failed,
    Failure,
    Header,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Machine,
    Measured,
    ModelRef,
    ModelShape,
    Objective,
    Profile,
    RequestTiming,
    Resources,
    Sample,
    Scenario,
    Target,
)
from kvat_core.search import Race, Search

SCENARIO = Scenario(prompt_tokens=1, output_tokens=2)


def kvat(make: Callable[[Mapping[Cell, str], int], Search], world: World, seed: int, launches: int = 3) -> Choice:
    """One of kvat's own searches, fed with events as a real run feeds it."""
    run = Run(_header(seed, launches))
    names = [world.incumbent, *sorted(name for name in world.load_keys if name != world.incumbent)]
    for rank, name in enumerate(names):
        candidate = Candidate(id=name, label=name, settings=world.settings[name], complexity=int(rank > 0))
        run.add(CandidateEntry(candidate=candidate, incumbent=rank == 0))
    keys = {Cell(candidate=name, scenario=SCENARIO.key): key for name, key in world.load_keys.items()}
    search = make(keys, seed)
    cost_s = 0.0
    while (order := search.next(run)) is not None:
        run.add(order)
        if order.purpose == "memory":
            cost_s += world.memory_s(order.cells[0].candidate)
            for event in _memory_events(order):
                run.add(event)
            continue
        launch = world.launch(order.round, [cell.candidate for cell in order.cells], order.samples or SAMPLES)
        cost_s += launch.load_s + launch.rest_s
        for event in _events(order, launch):
            run.add(event)
    decision = decide(run)
    assert decision is not None
    score = decision.ratios.score if decision.ratios else None
    return Choice(
        decision.winner,
        cost_s,
        len(run.loaded),
        decision.verdict,
        decision.confidence.probability,
        decision.confidence.epsilon,
        (score.value, score.low, score.high) if score else None,
        _dropped(run),
        _screened_at(run, decision.winner),
    )


def _dropped(run: Run) -> tuple[str, ...]:
    raced = [order for order in run.launches if order.purpose == "timing"]
    last = max(order.round for order in raced)
    everybody = {cell.candidate for order in raced for cell in order.cells}
    return tuple(sorted(everybody - {cell.candidate for order in raced if order.round == last for cell in order.cells}))


def _screened_at(run: Run, winner: str) -> float | None:
    launches = [order for order in run.launches if order.purpose == "screening"]
    at = next((rank for rank, order in enumerate(launches) if winner in {cell.candidate for cell in order.cells}), None)
    return None if at is None or len(launches) < 2 else at / (len(launches) - 1)


def _events(order: LaunchOrder, launch: Launch) -> Iterator[Event]:
    yield Loaded(launch=order.launch, start_s=0.0, load_s=launch.load_s)
    for shown in launch.shown:
        if not shown.calls:
            cell = Cell(candidate=shown.candidate, scenario=SCENARIO.key)
            failure = Failure(kind="oom_device", phase="prove", reason="it does not fit")
            yield Failed(launch=order.launch, cell=cell, failure=failure)
        for index, call in enumerate(shown.calls):
            yield _sample(order, shown.candidate, index, call)
    yield LaunchEnd(launch=order.launch, wall_s=launch.load_s + launch.rest_s, generate_s=launch.rest_s)


def _memory_events(order: LaunchOrder) -> Iterator[Event]:
    """Of a process that reads a peak, of which there is plenty for all."""
    yield Loaded(launch=order.launch, start_s=0.0, load_s=0.0)
    yield Measured(launch=order.launch, cells=order.cells, resources=Resources(processes=("replay",)))
    yield LaunchEnd(launch=order.launch, wall_s=0.0, generate_s=0.0)


def _sample(order: LaunchOrder, candidate: str, index: int, call: Call) -> Sample:
    """A call of two output tokens. Not validated: a replay makes millions."""
    e2e_s = call.ttft_s + 1 / call.decode_tps
    request = RequestTiming.model_construct(
        prompt_tokens=1, output_tokens=2, ttft_s=call.ttft_s, e2e_s=e2e_s, token_gaps_s=None, count=1
    )
    return Sample.model_construct(
        clock="host",
        duration_s=e2e_s,
        requests=(request,),
        compilations=0,
        launch=order.launch,
        round=order.round,
        candidate=candidate,
        scenario=SCENARIO.key,
        index=index,
        conditions=None,
        distrust=(),
    )


def _header(seed: int, launches: int) -> Header:
    profile = Profile(
        name="replay",
        scenarios=(SCENARIO,),
        objective=Objective(ttft=0.5, decode=0.5),
        launches=launches,
        samples=SAMPLES,
    )
    return Header(
        kvat="0",
        created="2026-01-01T00:00:00Z",
        engine="replay",
        versions={},
        target=Target(model=ModelRef(id="replay"), device="cpu"),
        shape=ModelShape(architecture="replay", layers=1, attention=("full",)),
        machine=Machine(fingerprint="", device="cpu", cpu="", cores=1, memory_bytes=1, os="", python=""),
        profile=profile,
        space="safe",
        pinned={},
        excluded=(),
        seed=seed,
        probe_s=0.0,
        instrument=(),
    )


def race(world: World, seed: int) -> Choice:
    """What `kvat tune` does by itself."""
    return kvat(Race, world, seed)
