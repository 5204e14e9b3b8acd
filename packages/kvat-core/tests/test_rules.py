"""Fallbacks: which rules the measured alternatives give, and what a plan makes of them in a situation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvat_core.errors import NothingFeasible
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import (
    CandidateResult,
    Cell,
    Condition,
    Failed,
    Failure,
    FirstCall,
    JournalRef,
    LaunchOrder,
    MaxContext,
    Measured,
    Objective,
    Plan,
    Profile,
    RequestTiming,
    Resources,
    Rule,
    Sample,
    Scenario,
    Situation,
    needed_bytes,
)

MakeRun = Callable[..., Run]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
GIB = 2**30
NEAR = [1.0, 1.01, 0.99]


def paces(pace: float) -> list[float]:
    return [pace * one for one in NEAR]


def whens(plan: Plan) -> list[dict[str, object]]:
    return [rule.model_dump(mode="json")["when"] for rule in plan.rules]


def use(plan: Plan, **situation: Any) -> str:
    return plan.resolve(Situation(**situation)).id


# The condition ------------------------------------------------------------------------------------


def test_a_condition_is_in_json_what_it_was_made_of() -> None:
    when = {"device_memory_free_below": 6200000000}
    assert Condition.model_validate(when).model_dump(mode="json") == when
    rule = Rule(when=Condition.model_validate(when), use="a", because="b")
    assert Rule.model_validate_json(rule.model_dump_json()) == rule


@pytest.mark.parametrize("when", [{}, {"moon_phase": 1}, {"batch_above": -1}, {"feature_missing": "flash"}])
def test_a_condition_that_means_nothing_is_refused(when: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Condition.model_validate(when)


@pytest.mark.parametrize(
    ("when", "holds", "does_not"),
    [
        ({"device_memory_free_below": 5}, {"device_memory_free_bytes": 4}, {"device_memory_free_bytes": 5}),
        ({"host_memory_free_below": 5}, {"host_memory_free_bytes": 4}, {"host_memory_free_bytes": 5}),
        ({"prompt_longer_than": 5}, {"prompt_tokens": 6}, {"prompt_tokens": 5}),
        ({"prompt_at_most": 5}, {"prompt_tokens": 5}, {"prompt_tokens": 6}),
        ({"batch_above": 5}, {"batch_size": 6}, {"batch_size": 5}),
        ({"batch_at_most": 5}, {"batch_size": 5}, {"batch_size": 6}),
        ({"feature_missing": "a=b"}, {"missing_features": ("a=b",)}, {"missing_features": ("a=c",)}),
        ({"error_kind": "oom_device"}, {"error_kind": "oom_device"}, {"error_kind": "crash"}),
        ({"requests_below": 5}, {"requests": 4}, {"requests": 5}),
        ({"batch_above": 1, "requests_below": 5}, {"batch_size": 2, "requests": 4}, {"batch_size": 2, "requests": 5}),
    ],
)
def test_a_condition_holds_if_all_its_keys_do(
    when: dict[str, object], holds: dict[str, Any], does_not: dict[str, Any]
) -> None:
    condition = Condition.model_validate(when)
    assert condition.holds(Situation(**holds))
    assert not condition.holds(Situation(**does_not))
    assert not condition.holds(Situation())


def test_a_rule_about_nobody_is_no_plan(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": NEAR}), REF).model_dump()
    stray = {"when": {"batch_above": 1}, "use": "nobody", "because": "of a typo"}
    with pytest.raises(ValidationError, match="a rule uses 'nobody', which is no candidate of the plan"):
        Plan.model_validate({**plan, "rules": [stray]})


# Memory -------------------------------------------------------------------------------------------


@pytest.fixture
def ladder(make_run: MakeRun) -> Plan:
    """Four candidates of which each needs less memory than the faster ones, but for the one nobody should take."""
    paces_of = {"today": paces(1.0), "fast": paces(0.5), "bad": paces(1.5), "small": paces(2.0)}
    peaks = {"today": 6 * GIB, "fast": 8 * GIB, "bad": 7 * GIB, "small": 2 * GIB}
    return make_plan(make_run(paces_of, peaks=peaks), REF)


def test_ever_less_memory_is_a_ladder_of_ever_smaller_candidates(ladder: Plan) -> None:
    of_memory = [rule for rule in ladder.rules if rule.when.host_memory_free_below]
    assert [(rule.when.host_memory_free_below, rule.use) for rule in of_memory] == [
        (needed_bytes(8 * GIB), "today"),
        (needed_bytes(6 * GIB), "small"),
    ]
    assert of_memory[0].because == "at its peak, today takes 6.00 GiB of host memory, fast 8.00 GiB"
    assert of_memory[0].evidence == {
        "peak_host_bytes": 6 * GIB,
        "instead_of_peak_host_bytes": 8 * GIB,
        "score": pytest.approx(1.0),
    }


@pytest.mark.parametrize(("gib", "expected"), [(9, "fast"), (8.2, "today"), (7, "today"), (6, "small"), (1, "small")])
def test_the_best_that_fits_is_used(ladder: Plan, gib: float, expected: str) -> None:
    assert use(ladder, host_memory_free_bytes=int(gib * GIB)) == expected


def test_who_ran_out_of_memory_is_followed_by_the_next_smaller_one(ladder: Plan) -> None:
    assert use(ladder, error_kind="oom_host") == "today"
    assert use(ladder, error_kind="oom_host", host_memory_free_bytes=3 * GIB) == "small"
    # What ended so is not tried again, as long as there is another one.
    assert (
        use(ladder, error_kind="crash")
        == max(
            (one for one in ladder.candidates if one.eligible and one.id != "fast"), key=lambda one: one.score.value
        ).id
    )


def test_where_the_device_has_memory_of_its_own_that_is_compared(make_run: MakeRun) -> None:
    run = make_run({"today": paces(1.0), "fast": paces(0.5)})
    for number, (name, peak) in enumerate({"today": 2 * GIB, "fast": 8 * GIB}.items(), 1):
        cell = Cell(candidate=name, scenario="8+3x1")
        run.add(LaunchOrder(launch=number, round=9, purpose="memory", cells=(cell,)))
        resources = Resources(processes=("worker",), peak_host_bytes=GIB, peak_device_bytes=peak)
        run.add(Measured(launch=number, cells=(cell,), resources=resources))
    plan = make_plan(run, REF)
    assert {"error_kind": "oom_device"} in whens(plan)
    assert {"device_memory_free_below": needed_bytes(8 * GIB)} in whens(plan)
    assert use(plan, device_memory_free_bytes=4 * GIB) == "today"
    assert use(plan, device_memory_free_bytes=9 * GIB, host_memory_free_bytes=2 * GIB) == "fast"


def test_what_is_short_of_one_memory_does_not_fit_whatever_is_unknown_of_the_other(ladder: Plan) -> None:
    candidate = ladder.candidate("fast")
    short = Situation(host_memory_free_bytes=GIB, device_memory_free_bytes=GIB)
    enough = Situation(host_memory_free_bytes=9 * GIB, device_memory_free_bytes=GIB)
    assert candidate.lacking_bytes(short) == needed_bytes(8 * GIB) - GIB
    assert candidate.lacking_bytes(enough) is None
    assert candidate.lacking_bytes(Situation()) == 0


def test_peaks_that_hardly_differ_make_no_rule(make_run: MakeRun) -> None:
    peaks = {"today": 8 * GIB - 60 * 2**20, "fast": 8 * GIB}
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5)}, peaks=peaks), REF)
    assert whens(plan) == [{"feature_missing": "knob=fast"}]


def test_what_may_not_be_recommended_is_no_fallback(make_run: MakeRun) -> None:
    paces_of = {"today": paces(1.0), "fast": paces(0.5), "lossy": paces(0.9), "failed": paces(0.8)}
    peaks = {"today": 6 * GIB, "fast": 8 * GIB, "lossy": 2 * GIB, "failed": GIB}
    run = make_run(paces_of, peaks=peaks, lossy=["lossy"])
    failure = Failure(kind="oom_host", phase="sample", reason="the host ran out of memory")
    run.add(Failed(launch=99, cell=Cell(candidate="failed", scenario="8+3x1"), failure=failure))
    plan = make_plan(run, REF)
    assert {rule.use for rule in plan.rules} == {"today"}
    assert use(plan, host_memory_free_bytes=3 * GIB) == "today"


def test_a_candidate_with_an_unknown_peak_counts_as_fitting_where_the_winner_does(make_run: MakeRun) -> None:
    paces_of = {"today": paces(1.0), "fast": paces(0.5), "other": paces(0.7)}
    plan = make_plan(make_run(paces_of, peaks={"today": 4 * GIB, "fast": 8 * GIB}), REF)
    missing = {"missing_features": ("knob=fast",)}
    assert use(plan, **missing, host_memory_free_bytes=9 * GIB) == "other"
    assert use(plan, **missing, host_memory_free_bytes=5 * GIB) == "today"


# Missing settings ---------------------------------------------------------------------------------


def test_without_a_setting_the_best_that_has_it_not_is_used(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5), "second": paces(0.6)}), REF)
    assert whens(plan) == [{"feature_missing": "knob=fast"}]
    assert use(plan, missing_features=("knob=fast",)) == "second"
    assert use(plan, missing_features=("knob=fast", "knob=second")) == "today"
    assert use(plan, missing_features=("knob=second",)) == "fast"


def test_where_nothing_can_run_that_is_said(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5)}), REF)
    with pytest.raises(NothingFeasible, match="no candidate of the plan can run in this situation"):
        use(plan, missing_features=("knob=fast", "knob=today"))


def test_a_prompt_that_the_winner_does_not_hold_goes_to_the_best_that_does(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5), "long": paces(2.0)}), REF)
    held = {"today": 4000, "fast": 1000, "long": 9000}
    candidates = tuple(one.model_copy(update={"max_context_tokens": held[one.id]}) for one in plan.candidates)
    plan = plan.model_copy(update={"candidates": candidates})
    assert [use(plan, prompt_tokens=tokens) for tokens in (999, 1000, 3999, 4000)] == ["fast", "today", "today", "long"]
    with pytest.raises(NothingFeasible):
        use(plan, prompt_tokens=9000)


def bounded(make_run: MakeRun, **held: tuple[int, str]) -> Plan:
    """Three candidates, of some of which the longest context is known."""
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5), "long": paces(2.0)}), REF)
    fields = {name: {"max_context_tokens": tokens, "max_context_bounded_by": by} for name, (tokens, by) in held.items()}
    candidates = tuple(one.model_copy(update=fields.get(one.id, {})) for one in plan.candidates)
    return plan.model_copy(update={"candidates": candidates})


def test_no_candidate_holds_more_than_the_model(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": paces(1.0), "fast": paces(0.5)}), REF)
    model = MaxContext(tokens=4352, safe_tokens=4352, method="predicted", bounded_by="model")
    plan = plan.model_copy(update={"max_context": model})
    assert use(plan, prompt_tokens=4351) == "fast"
    with pytest.raises(NothingFeasible, match="the model holds 4352 tokens"):
        use(plan, prompt_tokens=4352)


@pytest.mark.parametrize("by", ["user", "time"])
def test_where_only_the_search_ended_nobody_is_known_to_fail(make_run: MakeRun, by: str) -> None:
    plan = bounded(make_run, today=(1000, by), fast=(1000, by))
    assert use(plan, prompt_tokens=5000) == "fast"


@pytest.mark.parametrize("by", ["model", "device_memory", "host_memory", "failure"])
def test_where_the_winner_fails_nobody_untried_takes_its_place(make_run: MakeRun, by: str) -> None:
    plan = bounded(make_run, today=(9000, by), fast=(1000, by))
    assert use(plan, prompt_tokens=5000) == "today"
    with pytest.raises(NothingFeasible):
        use(plan, prompt_tokens=9000)


# Compilation --------------------------------------------------------------------------------------


def compiled(make_run: MakeRun, first_call_s: float) -> Plan:
    """The winner takes 1.5 s a call, the best that does not compile 1.8 s, what runs today 3 s."""
    run = make_run({"today": paces(1.0), "fast": paces(0.5), "plain": paces(0.6)}, compiles=["fast"])
    cell = Cell(candidate="fast", scenario="8+3x1")
    run.add(FirstCall(launch=0, cell=cell, duration_s=first_call_s, compilations=1, cold=True))
    return make_plan(run, REF)


def test_compilation_has_to_be_won_back(make_run: MakeRun) -> None:
    plan = compiled(make_run, first_call_s=31.4)
    rule = plan.rules[0]
    assert (rule.when.requests_below, rule.use) == (100, "plain")
    assert rule.because == "a new process compiles for 29.9 s, which 100 requests win back against plain"
    assert rule.evidence["gain_per_request_s"] == pytest.approx(0.3)
    assert use(plan, requests=99) == "plain"
    assert use(plan, requests=100) == "fast"


def test_compilation_that_one_call_wins_back_makes_no_rule(make_run: MakeRun) -> None:
    assert whens(compiled(make_run, first_call_s=1.6)) == [{"feature_missing": "knob=fast"}]


def test_traffic_decides_how_soon_compilation_is_won_back(make_run: MakeRun) -> None:
    """Three calls of four save 1.5 s each, the fourth 0.3 s; both shapes have to be compiled."""
    often, seldom = (Scenario(prompt_tokens=8, output_tokens=3, batch_size=n, weight=w) for n, w in ((1, 3), (2, 1)))
    speeds = {"today": (1.0, 0.6), "fast": (0.5, 0.5)}
    run = banded(make_run, [often, seldom], speeds, compiles=["fast"])
    for scenario in (often, seldom):
        cell = Cell(candidate="fast", scenario=scenario.key)
        run.add(FirstCall(launch=0, cell=cell, duration_s=31.5, compilations=1, cold=True))
    assert make_plan(run, REF).rules[0].when.requests_below == 50


# Bands --------------------------------------------------------------------------------------------


def banded(make_run: MakeRun, scenarios: Sequence[Scenario], speeds: Mapping[str, Sequence[float]], **more: Any) -> Run:
    """A run over several scenarios: candidate → pace in each of them."""
    profile = Profile(name="bands", scenarios=tuple(scenarios), objective=Objective(ttft=0.5, decode=0.5), samples=1)
    run = make_run(dict.fromkeys(speeds, ()), profile=profile, **more)
    for name, values in speeds.items():
        for scenario, value in zip(scenarios, values, strict=True):
            for block, pace in enumerate(paces(value)):
                run.add(timed(name, scenario, block, pace))
    return run


def timed(candidate: str, scenario: Scenario, block: int, pace: float) -> Sample:
    request = RequestTiming(
        prompt_tokens=scenario.prompt_tokens,
        output_tokens=3,
        ttft_s=pace,
        e2e_s=3 * pace,
        token_gaps_s=(pace, pace),
        count=scenario.batch_size,
    )
    return Sample(
        clock="host", duration_s=3 * pace, requests=(request,), launch=0, round=block, candidate=candidate,
        scenario=scenario.key, index=0,
    )  # fmt: skip


def of_batch(*sizes: int) -> list[Scenario]:
    return [Scenario(prompt_tokens=8, output_tokens=3, batch_size=size) for size in sizes]


def test_each_batch_size_that_has_a_winner_of_its_own_gets_a_rule(make_run: MakeRun) -> None:
    plan = make_plan(
        banded(make_run, of_batch(1, 4, 16), {"today": (1, 1, 1), "a": (0.2, 0.5, 0.9), "b": (0.8, 0.8, 0.5)}), REF
    )
    assert plan.winner.id == "a"
    rule = next(rule for rule in plan.rules if rule.when.batch_above)
    assert (rule.when.keys(), rule.use) == ({"batch_above": 4}, "b")
    assert rule.because == "for this traffic alone, b scores 1.80 × what the winner does"
    assert rule.evidence["there_over_winner"] == pytest.approx(1.8)
    assert [use(plan, batch_size=size) for size in (1, 4, 5, 16, 64)] == ["a", "a", "b", "b", "b"]


def test_bands_below_and_between_have_an_upper_end(make_run: MakeRun) -> None:
    plan = make_plan(
        banded(make_run, of_batch(1, 4, 16), {"today": (1, 1, 1), "a": (0.9, 0.9, 0.1), "b": (0.6, 0.6, 0.8)}), REF
    )
    assert whens(plan)[:2] == [{"batch_at_most": 1}, {"batch_above": 1, "batch_at_most": 4}]
    assert [use(plan, batch_size=size) for size in (1, 3, 4, 5)] == ["b", "b", "b", "a"]


def test_long_prompts_have_their_own_winner_where_that_was_measured(make_run: MakeRun) -> None:
    scenarios = [Scenario(prompt_tokens=tokens, output_tokens=3) for tokens in (8, 16)]
    plan = make_plan(banded(make_run, scenarios, {"today": (1, 1), "a": (0.2, 0.9), "b": (0.8, 0.5)}), REF)
    assert use(plan, prompt_tokens=8) == "a"
    assert use(plan, prompt_tokens=9) == "b"


def test_a_difference_that_noise_explains_makes_no_band(make_run: MakeRun) -> None:
    plan = make_plan(banded(make_run, of_batch(1, 4), {"today": (1, 1), "a": (0.5, 0.5), "b": (0.6, 0.4975)}), REF)
    assert not any(rule.when.batch_above or rule.when.batch_at_most for rule in plan.rules)


# Properties ---------------------------------------------------------------------------------------

NAMES = "abcdefg"
MEMORY = st.integers(0, 12 * GIB)
SITUATIONS = st.builds(
    Situation,
    host_memory_free_bytes=st.none() | MEMORY,
    missing_features=st.lists(st.sampled_from([f"knob={name}" for name in NAMES]), max_size=3).map(tuple),
    error_kind=st.sampled_from([None, "oom_host", "crash"]),
    requests=st.none() | st.integers(1, 50),
)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """What a run is made of: some candidates have no peak, some are not eligible, some compile."""
    speeds = draw(st.dictionaries(st.sampled_from(NAMES), st.floats(0.3, 3.0), min_size=1))
    some = st.sets(st.sampled_from(sorted(speeds))).map(sorted)
    return {
        "paces": {name: paces(pace) for name, pace in {"today": 1.0, **speeds}.items()},
        "peaks": {name: draw(st.integers(GIB // 4, 10 * GIB)) for name in ["today", *draw(some)]},
        "lossy": draw(some),
        "compiles": draw(some),
    }


def planned(make_run: MakeRun, world: Mapping[str, Any]) -> Plan:
    run = make_run(**world)
    for name in world["compiles"]:
        cell = Cell(candidate=name, scenario="8+3x1")
        run.add(FirstCall(launch=0, cell=cell, duration_s=20.0, compilations=1, cold=True))
    return make_plan(run, REF)


pure_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def preference(plan: Plan, chosen: CandidateResult) -> float:
    """The winner first, by decision, then by score."""
    assert chosen.score is not None
    return float("inf") if chosen.id == plan.winner.id else chosen.score.value


def fits(candidate: CandidateResult, situation: Situation) -> bool:
    free, peak = situation.host_memory_free_bytes, candidate.peak_host_bytes
    return free is None or (peak is not None and needed_bytes(peak) <= free)


@pure_fixture
@given(world=worlds(), situation=SITUATIONS)
def test_nothing_is_chosen_that_cannot_run_where_something_can(
    make_run: MakeRun, world: dict[str, Any], situation: Situation
) -> None:
    plan = planned(make_run, world)
    possible = [one for one in plan.candidates if one.eligible and one.runs_without(situation.missing_features)]
    if not possible:
        with pytest.raises(NothingFeasible):
            plan.resolve(situation)
        return
    chosen = plan.resolve(situation)
    assert plan.resolve(situation) == chosen
    assert (chosen.state, chosen.reason, chosen.failure) == ("ok", None, None)
    assert chosen in possible
    if any(fits(one, situation) for one in possible) and chosen.peak_host_bytes is not None:
        assert fits(chosen, situation)


@pure_fixture
@given(world=worlds(), situation=SITUATIONS)
def test_where_no_rule_holds_the_winner_is_used_if_it_can_run(
    make_run: MakeRun, world: dict[str, Any], situation: Situation
) -> None:
    plan = planned(make_run, world).model_copy(update={"rules": ()})
    winner = plan.candidate(plan.winner.id)
    can_run = winner.runs_without(situation.missing_features) and fits(winner, situation)
    if can_run and situation.error_kind is None:
        assert plan.resolve(situation) == winner


@pure_fixture
@given(world=worlds(), free=st.tuples(MEMORY, MEMORY).map(sorted))
def test_more_memory_is_never_worse(make_run: MakeRun, world: dict[str, Any], free: list[int]) -> None:
    plan = planned(make_run, world)
    less, more = (plan.resolve(Situation(host_memory_free_bytes=one)) for one in free)
    assert preference(plan, more) >= preference(plan, less)


@pure_fixture
@given(world=worlds(), situation=SITUATIONS, free=st.tuples(MEMORY, MEMORY).map(sorted))
def test_what_was_preferred_with_less_memory_still_is_with_more(
    make_run: MakeRun, world: dict[str, Any], situation: Situation, free: list[int]
) -> None:
    """Whatever else holds, more memory leads to the same rule, or to one before it."""
    plan = planned(make_run, world)
    less, more = (situation.model_copy(update={"host_memory_free_bytes": one}) for one in free)
    assume(any(one.eligible and one.runs_without(situation.missing_features) for one in plan.candidates))
    of_rules = [rule.use for rule in plan.rules if not rule.when.host_memory_free_below and rule.when.holds(less)]
    order = list(dict.fromkeys([*of_rules, *([] if situation.error_kind else [plan.winner.id])]))
    before, after = (plan.resolve(one).id for one in (less, more))
    if before in order and fits(plan.candidate(before), less):
        assert order.index(after) <= order.index(before)
