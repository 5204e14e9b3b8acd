from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvat_core.schema import Plan
from kvat_report import decision

INCUMBENT = {"id": "aaaaaaaaaa", "label": "dynamic, sdpa", "settings": {"cache": "dynamic"}}
ONE = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
KEEP = {"winner": INCUMBENT, "ratio": {"score": ONE, "ttft": ONE, "decode": ONE}}


def only(plan: Plan, *ids: str) -> list[Any]:
    return [plan.candidate(candidate_id).model_dump() for candidate_id in ids]


def test_better_names_winner_ratio_with_interval_and_incumbent(make_plan: Callable[..., Plan]) -> None:
    assert decision(make_plan()) == (
        "Better: switch to static, sdpa, whose score is 1.41× [1.37, 1.45] that of what you run today (dynamic, sdpa)."
    )


def test_a_switch_to_the_defaults_says_what_changes(make_plan: Callable[..., Plan]) -> None:
    defaults = {"id": "bbbbbbbbbb", "label": "default", "settings": {"cache": "static"}}
    assert decision(make_plan(winner=defaults)).startswith(
        "Better: switch to the engine's defaults (cache=static), whose score is 1.41×"
    )


def test_better_than_an_incumbent_that_failed(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    (incumbent,) = only(plan, "aaaaaaaaaa")
    incumbent |= {"state": "failed", "failure": {"kind": "oom_host", "phase": "load", "reason": "killed\nby limit"}}
    sentence = decision(make_plan(ratio=None, rules=[], candidates=[incumbent, *only(plan, "bbbbbbbbbb")]))
    assert sentence == (
        "Better: switch to static, sdpa; what you run today (dynamic, sdpa) has no figures to compare with: "
        "it failed with oom_host (killed by limit)."
    )


def test_tie_keeps_the_incumbent_and_says_why(make_plan: Callable[..., Plan]) -> None:
    assert decision(make_plan(verdict="tie", **KEEP)) == (
        "Tie: keep what you run today (dynamic, sdpa); the best alternative, static, sdpa, scores 1.41× [1.37, 1.45], "
        "and differences under 2.4 % are not claimed on this machine."
    )


def test_tie_without_an_alternative(make_plan: Callable[..., Plan]) -> None:
    alone = only(make_plan(), "aaaaaaaaaa", "9999999999", "dddddddddd")
    assert decision(make_plan(verdict="tie", rules=[], candidates=alone, **KEEP)) == (
        "Tie: keep what you run today (dynamic, sdpa); nothing else was measured that could replace it."
    )


def test_undecided_says_what_would_decide(make_plan: Callable[..., Plan]) -> None:
    assert decision(make_plan(verdict="undecided", **KEEP)) == (
        "Undecided: keep what you run today (dynamic, sdpa) for now; static, sdpa scores 1.41× [1.37, 1.45], "
        "which 3 launches cannot confirm: measure again with more launches in the profile."
    )


def test_a_partial_plan_says_that_it_is_one(make_plan: Callable[..., Plan]) -> None:
    whole, partial = decision(make_plan()), decision(make_plan(partial=True))
    assert partial == f"By what was measured before the run was ended: {whole}"
