"""Intervals, spreads and probabilities behave as their definitions say."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core import stats
from kvat_core.stats import Comparison, Spread

positive = st.floats(min_value=1e-6, max_value=1e6)
logs = st.floats(min_value=-3, max_value=3)


@given(st.lists(positive, min_size=1, max_size=12))
def test_an_estimate_is_the_median_within_its_interval(values: list[float]) -> None:
    estimate = stats.estimate(values)
    assert estimate.median == median(values)
    assert estimate.low <= estimate.median <= estimate.high
    assert estimate.n == len(values)


@given(st.lists(logs, min_size=2, max_size=12), st.randoms())
def test_a_ratio_depends_neither_on_order_nor_on_direction(values: list[float], shuffler: random.Random) -> None:
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    ratio, again, inverse = (stats.compare(one).ratio() for one in (values, shuffled, [-value for value in values]))
    assert again.value == pytest.approx(ratio.value)
    assert inverse.value == pytest.approx(1 / ratio.value)
    assert ratio.low is not None
    assert inverse.high == pytest.approx(1 / ratio.low)


def test_the_interval_of_three_blocks_is_students() -> None:
    # mean 0, standard error 0.1/sqrt(3), t(2; 0.975) = 4.302653
    ratio = stats.compare([-0.1, 0.0, 0.1]).ratio()
    assert ratio.high == pytest.approx(math.exp(4.302653 * 0.1 / math.sqrt(3)), rel=1e-6)


def test_borrowed_degrees_of_freedom_count_as_those_of_its_own() -> None:
    # (8 * 0.04 + 2 * 0.01) / 10 = 0.034, t(10; 0.975) = 2.228139
    found = stats.compare([-0.1, 0.0, 0.1], Spread(variance=0.04, df=8))
    assert found.df == 10
    assert found.error == pytest.approx(math.sqrt(0.034 / 3))
    assert found.high() == pytest.approx(2.228139 * math.sqrt(0.034 / 3), rel=1e-6)


def test_what_others_tell_is_what_is_left_without_the_pair_itself() -> None:
    own = [-0.1, 0.0, 0.1]  # variance 0.01, two degrees of freedom
    left = stats.without(Spread(variance=0.04, df=6), own)
    assert left is not None
    assert (left.variance, left.df) == pytest.approx(((6 * 0.04 - 2 * 0.01) / 4, 4))
    assert stats.without(Spread(variance=0.04, df=2), own) is None
    assert stats.without(Spread(variance=0.04, df=2), [0.1]) == Spread(variance=0.04, df=2)


def test_without_any_block_nothing_is_known() -> None:
    found = stats.compare([], Spread(variance=0.04, df=6))
    assert (found.error, found.n, found.probability_above(0.5)) == (None, 0, 0.5)


def test_one_block_has_no_interval_unless_others_tell_of_the_spread() -> None:
    alone = stats.compare([0.2])
    assert (alone.error, alone.ratio().low, alone.ratio().high) == (None, None, None)
    assert alone.probability_above(-5.0) == 0.5
    told = stats.compare([0.2], Spread(variance=0.01, df=6))
    assert told.error == pytest.approx(0.1)
    assert told.probability_above(0.0) > 0.95


@pytest.mark.parametrize("borrowed", [None, Spread(variance=2 * 0.02**2, df=8)])
def test_intervals_cover_the_truth_as_often_as_they_say(borrowed: Spread | None) -> None:
    source = random.Random(7)
    worlds = 2000
    covered = 0
    for _ in range(worlds):
        pairs = [0.05 + source.gauss(0, 0.02) - source.gauss(0, 0.02) for _ in range(4)]
        ratio = stats.compare(pairs, borrowed).ratio()
        covered += ratio.low is not None and ratio.high is not None and ratio.low <= math.exp(0.05) <= ratio.high
    # What is borrowed here is the truth, so the interval is a little too wide.
    assert 0.935 <= covered / worlds <= 0.99


def test_pairs_of_equally_noisy_candidates_tell_their_spread() -> None:
    source = random.Random(3)
    rows = [[rank * 0.5 + block * 0.3 + source.gauss(0, 0.02) for block in range(40)] for rank in range(5)]
    pairs = [[a - b for a, b in zip(rows[i], rows[j], strict=True)] for i in range(5) for j in range(i)]
    spread = stats.pooled(pairs)
    assert spread is not None
    assert math.sqrt(spread.variance / 2) == pytest.approx(0.02, rel=0.15)
    assert spread.df == pytest.approx(4 * 39)
    assert stats.compare([0.1], spread).df == stats.MOST_BORROWED
    three = stats.pooled([pair[:3] for pair in pairs[:3]])
    assert three is not None
    assert three.df == pytest.approx(4)  # three candidates in three blocks: (3 - 1) (3 - 1)
    assert stats.pooled([[0.1], []]) is None


def test_a_spread_that_is_known_from_few_launches_is_taken_for_larger() -> None:
    # t(2; 0.975) = 4.302653, t(10; 0.975) = 2.228139, and the normal quantile is 1.959964.
    assert stats.allowance_for_few(2) == pytest.approx(4.302653 / 1.959964, rel=1e-6)
    assert stats.allowance_for_few(10) == pytest.approx(2.228139 / 1.959964, rel=1e-6)


def test_the_spread_of_launches_is_without_their_drift() -> None:
    source = random.Random(5)
    drifting = [0.01 * number + source.gauss(0, 0.02) for number in range(400)]
    assert stats.launch_spread(drifting) == pytest.approx(0.02, rel=0.2)
    assert stats.launch_spread([0.4]) == 0
    assert stats.launch_spread([]) == 0


@given(st.lists(logs, min_size=2, max_size=8), logs, logs)
def test_a_higher_threshold_is_never_more_probable(values: list[float], one: float, other: float) -> None:
    low, high = sorted([one, other])
    found = stats.compare(values)
    assert found.probability_above(low) >= found.probability_above(high) - 1e-12


def rival(mean: float, error: float | None = 0.01) -> Comparison:
    return Comparison(mean, error, 12.0, 5)


def test_the_chance_that_nobody_is_ahead_is_that_of_the_only_rival() -> None:
    only = rival(0.005)
    together = stats.probability_of_none_above([only], 0.01, "a")
    assert together == pytest.approx(1 - only.probability_above(0.01), abs=0.015)


def test_rivals_that_share_the_noise_of_the_winner_are_not_independent() -> None:
    one = stats.probability_of_none_above([rival(0.0)], 0.0, "a")
    five = stats.probability_of_none_above([rival(0.0)] * 5, 0.0, "a")
    # Of six equal ones each is the best as often as the others: one in six, and not one in 32.
    assert one == pytest.approx(1 / 2, abs=0.02)
    assert five == pytest.approx(1 / 6, abs=0.02)


def test_draws_are_the_same_for_the_same_seed_and_what_is_sure_needs_none() -> None:
    rivals = [rival(0.0), rival(-0.01)]
    assert stats.probability_of_none_above(rivals, 0.0, "a") == stats.probability_of_none_above(rivals, 0.0, "a")
    assert stats.probability_of_none_above([rival(0.5, 0.0)], 0.1, "a") == 0
    assert stats.probability_of_none_above([rival(-0.5, 0.0), rival(-9.0)], 0.1, "a") == 1
    assert stats.probability_of_none_above([rival(0.0, None)], 0.1, "a") == 0.5
    assert stats.probability_of_none_above([], 0.1, "a") == 1
