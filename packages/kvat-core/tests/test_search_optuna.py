"""The search that asks a sampler, replayed in made spaces without measuring."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from kvat_core import TuneRequest, dry_run, tune
from kvat_core.decision import decide
from kvat_core.errors import UsageError
from kvat_core.run import Run
from kvat_core.schema import (
    Candidate,
    CandidateEntry,
    Cell,
    Event,
    Failed,
    Failure,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    RequestTiming,
    Sample,
)
from kvat_core.search import Allowance, Optuna, Race

NOISE = 0.005
"""Standard deviation of a launch's log speed, as of a calm machine."""
KEY = "8+3x1"
MakeRun = Callable[..., Run]


class Space:
    """Knobs of four values each, the first two of which make the load; effects add up, and some pairs interact."""

    def __init__(
        self, seed: int, knobs: int = 5, *, failing: float = 0.0, excluded: float = 0.0, lossy: float = 0.0
    ) -> None:
        source = random.Random(f"space/{seed}")
        self.seed = seed
        self.names = [f"knob{number}" for number in range(knobs)]
        effect = {(knob, value): source.gauss(0, 0.12) for knob in self.names for value in "0123"}
        pairs = {(x, y): source.gauss(0, 0.04) for x, y in itertools.product("0123", repeat=2)}
        self.settings = {
            "".join(values): dict(zip(self.names, values, strict=True))
            for values in itertools.product("0123", repeat=knobs)
        }
        self.truth = {
            name: sum(effect[pair] for pair in one.items()) + pairs[name[-2], name[-1]]
            for name, one in self.settings.items()
        }
        self.incumbent = source.choice(sorted(self.settings))
        others = [name for name in sorted(self.settings) if name != self.incumbent]
        self.failing = {name for name in others if source.random() < failing}
        self.excluded = {name for name in others if source.random() < excluded}
        self.lossy = {name for name in others if source.random() < lossy}

    @property
    def load_keys(self) -> Mapping[Cell, str]:
        return {Cell(candidate=name, scenario=KEY): name[:2] for name in self.settings}

    def entries(self) -> Iterator[CandidateEntry]:
        for name in [self.incumbent, *(name for name in self.settings if name != self.incumbent)]:
            candidate = Candidate(id=name, label=name, settings=self.settings[name], lossy=name in self.lossy)
            exclusion = "cannot be" if name in self.excluded else None
            yield CandidateEntry(candidate=candidate, incumbent=name == self.incumbent, exclusion=exclusion)

    def launched(self, order: LaunchOrder) -> Iterator[Event]:
        """What a launch shows; the same whenever it is repeated."""
        yield order
        yield Loaded(launch=order.launch, start_s=1.0, load_s=1.0)
        for cell in order.cells:
            if cell.candidate in self.failing:
                failure = Failure(kind="oom_device", phase="prove", reason="it does not fit")
                yield Failed(launch=order.launch, cell=cell, failure=failure)
                break
            source = random.Random(f"{self.seed}/{order.round}/{cell.candidate}")
            pace = math.exp(-self.truth[cell.candidate] + source.gauss(0, NOISE))
            for index in range(order.samples or 1):
                yield _sample(cell.candidate, order, pace, index)
        yield LaunchEnd(launch=order.launch, wall_s=3.0, generate_s=1.0)

    def regret(self, name: str) -> float:
        """Share of the best speed that a choice gives away."""
        best = max(self.truth[name] for name in self.truth.keys() - self.failing - self.excluded - self.lossy)
        return 1 - math.exp(self.truth[name] - best)


def _sample(candidate: str, order: LaunchOrder, pace: float, index: int) -> Sample:
    request = RequestTiming(prompt_tokens=8, output_tokens=3, ttft_s=pace, e2e_s=3 * pace, token_gaps_s=(pace, pace))
    return Sample(
        clock="host",
        duration_s=3 * pace,
        requests=(request,),
        launch=order.launch,
        round=order.round,
        candidate=candidate,
        scenario=KEY,
        index=index,
    )


@pytest.fixture
def begun(make_run: MakeRun) -> Callable[[Space], Run]:
    """A run in a space, before its first launch."""

    def begin(space: Space) -> Run:
        return replayed(make_run({}), space.entries())

    return begin


def replayed(run: Run, events: Iterable[Event]) -> Run:
    for event in events:
        run.add(event)
    return run


def searched(
    space: Space, run: Run, search: Race, before: str = "memory", most: int | None = None
) -> list[LaunchOrder]:
    """Carry out what the search orders, until the first launch for a purpose, or so many launches."""
    orders: list[LaunchOrder] = []
    while len(orders) != most and (order := search.next(run)) is not None and order.purpose != before:
        replayed(run, space.launched(order))
        orders.append(order)
    return orders


def screened(orders: Iterable[LaunchOrder]) -> list[str]:
    return [cell.candidate for order in orders if order.purpose == "screening" for cell in order.cells]


@pytest.mark.slow
def test_a_fifth_of_a_large_space_is_enough_to_find_the_best(begun: Callable[[Space], Run]) -> None:
    found = []
    for seed in range(4):
        space = Space(seed, failing=0.02)
        run = begun(space)
        orders = searched(space, run, Optuna(space.load_keys, seed))
        decision = decide(run)
        assert decision is not None
        assert len(space.settings) == 1024
        assert len(set(screened(orders))) <= 0.25 * 1024
        found.append(space.regret(decision.winner) <= 0.02)
    assert all(found)


