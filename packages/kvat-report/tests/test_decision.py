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


def limit(verdict: str, reason: str) -> dict[str, Any]:
    """A limit of TTFT as it was judged."""
    figures = {"limit": 0.3, "percentile": 95, "scenario": "8+3x1", "observed": 0.4, "missed_by": None}
    return {"name": "max_ttft_s", "verdict": verdict, "reason": reason, **figures}


def with_limits(plan: Plan, today: str, winner: str) -> list[Any]:
    incumbent, chosen, *others = only(plan, "aaaaaaaaaa", "bbbbbbbbbb", "9999999999")
    incumbent["limits"], chosen["limits"] = [limit(today, f"{today}s it")], [limit(winner, f"{winner}s it")]
    return [incumbent, chosen, *others]


def test_a_winner_for_the_sake_of_limits_says_which(make_plan: Callable[..., Plan]) -> None:
    for today, winner in (("fail", "pass"), ("fail", "undecided"), ("undecided", "pass")):
        sentence = decision(make_plan(candidates=with_limits(make_plan(), today, winner), rules=[], pareto=[]))
        assert sentence == (
            f"Better: switch to static, sdpa, as what you run today (dynamic, sdpa) {today}s it; its score is "
            "1.41× [1.37, 1.45] that of today."
        )


def test_limits_that_do_not_speak_against_today_change_nothing(make_plan: Callable[..., Plan]) -> None:
    for both in ("pass", "undecided"):
        assert decision(make_plan(candidates=with_limits(make_plan(), both, both), rules=[], pareto=[])) == decision(
            make_plan()
        )


def test_infeasible_names_the_closest_and_what_it_misses(make_plan: Callable[..., Plan]) -> None:
    near = {
        "id": "bbbbbbbbbb",
        "label": "static,\nsdpa",
        "misses": [limit("fail", "misses it"), limit("fail", "misses that")],
    }
    plan = make_plan(winner=None, verdict="infeasible", ratio=None, confidence=None, metrics=None, closest=[near])
    assert decision(plan) == (
        "Infeasible: no candidate keeps the limits; the closest, static, sdpa, misses it and misses that."
    )


def test_a_tie_without_anything_faster_says_so(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    slower = {"value": 0.88, "low": 0.8, "high": 0.95, "n": 6}
    candidates = [
        one.model_dump() | ({"score": slower} if one.score is not None and one.id != plan.incumbent.id else {})
        for one in plan.candidates
    ]
    sentence = decision(make_plan(verdict="tie", winner=plan.incumbent, candidates=candidates))
    assert "no alternative is faster: the best of them, " in sentence
    assert "scores 0.88×" in sentence
    assert "after 6 launches no alternative seems faster" in decision(
        make_plan(verdict="undecided", winner=plan.incumbent, candidates=candidates)
    )
