"""The definitions of the metrics, by hand-made timelines."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core import metrics
from kvat_core.schema import RequestTiming, Sample, Scenario, Timeline


def request(ttft_s: float, gaps_s: tuple[float, ...], **changes: Any) -> RequestTiming:
    fields = {
        "prompt_tokens": 8,
        "output_tokens": len(gaps_s) + 1,
        "ttft_s": ttft_s,
        "e2e_s": ttft_s + sum(gaps_s),
        "token_gaps_s": gaps_s,
    }
    return RequestTiming.model_validate({**fields, **changes})


def sample(*requests: RequestTiming) -> Sample:
    return Sample(
        clock="host", duration_s=9.0, requests=requests, launch=0, round=0, candidate="c", scenario="s", index=0
    )


def test_of_one_request() -> None:
    one = sample(request(0.5, (0.1, 0.1, 0.2)))
    assert metrics.ttft_s(one) == 0.5
    assert metrics.tpot_s(one) == pytest.approx(0.4 / 3)
    assert metrics.decode_tps(one) == pytest.approx(3 / 0.4)
    assert metrics.e2e_s(one) == pytest.approx(0.9)


def test_of_a_batch_the_decode_rate_counts_all_streams() -> None:
    batch = sample(request(0.5, (0.1, 0.1)), request(0.5, (0.1, 0.1)))
    assert metrics.decode_tps(batch) == pytest.approx(4 / 0.2)
    assert metrics.tpot_s(batch) == pytest.approx(0.1)


@given(
    calls=st.lists(
        st.tuples(st.floats(0.1, 9), st.lists(st.floats(0.01, 9), min_size=1, max_size=9), st.integers(1, 9)),
        min_size=1,
        max_size=3,
    )
)
def test_requests_that_are_told_once_count_as_often_as_there_are(calls: list[tuple[float, list[float], int]]) -> None:
    once = sample(*(request(ttft_s, tuple(gaps_s), count=count) for ttft_s, gaps_s, count in calls))
    each = sample(*(request(ttft_s, tuple(gaps_s)) for ttft_s, gaps_s, count in calls for _ in range(count)))
    assert metrics.batch_size(once) == metrics.batch_size(each) == len(each.requests)
    for metric in (metrics.ttft_s, metrics.tpot_s, metrics.decode_tps, metrics.e2e_s, metrics.jitter):
        assert metric(once) == pytest.approx(metric(each))


def test_jitter_is_p95_over_p50_and_unknown_without_gaps() -> None:
    assert metrics.jitter(sample(request(0.5, (0.1,) * 19 + (0.3,)))) == pytest.approx(1.0)
    assert metrics.jitter(sample(request(0.5, (0.1,) * 18 + (0.3, 0.3)))) == pytest.approx(3.0)
    assert metrics.jitter(sample(request(0.5, (0.1,), token_gaps_s=None))) is None
    assert metrics.jitter(sample(request(0.5, (0.0, 0.0, 0.3)))) is None


SCENARIO = Scenario(prompt_tokens=8, output_tokens=3)
GOOD = request(0.5, (0.1, 0.1))


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ((GOOD,), None),
        ((request(0.5, (0.1, 0.1), token_gaps_s=None),), None),
        ((GOOD, GOOD), "2 requests instead of 1"),
        ((request(0.5, (0.1, 0.1), count=2),), "2 requests instead of 1"),
        ((request(0.5, (0.1, 0.1), prompt_tokens=7),), "7 prompt tokens instead of 8"),
        ((request(0.5, (0.1,)),), "2 output tokens instead of 3"),
        ((request(0.5, (0.1, 0.1), token_gaps_s=(0.2,)),), "1 token gaps for 3 tokens"),
        ((request(math.nan, (0.1, 0.1)),), "times that are negative or not finite"),
        ((request(0.5, (0.3, -0.1)),), "times that are negative or not finite"),
        ((request(0.5, (0.1, math.inf)),), "times that are negative or not finite"),
        ((request(0.0, (0.1, 0.1)),), "a last token that is not after the first"),
        ((request(0.5, (0.0, 0.0)),), "a last token that is not after the first"),
    ],
)
def test_nonsense_is_named(requests: tuple[RequestTiming, ...], reason: str | None) -> None:
    timeline = Timeline(clock="host", duration_s=1.0, requests=requests)
    assert metrics.invalid_reason(timeline, SCENARIO) == reason
