from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from kvat_core.schema import FidelityLimits, FidelityResult, Plan
from kvat_report import output

MakePlan = Callable[..., Plan]

FIGURES: dict[str, Any] = {"kl_nats": 0.00423, "top1_agreement": 0.9938, "tokens": 512}
IN_WORDS = "(over 512 forced tokens of text, KL 0.0042 nats, first choices agree in 99.3 %)"


@pytest.fixture
def of_winner(make_plan: MakePlan) -> Callable[..., Plan]:
    """A plan whose winner was found to be so."""

    def make(canary: str | None = None, **fidelity: Any) -> Plan:
        plan = make_plan(canary=canary)
        told = FidelityResult(**fidelity)
        candidates = (
            one.model_copy(update={"fidelity": told}) if one.id == plan.require_winner().id else one
            for one in plan.candidates
        )
        return plan.model_copy(update={"candidates": tuple(candidates)})

    return make


def test_nothing_is_told_where_nobody_looked(of_winner: Callable[..., Plan]) -> None:
    assert output(of_winner()) is None
    assert output(of_winner(reason="the run did not come to it")) is None


@pytest.mark.parametrize("verdict", ["exact", "close", "lossy"])
def test_a_verdict_is_told_with_its_figures(of_winner: Callable[..., Plan], verdict: str) -> None:
    assert output(of_winner(verdict=verdict, **FIGURES)) == f"{verdict} {IN_WORDS}"


def test_closeness_is_told_with_the_limits_in_force(of_winner: Callable[..., Plan]) -> None:
    limits = FidelityLimits(kl_nats=0.03, top1_agreement=0.9699)
    plan = of_winner(verdict="close", **FIGURES).model_copy(update={"fidelity_limits": limits})
    assert output(plan) == f"close {IN_WORDS}; allowed were KL 0.03 nats, and first choices that agree in 97 %"
    exact = of_winner(verdict="exact", **FIGURES).model_copy(update={"fidelity_limits": limits})
    assert output(exact) == f"exact {IN_WORDS}"


def test_random_weights_are_named_as_what_makes_figures_meaningless(of_winner: Callable[..., Plan]) -> None:
    told = output(of_winner(verdict="not_meaningful", **FIGURES))
    assert told == f"not meaningful, as the weights are random {IN_WORDS}"


def test_the_reference_itself_has_no_figures(of_winner: Callable[..., Plan]) -> None:
    assert output(of_winner(verdict="exact")) == "exact, as it computes what others are held against"


@pytest.mark.parametrize(
    ("canary", "words"),
    [
        ("clean", "what earlier requests said changes no answer"),
        ("undetermined", "whether what earlier requests said changes an answer could not be told"),
    ],
)
def test_the_canary_is_told_after_the_verdict_or_alone(of_winner: Callable[..., Plan], canary: str, words: str) -> None:
    assert output(of_winner(canary)) == words
    assert output(of_winner(canary, verdict="close", **FIGURES)) == f"close {IN_WORDS}; {words}"


def test_no_plan_says_of_its_winner_that_it_leaks(make_plan: MakePlan) -> None:
    with pytest.raises(ValidationError, match="canary"):
        make_plan(canary="leak")


def test_without_a_winner_there_is_nothing_to_tell(make_plan: MakePlan) -> None:
    miss = {
        "name": "max_ttft_s", "limit": 0.3, "percentile": 95.0, "scenario": "2048+128x1", "observed": 0.41,
        "verdict": "fail", "missed_by": 0.37, "reason": "misses TTFT p95 ≤ 300 ms by 37 %",
    }  # fmt: skip
    plan = make_plan(
        verdict="infeasible", winner=None, ratio=None, confidence=None, metrics=None, rules=[],
        closest=[{"id": "aaaaaaaaaa", "label": "dynamic, sdpa", "misses": [miss]}],
    )  # fmt: skip
    assert output(plan) is None