def test_screening_ends_before_a_space_is_seen_through(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=1, knobs=4)
    run = begun(space)
    search = Optuna(space.load_keys, 1)
    foretold = search.remaining(run)
    orders = searched(space, run, search, before="timing")

    assert len(space.settings) == 256
    assert orders[0].purpose == "screening"
    assert orders[0].cells[0].candidate == space.incumbent
    assert [order.purpose for order in orders].count("pilot") == 4
    assert len(screened(orders)) == len(set(screened(orders))) <= 100
    assert len({cell.candidate[:2] for cell in orders[5].cells}) == 1
    assert len(orders) - 4 <= foretold


def test_a_space_too_small_to_leave_out_anybody_is_raced_alike(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=2, knobs=2)
    orders = [searched(space, begun(space), search(space.load_keys, 2)) for search in (Optuna, Race)]

    assert orders[0] == orders[1]
    assert len(orders[0]) > 0


def test_what_the_sampler_never_proposes_is_still_seen(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=3, knobs=3, excluded=0.5)
    run = begun(space)
    orders = searched(space, run, Optuna(space.load_keys, 3, Allowance()), before="timing")

    assert set(screened(orders)) == set(space.settings) - space.excluded
    assert search_is_over(run, space, 3)


def test_who_may_not_win_is_not_proposed_and_keeps_nobody_waiting(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=3, knobs=3, lossy=0.85)
    run = begun(space)
    orders = searched(space, run, Optuna(space.load_keys, 3), before="timing")

    assert len(space.settings) - len(space.lossy) < 24
    assert set(screened(orders)) == set(space.settings) - space.lossy
    assert search_is_over(run, space, 3)


def search_is_over(run: Run, space: Space, seed: int) -> bool:
    """Whether screening is: what comes next is the race."""
    order = Optuna(space.load_keys, seed).next(run)
    return order is not None and order.purpose == "timing"


def test_what_fails_is_not_proposed_again_and_who_came_after_it_is_next(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=4, knobs=4, failing=0.2)
    run = begun(space)
    orders = searched(space, run, Optuna(space.load_keys, 4), before="timing")
    steps = [order for order in orders if order.purpose == "screening"]

    ended_early = 0
    for order, following in itertools.pairwise(steps):
        names = [cell.candidate for cell in order.cells]
        end = next((rank for rank, name in enumerate(names) if name in space.failing), len(names))
        left = set(names[end + 1 :])
        if left:
            ended_early += 1
            assert {cell.candidate for cell in following.cells} == left
    assert ended_early > 0
    assert set(Counter(failed.cell.candidate for failed in run.failed).values()) == {1}


def test_what_cannot_be_recommended_is_not_proposed(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=5, knobs=4, lossy=0.5)
    orders = searched(space, begun(space), Optuna(space.load_keys, 5), before="timing")

    assert len(screened(orders)) == 100
    assert not space.lossy & set(screened(orders))


def test_equal_journals_give_equal_answers(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=6, knobs=4, failing=0.1)
    whole, again, other = (begun(space) for _ in range(3))
    orders = searched(space, whole, Optuna(space.load_keys, 6), before="timing")

    assert searched(space, again, Optuna(space.load_keys, 6), before="timing") == orders
    assert searched(space, other, Optuna(space.load_keys, 7), before="timing") != orders


def test_a_resumed_search_goes_on_as_if_it_had_not_been_stopped(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=8, knobs=4)
    run = begun(space)
    orders = searched(space, run, Optuna(space.load_keys, 8), before="timing")
    stopped = begun(space)
    searched(space, stopped, Optuna(space.load_keys, 8), most=7)

    assert searched(space, stopped, Optuna(space.load_keys, 8), before="timing") == orders[7:]


def test_a_launch_without_results_is_made_again(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=8, knobs=4)
    run = begun(space)
    done = searched(space, run, Optuna(space.load_keys, 8), most=7)
    lost = Optuna(space.load_keys, 8).next(run)
    assert lost is not None
    run.add(lost)
    rest = searched(space, run, Optuna(space.load_keys, 8), before="timing")

    assert next(set(order.cells) for order in rest if order.purpose == "screening") == set(lost.cells)
    assert Counter(screened([*done, *rest])).most_common(1)[0][1] == 1


def test_the_allowance_ends_screening_as_it_does_in_a_race(begun: Callable[[Space], Run]) -> None:
    space = Space(seed=9, knobs=4)
    orders = searched(space, begun(space), Optuna(space.load_keys, 9, Allowance(launches=12)), before="timing")

    assert [order.purpose for order in orders].count("screening") < 8


# Around it


def test_it_tunes(tmp_path: Path) -> None:
    plan = tune(TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro", search="optuna")).plan
    assert plan.require_winner().label == "cache=static"


def test_without_optuna_one_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for call in (tune, dry_run):
        with pytest.raises(UsageError, match=r'pip install "kvat-core\[optuna\]"'):
            call(TuneRequest(out=tmp_path / "out", model="fake:tiny", search="optuna"))
    assert not (tmp_path / "out").exists()


def test_other_searches_do_not_import_it() -> None:
    check = "import sys, kvat_core.search, kvat_core.tuner; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
