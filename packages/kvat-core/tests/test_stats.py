"""Intervals, noise floor and probabilities behave as their definitions say."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core import stats

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
    ratio, again, inverse = stats.ratio(values), stats.ratio(shuffled), stats.ratio([-value for value in values])
    assert again.value == pytest.approx(ratio.value)
    assert inverse.value == pytest.approx(1 / ratio.value)
    assert ratio.low is not None
    assert inverse.high == pytest.approx(1 / ratio.low)


def test_the_interval_of_three_blocks_is_students() -> None:
    # mean 0, standard error 0.1/sqrt(3), t(2; 0.975) = 4.302653
    ratio = stats.ratio([-0.1, 0.0, 0.1])
    assert ratio.high == pytest.approx(math.exp(4.302653 * 0.1 / math.sqrt(3)), rel=1e-6)


def test_one_block_has_no_interval() -> None:
    assert stats.ratio([0.2]).low is None
    assert stats.ratio([0.2]).high is None
    assert stats.probability_above([5.0], 0.0) == 0.5


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    source = random.Random(7)
    worlds = 2000
    covered = 0
    for _ in range(worlds):
        ratio = stats.ratio([0.05 + source.gauss(0, 0.02) for _ in range(4)])
        covered += ratio.low is not None and ratio.high is not None and ratio.low <= math.exp(0.05) <= ratio.high
    assert 0.935 <= covered / worlds <= 0.965


def test_the_noise_floor_is_the_spread_without_candidate_and_block_effects() -> None:
    source = random.Random(3)
    rows = [[rank * 0.5 + block * 0.3 + source.gauss(0, 0.02) for block in range(40)] for rank in range(5)]
    assert stats.noise_floor(rows) == pytest.approx(0.02, rel=0.15)
    exact = [[rank * 0.5 + block * 0.3 for block in range(4)] for rank in range(5)]
    assert stats.noise_floor(exact) == pytest.approx(0, abs=1e-12)


def test_the_noise_floor_of_a_single_candidate_is_the_spread_of_its_launches() -> None:
    assert stats.noise_floor([[0.0, 0.1]]) == pytest.approx(0.1 / math.sqrt(2))
    assert stats.noise_floor([[0.4]]) == 0
    assert stats.noise_floor([]) == 0


@given(st.lists(logs, min_size=2, max_size=8), logs, logs)
def test_a_higher_threshold_is_never_more_probable(values: list[float], one: float, other: float) -> None:
    low, high = sorted([one, other])
    assert stats.probability_above(values, low) >= stats.probability_above(values, high) - 1e-12
