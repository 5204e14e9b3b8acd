"""What a search asks for next: stages, who takes part in them, and what the allowance leaves. Nothing is measured."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pytest

from kvat_core import context
from kvat_core.decision import decide
from kvat_core.errors import UsageError
from kvat_core.field import Field
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Candidate,
    CandidateEntry,
    Ceiling,
    Ceilings,
    Cell,
    Failed,
    Failure,
    Footprint,
    LaunchEnd,
    LaunchOrder,
    Limit,
    Limits,
    Loaded,
    Measured,
    ModelShape,
    Objective,
    Profile,
    Proof,
    Purpose,
    RequestTiming,
    Resources,
    Sample,
    Scenario,
)
from kvat_core.scoring import compared_peaks
from kvat_core.screening import standing
from kvat_core.search import Allowance, Grid, Race, Rationed, Vetted, find_search
from kvat_core.search._entrants import survivors

SCENARIO = Scenario(prompt_tokens=8, output_tokens=2)
PROFILE = Profile(name="test", scenarios=(SCENARIO,), objective=Objective(ttft=0.5, decode=0.5), launches=3, samples=2)
LOAD_S, CELL_S = 10.0, 1.0


class World:
    """Candidates with a pace each; launches of some of them take place in numbers only."""

    def __init__(
        self, paces: Mapping[str, float], *, noise: float = 0.005, per_load: int = 4, failing: Sequence[str] = ()
    ) -> None:
        self.paces = dict(paces)
        self.failing = set(failing)
        self._noise = noise
        self.pace_of: Callable[[Cell], float] = lambda cell: self.paces[cell.candidate]
        self.reads: Callable[[Cell], str] = lambda cell: cell.candidate
        ordered = sorted(self.paces)
        self.load_keys = {
            Cell(candidate=name, scenario=SCENARIO.key): f"load{rank // per_load}" for rank, name in enumerate(ordered)
        }

    def start(self, header: Any, **changes: Any) -> Run:
        run = Run(header(**{"profile": PROFILE, **changes}))
        for rank, name in enumerate(self.paces):
            settings = {"one": str(rank % 3), "other": str(rank % 2)}
            candidate = Candidate(id=name, label=name, settings=settings, complexity=int(rank > 0))
            run.add(CandidateEntry(candidate=candidate, incumbent=rank == 0))
        return run

    def carry_out(self, run: Run, order: LaunchOrder) -> None:
        source = random.Random(f"{order.launch}")
        run.add(order)
        run.add(Loaded(launch=order.launch, start_s=0.0, load_s=LOAD_S))
        bad = [cell for cell in order.cells if cell.candidate in self.failing]
        if bad:
            failure = Failure(kind="oom_host", phase="prove", reason="too large")
            run.add(Failed(launch=order.launch, cell=bad[0], failure=failure))
        elif order.purpose == "memory":
            resources = Resources(processes=("worker",), peak_host_bytes=100)
            run.add(Measured(launch=order.launch, cells=order.cells, resources=resources))
        else:
            for cell in order.cells:
                applied = Applied(values={"runs": self.reads(cell)})
                run.add(Proof(launch=order.launch, cell=cell, applied=applied))
            for cell in (one for one in order.cells if run.original(one) == one):
                pace = self.pace_of(cell) * math.exp(source.gauss(0, self._noise))
                for index in range(order.samples or run.header.profile.samples):
                    run.add(_sample(order, cell, index, pace))
        wall_s = LOAD_S + CELL_S * len(order.cells)
        run.add(LaunchEnd(launch=order.launch, wall_s=wall_s, generate_s=0.0))


def _sample(order: LaunchOrder, cell: Cell, index: int, pace: float) -> Sample:
    request = RequestTiming(prompt_tokens=8, output_tokens=2, ttft_s=pace, e2e_s=2 * pace, token_gaps_s=(pace,))
    return Sample(
        clock="host",
        duration_s=2 * pace,
        requests=(request,),
        launch=order.launch,
        round=order.round,
        candidate=cell.candidate,
        scenario=cell.scenario,
        index=index,
    )


def searched(world: World, run: Run, search: Any) -> Run:
    while (order := search.next(run)) is not None:
        assert len({world.load_keys[cell] for cell in order.cells}) == 1
        world.carry_out(run, order)
    return run


def purposes(run: Run) -> Counter[str]:
    return Counter(order.purpose for order in run.launches)


def blocks_of(run: Run, purpose: str) -> dict[str, int]:
    """How many blocks of a kind each candidate was in."""
    return dict(Counter(cell.candidate for order in run.launches if order.purpose == purpose for cell in order.cells))


def spread(size: int, best: float = 1.0, step: float = 0.03) -> dict[str, float]:
    """Paces from the best up, in an order that says nothing; the incumbent is in the middle."""
    names = [f"c{number:02d}" for number in range(size)]
    random.Random(4).shuffle(names)
    paces = {name: best * (1 + step) ** rank for rank, name in enumerate(names)}
    today = names[size // 2]
    return {today: paces.pop(today), **paces}


def fastest(world: World) -> str:
    return min((name for name in world.paces if name not in world.failing), key=lambda name: world.paces[name])


def test_in_a_small_space_everybody_gets_the_blocks_of_the_profile_and_the_last_ones_more(
    header: Any,
) -> None:
    world = World(spread(10))
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    assert set(purposes(run)) == {"timing", "run_off", "memory"}
    assert set(blocks_of(run, "timing").values()) == {3}
    assert len(blocks_of(run, "timing")) == 10
    finalists = blocks_of(run, "run_off")
    assert {run.incumbent, fastest(world)} <= set(finalists)
    assert len(finalists) <= 3
    decision = decide(run)
    assert decision is not None
    assert (decision.winner, decision.verdict) == (fastest(world), "better")


def test_blocks_are_interleaved_and_those_of_the_run_off_mirrored(header: Any) -> None:
    world = World(spread(4), per_load=1)
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    rounds = [order.round for order in run.launches if order.purpose == "timing"]
    assert rounds == sorted(rounds)
    last = [order for order in run.launches if order.purpose == "run_off"]
    first = last[0].round
    orders = [[one.cells[0].candidate for one in last if one.round == first + block] for block in range(2)]
    assert orders[0] == orders[1][::-1]


def test_who_takes_the_place_of_a_finalist_comes_in_with_the_next_block(header: Any) -> None:
    world = World(spread(8, step=0.004), noise=0.02, per_load=1)
    run, search = world.start(header), Race(world.load_keys, 0)
    while len({order.round for order in run.launches if order.purpose == "run_off"}) < 3:
        order = search.next(run)
        assert order is not None
        world.carry_out(run, order)
    begun = [order for order in run.launches if order.purpose == "run_off"]
    world.failing = {cell.candidate for order in begun for cell in order.cells} - {run.incumbent}
    searched(world, run, search)
    rounds = [order.round for order in run.launches if order.purpose == "run_off"]
    assert rounds == sorted(rounds)
    assert {cell.candidate for order in run.launches[len(run.launches) - 3 :] for cell in order.cells} - world.failing


def test_a_profile_of_less_than_three_launches_asks_for_no_run_off(header: Any) -> None:
    world = World(spread(6))
    run = world.start(header, profile=PROFILE.model_copy(update={"launches": 2}))
    assert set(purposes(searched(world, run, Race(world.load_keys, 0)))) == {"timing", "memory"}


def test_a_large_space_is_screened_once_and_raced_by_the_best_and_what_runs_today(header: Any) -> None:
    world = World(spread(60))
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    assert set(blocks_of(run, "screening").values()) == {1}
    assert len(blocks_of(run, "screening")) == 60
    assert run.launches[0].cells[0].candidate == run.incumbent
    assert {order.samples for order in run.launches if order.purpose == "screening"} == {1}
    pilots = [order for order in run.launches if order.purpose == "pilot"]
    assert len(pilots) == 4
    assert {cell.candidate for order in pilots for cell in order.cells} == {run.incumbent}
    best = sorted(world.paces, key=lambda name: world.paces[name])[:6]
    assert set(blocks_of(run, "timing")) == {run.incumbent, *best}
    decision = decide(run)
    assert decision is not None
    assert (decision.winner, decision.verdict) == (best[0], "better")
    # 3 % apart at 0.5 % noise: three blocks drop the slowest of them, corrected for all looks.
    assert blocks_of(run, "timing")[best[0]] >= 3


def test_a_race_is_over_when_its_run_off_has_begun(header: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As when the run-off shows that the race was not settled after all.
    monkeypatch.setattr("kvat_core.search._race.settled", lambda field, margin: not field.run.after_the_choice)
    world = World(spread(40))
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    stages = [order.purpose for order in run.launches if order.purpose in ("timing", "run_off")]
    assert stages == sorted(stages, key=["timing", "run_off"].index)
    blocks = list(dict.fromkeys(order.round for order in run.launches if order.purpose in ("timing", "run_off")))
    assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_pilots_are_spread_over_screening(header: Any) -> None:
    world = World(spread(60))
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    stages = [order.purpose for order in run.launches if order.purpose in ("pilot", "screening")]
    places = [place / len(stages) for place, stage in enumerate(stages) if stage == "pilot"]
    assert places == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.1)


def test_who_is_shown_to_be_slower_leaves_the_race(header: Any) -> None:
    # Nobody is settled: the two best are equal; the others are far behind.
    paces = spread(40, step=0.001) | {"z1": 0.8, "z2": 0.8}
    today, *_ = paces
    world = World({today: 1.1, **{name: pace for name, pace in paces.items() if name != today}}, noise=0.02)
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    blocks = blocks_of(run, "timing")
    most = max(blocks.values())
    assert {name for name, number in blocks.items() if number == most} >= {"z1", "z2", today}
    assert min(blocks.values()) >= 3


def test_whoever_is_shown_to_be_worse_is_no_survivor(header: Any) -> None:
    world = World({"today": 1.1, "a": 1.0, "b": 1.001, "c": 1.05, "d": 1.4}, noise=0.004)
    run = searched(world, world.start(header), Grid(world.load_keys, 0))
    field = Field(run)
    assert set(survivors(field)) >= {field.leader, "a", "b"}
    assert not {"c", "d", "today"} & set(survivors(field))


def test_a_candidate_that_is_another_one_in_one_scenario_can_win_by_the_other(header: Any) -> None:
    long = Scenario(prompt_tokens=9, output_tokens=2)
    profile = PROFILE.model_copy(update={"scenarios": (SCENARIO, long)})
    for size in (4, 30):
        names = [f"c{number:02d}" for number in range(size)]
        world = World(dict.fromkeys(names, 1.0))
        world.load_keys |= {Cell(candidate=name, scenario=long.key): f"{name}+" for name in names}
        run = world.start(header, profile=profile)
        # c02 is c01 in the short scenario, and far better in the long one.
        world.pace_of = lambda cell: 0.5 if (cell.candidate, cell.scenario) == ("c02", long.key) else 1.0
        world.reads = lambda cell: "c01" if (cell.candidate, cell.scenario) == ("c02", SCENARIO.key) else cell.candidate
        searched(world, run, Race(world.load_keys, 0))
        decision = decide(run)
        assert decision is not None
        assert (decision.winner, decision.verdict) == ("c02", "better")


@pytest.mark.parametrize("launches", [1, 2, 4, 10])
def test_a_race_has_at_least_as_many_blocks_as_the_profile_has_launches(header: Any, launches: int) -> None:
    world = World(spread(30))
    run = world.start(header, profile=PROFILE.model_copy(update={"launches": launches}))
    searched(world, run, Race(world.load_keys, 0))
    assert blocks_of(run, "timing")[run.incumbent] >= launches
    if launches < 3:
        assert set(blocks_of(run, "timing").values()) == {launches}


def test_what_failed_is_not_raced(header: Any) -> None:
    paces = spread(40)
    best = min(paces, key=lambda name: paces[name])
    world = World(paces, failing=[best])
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    assert best not in blocks_of(run, "timing")
    decision = decide(run)
    assert decision is not None
    assert decision.winner == fastest(world)


@pytest.mark.parametrize("size", [8, 40])
def test_without_what_runs_today_the_best_of_the_others_is_found(header: Any, size: int) -> None:
    paces = spread(size)
    world = World(paces, failing=[next(iter(paces))])
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    decision = decide(run)
    assert decision is not None
    assert (decision.winner, decision.ratios) == (fastest(world), None)


def test_screening_ends_early_where_the_rest_can_hardly_be_better(header: Any) -> None:
    source = random.Random(3)
    equal = {f"c{number:03d}": 1.0 * math.exp(source.gauss(0, 0.002)) for number in range(200)}
    world = World({"today": 1.5, **equal}, noise=0.02)
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    assert 50 <= len(blocks_of(run, "screening")) < 190
    decision = decide(run)
    assert decision is not None
    assert decision.verdict == "better"
    assert decision.confidence.probability < 1


def test_screening_goes_on_where_the_best_may_be_among_the_rest(header: Any) -> None:
    world = World(spread(200, step=0.02), noise=0.005)
    run = searched(world, world.start(header), Race(world.load_keys, 0))
    assert len(blocks_of(run, "screening")) > 190


def test_who_seems_to_miss_a_limit_races_last(header: Any) -> None:
    paces = spread(40, step=0.01)
    world = World(paces)
    fast = sorted(paces, key=lambda name: paces[name])[:10]
    profile = PROFILE.model_copy(update={"limits": Limits(min_decode_tps=Limit(value=1 / paces[fast[-1]]))})
    run = world.start(header, profile=profile)
    searched(world, run, Race(world.load_keys, 0))
    raced = set(blocks_of(run, "timing")) - {run.incumbent}
    assert raced <= set(fast)


def nobody(_run: Run) -> tuple[str, ...]:
    """No rules, so nobody who would stand in."""
    return ()


@pytest.mark.parametrize("make", [Race, Grid])
@pytest.mark.parametrize("size", [8, 60])
@pytest.mark.parametrize("launches", [1, 2, 3, 7, 20])
def test_no_more_launches_than_allowed_and_there_is_a_decision_as_soon_as_there_can_be(
    header: Any, make: Callable[..., Any], size: int, launches: int
) -> None:
    world = World(spread(size))
    allowance = Allowance(launches=launches)
    search = Rationed(Vetted(make(world.load_keys, 0, allowance), nobody), world.load_keys, allowance)
    run = searched(world, world.start(header), search)
    assert len(run.launches) <= launches
    assert search.cut_short(run) == (size == 60 or launches < 20)
    if launches == 20:
        decision = decide(run)
        assert decision is not None
        # Something is kept for the peaks that a plan needs, as soon as it is known whose they are.
        assert set(blocks_of(run, "memory")) & {run.incumbent, decision.winner}


@pytest.mark.parametrize("wall_s", [30.0, 100.0, 300.0])
def test_launches_that_will_not_fit_are_not_begun(header: Any, wall_s: float) -> None:
    world = World(spread(60))
    allowance = Allowance(wall_s=wall_s)
    search = Rationed(Vetted(Race(world.load_keys, 0, allowance), nobody), world.load_keys, allowance)
    run = searched(world, world.start(header), search)
    assert sum(end.wall_s for end in run.ended) <= wall_s
    screening_s = (LOAD_S + 4 * CELL_S) * purposes(run)["screening"]
    assert screening_s <= wall_s / 2 + LOAD_S + 4 * CELL_S
    if wall_s >= 300:
        assert decide(run) is not None


class OneOrder(Vetted):
    """Asks for one launch, and would have its winner looked at for leaks."""

    def __init__(self, purpose: Purpose) -> None:
        self._purpose: Purpose = purpose

    def next(self, run: Run) -> LaunchOrder:
        return self._order(run, self._purpose)

    def of_the_winner(self, run: Run) -> list[LaunchOrder]:
        return [self._order(run, "canary")]

    def _order(self, run: Run, purpose: Purpose) -> LaunchOrder:
        cells = (Cell(candidate=purpose, scenario=SCENARIO.key),)
        return LaunchOrder(launch=len(run.launches), round=0, purpose=purpose, cells=cells)


@pytest.mark.parametrize("purpose", ["context", "fidelity"])
@pytest.mark.parametrize(("wall_s", "comes"), [(1000.0, "order"), (125.0, "canary"), (10.0, None)])
def test_what_does_not_fit_leaves_what_was_kept_to_the_winner(
    header: Any, monkeypatch: pytest.MonkeyPatch, purpose: Purpose, wall_s: float, comes: str | None
) -> None:
    monkeypatch.setattr(context, "trial_s", lambda *_: 100.0)
    monkeypatch.setattr(Rationed, "_vetting_s", lambda _, run, one: 100.0 if one == "fidelity" else 30.0)
    run = World(spread(4)).start(header)
    order = Rationed(OneOrder(purpose), {}, Allowance(wall_s=wall_s)).next(run)
    assert (order and order.purpose) == (purpose if comes == "order" else comes)


def test_what_is_enough_is_not_cut_short(header: Any) -> None:
    world = World(spread(6))
    allowance = Allowance(wall_s=1e6, launches=1000)
    search = Rationed(Vetted(Race(world.load_keys, 0, allowance), nobody), world.load_keys, allowance)
    run = searched(world, world.start(header), search)
    assert not search.cut_short(run)


def test_a_search_is_found_by_its_name_and_an_unknown_one_refused() -> None:
    assert (find_search("race"), find_search("grid")) == (Race, Grid)
    with pytest.raises(UsageError, match="no search is called 'luck'; choose one of grid, "):
        find_search("luck")


def test_the_same_journal_has_the_same_answer(header: Any) -> None:
    world = World(spread(30))
    run, search = world.start(header), Race(world.load_keys, 0)
    while (order := search.next(run)) is not None:
        assert order == Race(world.load_keys, 0).next(run)
        world.carry_out(run, order)


def test_remaining_ends_at_nothing(header: Any) -> None:
    for size in (6, 40):
        world = World(spread(size))
        run, search = world.start(header), Race(world.load_keys, 0)
        while (order := search.next(run)) is not None:
            assert search.remaining(run) >= 1
            world.carry_out(run, order)
        assert search.remaining(run) == 0


def test_with_a_budget_what_could_be_fastest_is_screened_first(header: Any) -> None:
    ceiling = Ceiling(best=1e9, median=1e9)
    ceilings = Ceilings(
        read_bytes_per_s=ceiling, copy_bytes_per_s=ceiling, gemm_flop_per_s={"a": ceiling}, launch_floor_s=ceiling
    )
    shape = ModelShape(
        architecture="a", layers=1, attention=("full",), kv_heads=1, head_dim=8, attention_heads=1, hidden_size=8,
        vocab_size=8, parameters=1000, step_parameters=900,
    )  # fmt: skip
    world = World(spread(40), per_load=2)
    run = world.start(header, shape=shape, ceilings=ceilings)
    # The later in the space, the fewer bytes has a weight, and so the higher is what bounds the speed.
    for rank, entry in enumerate(list(run.candidates)):
        footprint = Footprint(dtype="a", element_bytes=100 - rank, kv_element_bytes=1.0)
        run.candidates[rank] = entry.model_copy(update={"footprints": {SCENARIO.key: footprint}})
    allowance = Allowance(launches=10)
    searched(world, run, Rationed(Vetted(Race(world.load_keys, 0, allowance), nobody), world.load_keys, allowance))
    names = [entry.candidate.id for entry in run.candidates]
    screened = [cell.candidate for order in run.launches if order.purpose == "screening" for cell in order.cells]
    best = {names[-1], names[-2]}
    assert run.incumbent in screened[:2]
    assert best <= set(screened)
    assert set(names[1:5]).isdisjoint(screened)


@pytest.mark.parametrize("size", [8, 40])
def test_where_memory_counts_it_is_known_before_anybody_is_dropped(header: Any, size: int) -> None:
    world = World(spread(size))
    profile = PROFILE.model_copy(update={"objective": Objective(decode=0.5, memory=0.5)})
    machine = header().machine.model_copy(update={"memory_bytes": 150})
    run = world.start(header, profile=profile, machine=machine)
    first = next(iter(world.paces))
    resources = Resources(processes=("worker",), peak_host_bytes=100)
    run.add(Measured(launch=0, cells=(Cell(candidate=first, scenario=SCENARIO.key),), resources=resources))
    searched(world, run, Race(world.load_keys, 0))
    stages = [order.purpose for order in run.launches]
    raced = set(blocks_of(run, "timing"))
    assert raced == set(blocks_of(run, "memory"))
    last_peak = max(place for place, stage in enumerate(stages) if stage == "memory")
    assert stages[last_peak + 1 :].count("timing") >= 2
    assert len(compared_peaks(run)) == len(raced)


@pytest.mark.parametrize("drift", [0.0, 0.004])
def test_screening_takes_drift_out(header: Any, drift: float) -> None:
    """All are equal; who was seen late looks no better for that than who was seen early."""
    world = World(dict.fromkeys([f"c{number:02d}" for number in range(40)], 1.0), noise=0.003)
    run, search = world.start(header), Race(world.load_keys, 0)
    world.pace_of = lambda _: math.exp(-drift * len(run.launches))
    while (order := search.next(run)) is not None and order.purpose in ("pilot", "screening"):
        world.carry_out(run, order)
    found = standing(run, run.live)
    screened = [order for order in run.launches if order.purpose == "screening"]
    place = {cell.candidate: order.launch for order in screened for cell in order.cells}
    early = [ahead for name, ahead in found.items() if place[name] < len(run.launches) / 2]
    late = [ahead for name, ahead in found.items() if place[name] >= len(run.launches) / 2]
    assert len(early) > 5
    assert len(late) > 5
    assert abs(fmean(late) - fmean(early)) < max(0.004, 0.4 * drift * len(run.launches) / 2)
