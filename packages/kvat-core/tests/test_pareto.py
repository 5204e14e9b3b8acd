"""Who stays on the front: noise and unknown figures remove nobody, a difference that is shown does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core.pareto import MEMORY_STEP_BYTES, Objectives, pareto_front
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import JournalRef

MakeRun = Callable[..., Run]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
WOBBLE = (0.001, -0.002, 0.0015, -0.0005, 0.0, 0.0005)
GIB = 2**30


def speeds(
    ttft: float, decode: float, *, wobble: Sequence[float] = WOBBLE, peak: int | None = None, context: int | None = None
) -> Objectives:
    return Objectives(
        ttft={block: ttft + one for block, one in enumerate(wobble)},
        decode={block: decode - one for block, one in enumerate(wobble)},
        peak_bytes=peak,
        context_tokens=context,
    )


def still(ttft: float, decode: float, *, peak: int | None = None, context: int | None = None) -> Objectives:
    return speeds(ttft, decode, wobble=(0.0,) * 6, peak=peak, context=context)


def test_who_is_slower_in_both_is_dominated() -> None:
    shifted = (*WOBBLE[1:], WOBBLE[0])
    assert pareto_front({"slow": speeds(0.0, 0.0), "fast": speeds(0.5, 0.5, wobble=shifted)}) == ("fast",)


def test_who_is_ahead_in_one_stays() -> None:
    front = {"prompt": speeds(0.5, 0.0), "token": speeds(0.0, 0.5), "neither": speeds(-0.1, -0.1)}
    assert pareto_front(front) == ("prompt", "token")


@pytest.mark.parametrize(
    ("better", "front"),
    [
        ({"ttft": 0.02}, ("other", "better")),
        ({"ttft": 0.04}, ("better",)),
        ({"decode": 0.009}, ("other", "better")),
        ({"decode": 0.011}, ("better",)),
        ({"peak": GIB - MEMORY_STEP_BYTES}, ("other", "better")),
        ({"peak": GIB - MEMORY_STEP_BYTES - 1}, ("better",)),
        ({"context": 1010}, ("other", "better")),
        ({"context": 1011}, ("better",)),
    ],
)
def test_only_a_difference_that_matters_dominates(better: dict[str, float], front: tuple[str, ...]) -> None:
    base = {"ttft": 0.0, "decode": 0.0, "peak": GIB, "context": 1000}
    assert pareto_front({"other": still(**base), "better": still(**{**base, **better})}) == front  # type: ignore[arg-type]


def test_what_costs_memory_or_context_does_not_dominate() -> None:
    assert pareto_front({"a": still(0, 0, peak=GIB), "b": still(1, 1, peak=GIB + 1)}) == ("a", "b")
    assert pareto_front({"a": still(0, 0, context=9), "b": still(1, 1, context=8)}) == ("a", "b")


def test_what_is_unknown_of_one_is_not_compared() -> None:
    assert pareto_front({"a": still(0, 0, peak=GIB), "b": still(1, 1)}) == ("b",)


def test_one_block_and_no_common_block_remove_nobody() -> None:
    one = {name: speeds(pace, pace, wobble=(0.0,)) for name, pace in {"slow": 0.0, "fast": 1.0}.items()}
    apart = Objectives(ttft={7: 1.0, 8: 1.0}, decode={7: 1.0, 8: 1.0})
    assert pareto_front(one) == ("slow", "fast")
    assert pareto_front({"slow": still(0, 0), "apart": apart}) == ("slow", "apart")


def ahead_by(standard_errors: float) -> dict[str, Objectives]:
    """One candidate, and one that is as many standard errors ahead in both speeds, over six blocks."""
    spread = math.sqrt(5) / standard_errors
    noisy = {block: 1.0 + (spread if block % 2 else -spread) for block in range(6)}
    return {"behind": still(0.0, 0.0), "ahead": Objectives(ttft=noisy, decode=noisy)}


def test_all_comparisons_share_the_level() -> None:
    others = {str(number): still(-5.0 - number, 5.0 + number) for number in range(8)}
    assert pareto_front(ahead_by(5.5)) == ("ahead",)
    assert pareto_front({**ahead_by(5.5), **others})[:2] == ("behind", "ahead")
    assert pareto_front(ahead_by(3.4)) == ("behind", "ahead")


def test_to_be_ahead_in_one_thing_is_not_enough_where_another_is_not_shown() -> None:
    """Half the memory, and decoding that is faster in most blocks, but not in all."""
    under = still(0.0, 0.0, peak=2 * GIB)
    decode = {block: 0.1 if block else -0.2 for block in range(6)}
    assert pareto_front({"under": under, "over": replace(still(0.0, 0.0, peak=GIB), decode=decode)}) == (
        "under",
        "over",
    )
    assert pareto_front({"under": under, "over": still(0.0, 0.1, peak=GIB)}) == ("over",)


def test_noise_alone_removes_nobody() -> None:
    """Equal candidates, over many runs: all but few of the runs keep every one of them."""
    chance = random.Random(7)

    def equal() -> Objectives:
        ttft, decode = ({block: chance.gauss(0.0, 0.05) for block in range(6)} for _ in range(2))
        return Objectives(ttft=ttft, decode=decode)

    runs = [{str(number): equal() for number in range(8)} for _ in range(60)]
    assert sum(pareto_front(run) != tuple(run) for run in runs) <= 3


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 8)), min_size=1, max_size=6))
def test_somebody_always_stays_and_so_does_one_that_needs_least_memory(
    figures: list[tuple[float, float, int]],
) -> None:
    measured = {
        str(number): still(ttft, decode, peak=peak * GIB) for number, (ttft, decode, peak) in enumerate(figures)
    }
    front = pareto_front(measured)
    least = min(one.peak_bytes or 0 for one in measured.values())
    assert front
    assert set(front) & {name for name, one in measured.items() if one.peak_bytes == least}


def test_a_plan_names_its_front_with_the_winner_first(make_run: MakeRun) -> None:
    paces = {"today": 1.0, "slow": 2.0, "fast": 0.5, "lossy": 0.1}
    blocks = {name: [pace * noise for noise in (1.0, 1.001, 0.999, 1.0005)] for name, pace in paces.items()}
    peaks = {"today": GIB, "slow": 2 * GIB, "fast": 4 * GIB}
    plan = make_plan(make_run(blocks, lossy=["lossy"], peaks=peaks), REF)
    assert plan.pareto == ("fast", "today")
