"""Batches of unequal prompts: lengths, names, what a run makes of them, and that each request is told as its own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvat_core import metrics
from kvat_core.errors import UsageError
from kvat_core.profiles import fit
from kvat_core.schema import Objective, Profile, RequestTiming, Sample, Scenario, Timeline

UNEQUAL = Scenario(prompt_tokens=512, output_tokens=64, batch_size=4, shortest_prompt_tokens=128)


def profile(*scenarios: Scenario) -> Profile:
    return Profile(name="mine", scenarios=scenarios, objective=Objective(ttft=1, decode=1), launches=2, samples=2)


def fitted(of: Profile, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "preset": True,
        "contexts": (),
        "batches": (),
        "shortest_prompt_tokens": None,
        "max_context_tokens": None,
    }
    return [scenario.key for scenario in fit(of, **{**options, **changes})[0].scenarios]


def test_lengths_are_spread_evenly_up_to_the_longest() -> None:
    assert UNEQUAL.prompt_lengths == (128, 256, 384, 512)
    assert UNEQUAL.model_copy(update={"shortest_prompt_tokens": None}).prompt_lengths == (512,) * 4
    assert UNEQUAL.total_tokens == 576


@given(longest=st.integers(2, 9999), batch=st.integers(2, 99), shortest=st.integers(1, 9998))
def test_a_name_stands_for_one_shape(longest: int, batch: int, shortest: int) -> None:
    equal = Scenario(prompt_tokens=longest, output_tokens=8, batch_size=batch)
    assert equal.key == f"{longest}+8x{batch}"
    shapes = [equal]
    if shortest < longest:
        shapes.append(equal.model_copy(update={"shortest_prompt_tokens": shortest}))
        lengths = shapes[-1].prompt_lengths
        assert (lengths[0], lengths[-1], len(lengths)) == (shortest, longest, batch)
        assert list(lengths) == sorted(lengths)
    assert [Scenario.of_key(shape.key) for shape in shapes] == shapes
    assert len({shape.key for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("wrong", [{"batch_size": 1}, {"shortest_prompt_tokens": 512}, {"shortest_prompt_tokens": 0}])
def test_only_a_batch_has_a_shortest_prompt(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="shortest_prompt_tokens"):
        Scenario.model_validate({**UNEQUAL.model_dump(), **wrong})


def test_the_shortest_keeps_its_share_of_the_longest() -> None:
    of = profile(UNEQUAL)
    assert fitted(of) == ["512+64x4from128"]
    assert fitted(of, contexts=(1024, 2)) == ["2+64x4from1", "1024+64x4from256"]
    assert fitted(of, batches=(1, 8)) == ["512+64x1", "512+64x8from128"]
    assert fitted(of, max_context_tokens=320) == ["256+64x4from64"]


def test_every_batch_gets_the_shortest_that_was_asked_for() -> None:
    of = profile(Scenario(prompt_tokens=64, output_tokens=8))
    assert fitted(of, batches=(1, 4), shortest_prompt_tokens=16) == ["64+8x1", "64+8x4from16"]
    with pytest.raises(UsageError, match="every batch size is 1; ask for larger ones with --batch"):
        fitted(of, shortest_prompt_tokens=16)
    with pytest.raises(UsageError, match="--shortest 64 is not less than the 64 prompt tokens of a scenario"):
        fitted(of, batches=(4,), shortest_prompt_tokens=64)


def told(*lengths: tuple[int, int]) -> Timeline:
    requests = [
        RequestTiming(
            prompt_tokens=tokens, output_tokens=3, ttft_s=1.0, e2e_s=2.0, token_gaps_s=(0.5, 0.5), count=count
        )
        for tokens, count in lengths
    ]
    return Timeline(clock="host", duration_s=2.0, requests=tuple(requests))


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([(4, 1), (6, 1), (8, 1)], None),
        ([(8, 1), (4, 1), (6, 1)], None),  # in any order
        ([(8, 3)], "8 prompt tokens instead of 4"),
        ([(4, 2), (8, 1)], "4 prompt tokens instead of 6"),
        ([(4, 1), (8, 1)], "2 requests instead of 3"),
    ],
)
def test_each_request_has_its_own_prompt_tokens(lengths: list[tuple[int, int]], reason: str | None) -> None:
    scenario = Scenario(prompt_tokens=8, output_tokens=3, batch_size=3, shortest_prompt_tokens=4)
    assert metrics.invalid_reason(told(*lengths), scenario) == reason


def test_a_run_measures_what_it_says(command: Any) -> None:
    scenario = Scenario(prompt_tokens=32, output_tokens=3, batch_size=3, shortest_prompt_tokens=8)
    run = command(profile=profile(scenario))
    plan = run.run().plan
    samples = [event for event in run.events() if isinstance(event, Sample)]
    assert {sample.scenario for sample in samples} == {"32+3x3from8"}
    assert {tuple(request.prompt_tokens for request in sample.requests) for sample in samples} == {(8, 20, 32)}
    results = [result for candidate in plan.candidates for result in candidate.scenarios]
    assert results
    assert {result.key for result in results} == {"32+3x3from8"}
    assert "32+3x3from8" in (run.out / "report.md").read_text()
