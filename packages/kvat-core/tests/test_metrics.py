"""The definitions of the metrics, by hand-made timelines."""

from __future__ import annotations

import math
from typing import Any

import pytest

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
