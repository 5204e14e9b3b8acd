"""Limits decide who may win: shown to be kept, shown to be missed, or not known yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import comb
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvat_core import Limit, Limits, Profile, read_plan, snippet
from kvat_core.errors import NotDecided, NothingFeasible, UsageError
from kvat_core.limits import binomial_verdict, calls_needed, results
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import (
    Cell,
    End,
    Failed,
    Failure,
    JournalRef,
    LaunchOrder,
    LimitName,
    LimitResult,
    Measured,
    ModelShape,
    Objective,
    Plan,
    Resources,
    Scenario,
)

MakeRun = Callable[..., Run]
Command = Callable[..., Any]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
ORDER = ("fail", "undecided", "pass")
SCENARIO = Scenario(prompt_tokens=8, output_tokens=3)


def limited(**limits: Any) -> Profile:
    return Profile(
        name="test",
        scenarios=(SCENARIO,),
        objective=Objective(ttft=0.5, decode=0.5),
        samples=1,
        limits=Limits.model_validate(limits),
    )


def percentile(share: float, value: float) -> Limit:
    return Limit(value=value, percentile=share)


def judged(run: Run, name: str = "today") -> LimitResult:
    (result,) = results(run, name)
    return result


# The binomial rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "confidence", "violations", "calls"),
    [
        (90, 0.95, 0, 29),
        (90, 0.99, 0, 44),
        (95, 0.95, 0, 59),
        (95, 0.99, 0, 90),
        (99, 0.95, 0, 299),
        (99, 0.99, 0, 459),
        (90, 0.95, 1, 46),
        (90, 0.95, 2, 61),
        (95, 0.95, 1, 93),
        (95, 0.95, 2, 124),
        (99, 0.95, 1, 473),
        (99, 0.95, 2, 628),
    ],
)
def test_calls_that_a_percentile_needs(share: float, confidence: float, violations: int, calls: int) -> None:
    assert calls_needed(violations, share, confidence) == calls
    if confidence == 0.95:
        assert binomial_verdict(calls, violations, share) == "pass"
        assert binomial_verdict(calls - 1, violations, share) == "undecided"


def test_the_most_extreme_percentiles_are_answered_as_well() -> None:
    assert calls_needed(3, 99.999999, 0.95) > 10**8
    assert calls_needed(0, 1e-9, 0.95) == 1


@pytest.mark.parametrize("share", [75.0, 90.0, 95.0, 99.0])
@pytest.mark.parametrize("calls", [1, 9, 30, 60, 100, 300])
def test_a_limit_that_is_just_kept_is_seldom_judged_wrongly(share: float, calls: int) -> None:
    wrong = 1 - share / 100
    seen = [comb(calls, number) * wrong**number * (1 - wrong) ** (calls - number) for number in range(calls + 1)]
    for verdict in ("pass", "fail"):
        assert (
            sum(p for number, p in enumerate(seen) if binomial_verdict(calls, number, share) == verdict) <= 0.05 + 1e-9
        )


@given(calls=st.integers(1, 400), share=st.floats(1, 99.9))
def test_more_violations_never_look_better(calls: int, share: float) -> None:
    verdicts = [binomial_verdict(calls, violations, share) for violations in range(calls + 1)]
    assert verdicts == sorted(verdicts, key=ORDER.index, reverse=True)


# Calls, launches, peaks and contexts ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("slow", "verdict", "reason"),
    [
        (0, "pass", "keeps TTFT p95 ≤ 300 ms: 100 ms in 8+3x1"),
        (1, "undecided", "may keep TTFT p95 ≤ 300 ms: 100 ms in 8+3x1 (violated by 1 of 60 calls; to pass with that "
         "it takes 93 calls)"),
        (7, "fail", "misses TTFT p95 ≤ 300 ms by 67 %: 500 ms in 8+3x1"),
    ],
)  # fmt: skip
def test_a_percentile_is_judged_by_the_number_of_calls_that_violate_it(
    make_run: MakeRun, slow: int, verdict: str, reason: str
) -> None:
    run = make_run({"today": [0.5] * slow + [0.1] * (60 - slow)}, profile=limited(max_ttft_s=percentile(95, 0.3)))
    assert (judged(run).verdict, judged(run).reason) == (verdict, reason)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(1.2, "pass"), (1.02, "undecided"), (0.99, "undecided"), (0.9, "fail")],
)
def test_a_median_is_judged_by_the_interval_that_the_plan_prints(make_run: MakeRun, value: float, verdict: str) -> None:
    run = make_run({"today": [1.0, 1.03, 0.97]}, profile=limited(max_ttft_s=Limit(value=value)))
    printed = make_plan(run, REF).candidate("today").scenarios[0].ttft_s
    by_interval = "pass" if printed.high <= value else "fail" if printed.low > value else "undecided"
    assert judged(run).verdict == by_interval == verdict


@pytest.mark.parametrize(
    ("name", "limit", "observed"),
    [
        ("max_ttft_s", percentile(90, 0.45), 0.4),
        ("max_tpot_s", percentile(90, 0.45), 0.4),
        # Of a rate that share of calls is at least as fast: 9 of 10 calls make 2.5 tokens per second or more.
        ("min_decode_tps", percentile(90, 2.4), 2.5),
    ],
)
def test_each_timed_limit_has_its_metric_and_its_direction(
    make_run: MakeRun, name: LimitName, limit: Limit, observed: float
) -> None:
    ten_calls = [0.5, *[0.4] * 2, *[0.2] * 7]
    run = make_run({"today": ten_calls * 10}, profile=limited(**{name: limit}))
    assert judged(run).observed == pytest.approx(observed)
    assert judged(run).verdict == "undecided"
    broken = make_run({"today": [2 * pace for pace in ten_calls] * 10}, profile=limited(**{name: limit}))
    assert judged(broken).verdict == "fail"
    kept = make_run({"today": [pace / 2 for pace in ten_calls] * 10}, profile=limited(**{name: limit}))
    assert judged(kept).verdict == "pass"


@pytest.mark.parametrize(("value", "verdict"), [(0.85, "pass"), (0.98, "undecided"), (1.1, "fail")])
def test_of_a_median_rate_the_slow_end_of_the_interval_has_to_keep_the_limit(
    make_run: MakeRun, value: float, verdict: str
) -> None:
    run = make_run({"today": [1.0, 1.03, 0.97]}, profile=limited(min_decode_tps=Limit(value=value)))
    assert judged(run).verdict == verdict


@pytest.mark.parametrize("limit", [Limit(value=0.25), percentile(95, 0.25)])
def test_a_value_at_its_limit_keeps_it(make_run: MakeRun, limit: Limit) -> None:
    run = make_run({"today": [0.25] * 60}, profile=limited(max_ttft_s=limit))
    assert judged(run).verdict == "pass"


@pytest.mark.parametrize("limit", [Limit(value=100), percentile(60, 100)])
def test_one_launch_decides_no_timed_limit(make_run: MakeRun, limit: Limit) -> None:
    one = make_run({"today": [1.0]}, profile=limited(max_ttft_s=limit))
    assert judged(one).verdict == "undecided"
    assert "one launch does not tell how much launches differ" in judged(one).reason
    assert judged(make_run({"today": [1.0] * 9}, profile=limited(max_ttft_s=limit))).verdict == "pass"


def test_a_batch_is_one_call(make_run: MakeRun) -> None:
    run = make_run({"today": [0.1] * 58}, profile=limited(max_ttft_s=percentile(95, 0.3)))
    batches = Run(run.header)
    for event in (*run.candidates, *run.proofs):
        batches.add(event)
    for one in run.samples:
        timing = one.requests[0].model_copy(update={"count": 64})
        batches.add(one.model_copy(update={"requests": (timing,)}))
    assert judged(batches).verdict == judged(run).verdict == "undecided"


def test_the_scenario_that_is_furthest_from_keeping_a_limit_decides(make_run: MakeRun) -> None:
    long = Scenario(prompt_tokens=99, output_tokens=3)
    profile = limited(max_ttft_s=Limit(value=1.5)).model_copy(update={"scenarios": (SCENARIO, long)})
    run = make_run({"today": [1.0, 1.01, 0.99]}, profile=profile)
    for one in make_run({"today": [2.0, 2.02, 1.98]}).samples:
        run.add(one.model_copy(update={"scenario": long.key}))
    assert (judged(run).verdict, judged(run).scenario) == ("fail", long.key)
    assert judged(run).missed_by == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("limit", "verdict", "reason"),
    [
        (1000 * 2**20, "pass", "keeps host memory ≤ 1000 MiB: 900 MiB"),
        (910 * 2**20, "undecided", "may keep host memory ≤ 910 MiB: 900 MiB (peaks of two processes may differ by 2.0 "
         "%)"),
        (800 * 2**20, "fail", "misses host memory ≤ 800 MiB by 12 %: 900 MiB"),
    ],
)  # fmt: skip
def test_a_peak_is_compared_with_a_margin(make_run: MakeRun, limit: int, verdict: str, reason: str) -> None:
    run = make_run({"today": [1.0, 1.0]}, peaks={"today": 900 * 2**20}, profile=limited(max_host_bytes=limit))
    assert (judged(run).verdict, judged(run).reason) == (verdict, reason)


@pytest.mark.parametrize("name", ["max_host_bytes", "max_device_bytes"])
def test_an_unknown_peak_is_undecided(make_run: MakeRun, name: str) -> None:
    unread = make_run({"today": [1.0, 1.0]}, unreadable=["today"], profile=limited(**{name: 10}))
    assert judged(unread).verdict == "undecided"
    assert judged(unread).reason.endswith(" (its peak is not known)")


@pytest.mark.parametrize(
    ("least", "holds", "verdict", "observed"),
    [(11, None, "pass", 11), (12, None, "undecided", 11), (12, 12, "undecided", 11), (12, 11, "fail", 11)],
)
def test_a_context_is_known_by_the_longest_scenario_and_by_the_model(
    make_run: MakeRun, least: int, holds: int | None, verdict: str, observed: int
) -> None:
    shape = ModelShape(architecture="fake", layers=1, attention=("full",), max_context_tokens=holds)
    run = make_run({"today": [1.0, 1.0]}, shape=shape, profile=limited(min_context_tokens=least))
    assert (judged(run).verdict, judged(run).observed) == (verdict, observed)


PACES = st.lists(st.floats(0.5, 2.0), min_size=2, max_size=40)
LIMITS = st.one_of(st.just(50.0), st.floats(5, 95))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(paces=PACES, share=LIMITS, tight=st.floats(0.4, 2.1), wider=st.floats(1.0, 2.0))
def test_tightening_a_limit_never_makes_it_kept(
    make_run: MakeRun, paces: list[float], share: float, tight: float, wider: float
) -> None:
    verdicts = [
        judged(make_run({"today": paces}, profile=limited(max_ttft_s=percentile(share, value)))).verdict
        for value in (tight, tight * wider)
    ]
    assert verdicts == sorted(verdicts, key=ORDER.index)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(paces=PACES, share=LIMITS, value=st.floats(0.4, 2.1), power=st.integers(-8, 8))
def test_a_slower_machine_with_wider_limits_is_judged_alike(
    make_run: MakeRun, paces: list[float], share: float, value: float, power: int
) -> None:
    # A limit that is met to the last bit is a matter of rounding.
    assume(all(abs(pace - value) > 1e-9 for pace in paces))
    scale = 2.0**power
    scaled = make_run(
        {"today": [scale * pace for pace in paces]}, profile=limited(max_ttft_s=percentile(share, scale * value))
    )
    assert (
        judged(make_run({"today": paces}, profile=limited(max_ttft_s=percentile(share, value)))).verdict
        == judged(scaled).verdict
    )


# Who wins ------------------------------------------------------------------------------------------

THREE: Mapping[str, list[float]] = {
    "today": [1.0, 1.01, 0.99],
    "fast": [0.5, 0.505, 0.495],
    "middle": [0.8, 0.808, 0.792],
}


def planned(run: Run) -> Plan:
    return make_plan(run, REF)


def winner(plan: Plan) -> str:
    return plan.require_winner().id


def test_what_misses_a_limit_cannot_win_however_fast_it_is(make_run: MakeRun) -> None:
    peaks = {"today": 500, "fast": 900, "middle": 500}
    assert winner(planned(make_run(THREE, peaks=peaks))) == "fast"
    plan = planned(make_run(THREE, peaks=peaks, profile=limited(max_host_bytes=800)))
    assert (winner(plan), plan.verdict) == ("middle", "better")
    assert plan.candidate("fast").reason == "misses host memory ≤ 0.0007629 MiB by 12 %: 0.0008583 MiB"
    assert [one.verdict for one in plan.candidate("fast").limits] == ["fail"]


def test_an_incumbent_that_misses_a_limit_is_not_kept(make_run: MakeRun) -> None:
    paces = {"today": [1.0, 1.01, 0.99], "slow": [1.2, 1.21, 1.19]}
    peaks = {"today": 900, "slow": 500}
    plan = planned(make_run(paces, peaks=peaks, profile=limited(max_host_bytes=800)))
    assert (winner(plan), plan.verdict) == ("slow", "better")
    assert plan.ratio is not None
    assert plan.ratio.score.value < 1


def test_what_keeps_a_limit_for_sure_is_preferred_and_the_other_is_told_why(make_run: MakeRun) -> None:
    plan = planned(
        make_run(THREE, peaks={"today": 500, "fast": 795, "middle": 500}, profile=limited(max_host_bytes=800))
    )
    assert winner(plan) == "middle"
    assert (plan.candidate("fast").reason or "").startswith("may keep host memory")
    assert not any("undecided" in note for note in plan.notes)


def test_where_nobody_keeps_a_limit_for_sure_the_best_wins_and_the_plan_says_so(make_run: MakeRun) -> None:
    plan = planned(make_run(THREE, profile=limited(max_ttft_s=percentile(95, 2))))
    assert (winner(plan), plan.verdict) == ("fast", "better")
    assert [one.verdict for one in plan.candidate("fast").limits] == ["undecided"]
    assert plan.candidate("middle").reason is None
    (note,) = [note for note in plan.notes if "undecided" in note]
    assert note.startswith("undecided, as no candidate is shown to keep all limits: the winner may keep TTFT p95 ≤ 2 s")
    assert "59 calls" in note


def test_nothing_feasible_is_a_plan_that_names_who_comes_closest(make_run: MakeRun) -> None:
    paces = {**THREE, "slow": [2.0, 2.02, 1.98], "lossy": [0.3, 0.303, 0.297]}
    plan = planned(make_run(paces, lossy=["lossy"], profile=limited(max_ttft_s=Limit(value=0.25))))
    assert (plan.winner, plan.verdict, plan.ratio, plan.confidence, plan.metrics) == (
        None,
        "infeasible",
        None,
        None,
        None,
    )
    assert [near.id for near in plan.closest] == ["fast", "middle", "today"]
    assert plan.closest[0].misses[0].missed_by == pytest.approx(1.0)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises(
        NothingFeasible, match="the closest, fast, misses TTFT p50 ≤ 250 ms by 100 %: 500 ms in 8\\+3x1;"
    ):
        plan.require_winner()
    with pytest.raises(NothingFeasible):
        snippet(plan)


def test_nobody_is_better_who_only_may_keep_what_today_misses(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.01, 0.99], "slow": [1.2, 1.21, 1.19]}, peaks={"today": 900})
    limited_run = run.asked(limited(max_host_bytes=400))
    plan = planned(limited_run)
    assert (plan.winner and plan.winner.id, plan.verdict) == ("slow", "undecided")
    assert any("no candidate is shown to keep all limits: the winner may keep" in note for note in plan.notes)
    run.add(LaunchOrder(launch=8, round=9, purpose="memory", cells=(Cell(candidate="slow", scenario=SCENARIO.key),)))
    resources = Resources(processes=("worker",), peak_host_bytes=200)
    run.add(Measured(launch=8, cells=(Cell(candidate="slow", scenario=SCENARIO.key),), resources=resources))
    assert planned(run.asked(limited(max_host_bytes=400))).verdict == "better"


def test_who_was_not_reached_may_still_keep_the_limits(make_run: MakeRun) -> None:
    run = make_run({**THREE, "late": []}, profile=limited(max_ttft_s=Limit(value=0.25)))
    plan = planned(run)
    assert (plan.partial, plan.verdict) == (True, "infeasible")
    with pytest.raises(NotDecided, match=r"measured so far keeps the limits; the closest, fast, .*resume"):
        plan.require_winner()
    run.add(End(wall_s=1.0))
    with pytest.raises(NothingFeasible):
        planned(run).require_winner()


def test_the_largest_miss_says_how_close_a_candidate_comes(make_run: MakeRun) -> None:
    limits = limited(max_ttft_s=Limit(value=0.4), max_host_bytes=100)
    plan = planned(make_run(THREE, peaks={"today": 120, "fast": 900, "middle": 130}, profile=limits))
    assert [near.id for near in plan.closest] == ["middle", "today", "fast"]
    assert [len(near.misses) for near in plan.closest] == [2, 2, 2]


def test_a_run_that_was_cut_before_what_runs_today_was_measured_calls_nothing_infeasible(make_run: MakeRun) -> None:
    run = make_run({"today": [], "slow": [2.0, 2.0]}, profile=limited(max_ttft_s=Limit(value=1)))
    with pytest.raises(NotDecided, match="what runs today has not been measured in full yet"):
        planned(run)
    failure = Failure(kind="oom_host", phase="sample", reason="the host ran out of memory")
    run.add(Failed(launch=0, cell=Cell(candidate="today", scenario=SCENARIO.key), failure=failure))
    assert planned(run).verdict == "infeasible"


def test_a_plan_has_a_winner_or_says_why_not(make_run: MakeRun) -> None:
    data = planned(make_run(THREE)).model_dump()
    for changes in ({"winner": None}, {"verdict": "infeasible"}, {"confidence": None}):
        with pytest.raises(ValidationError, match="without a winner the verdict is infeasible"):
            Plan.model_validate({**data, **changes})


# Whole tunes ---------------------------------------------------------------------------------------


def test_limits_of_the_request_replace_those_of_the_profile(command: Command) -> None:
    profile = limited(max_ttft_s=Limit(value=9), max_tpot_s=Limit(value=9)).model_copy(update={"name": "own"})
    plan = command(profile=profile, limits=Limits(max_ttft_s=percentile(90, 8))).run().plan
    assert plan.profile.limits == Limits(max_ttft_s=percentile(90, 8), max_tpot_s=Limit(value=9))
    assert [one.name for one in plan.candidate(winner(plan)).limits] == ["max_ttft_s", "max_tpot_s"]


def test_a_limit_of_memory_has_the_peak_of_everyone_read_and_changes_the_winner(command: Command) -> None:
    free = command("free", space="default").run().plan
    assert free.require_winner().settings["cache"] == "static"
    # The cache that the fake engine offloads is smaller; that of both others is not within this limit.
    peaks = {one.label: one.scenarios[0].peak_host_bytes for one in free.candidates if one.scenarios}
    limit = (peaks["default"] or 0) - 1
    plan = command("limited", space="default", limits=Limits(max_host_bytes=limit)).run().plan
    assert plan.require_winner().settings["cache"] == "offloaded"
    # It is smaller by less than peaks of two processes may differ by.
    assert plan.verdict == "undecided"
    measured = [one for one in plan.candidates if one.state == "ok"]
    assert all(one.limits[0].observed is not None for one in measured)
    assert (plan.candidate(plan.incumbent.id).reason or "").startswith("misses host memory")


def test_nothing_feasible_leaves_journal_and_plan_and_no_snippet(command: Command) -> None:
    one = command(limits=Limits(max_ttft_s=Limit(value=1e-6)))
    result = one.run()
    assert {path.name for path in result.files} >= {"journal.jsonl", "best_plan.json"}
    assert not (one.out / "snippet.py").exists()
    assert read_plan(one.out / "best_plan.json") == result.plan
    assert result.plan.verdict == "infeasible"
    assert result.warnings == ()


def test_a_snippet_of_before_is_moved_aside_when_nothing_is_feasible_any_more(command: Command) -> None:
    one = command(limits=Limits(max_ttft_s=Limit(value=1e-6)))
    one.run()
    (one.out / "snippet.py").write_text("of before")
    (warning,) = one.resume().warnings
    assert warning == (
        "the snippet was not written: no candidate keeps the limits (snippet.py is of before and now called "
        "snippet.py.1)"
    )


def test_a_run_is_resumed_with_the_same_limits_only(command: Command) -> None:
    one = command(limits=Limits(max_ttft_s=Limit(value=1)))
    one.stop(8)
    with pytest.raises(UsageError, match=r"profile.limits.max_ttft_s.value was 1.0 and is 2.0"):
        one.resume(limits=Limits(max_ttft_s=Limit(value=2)))
    with pytest.raises(UsageError, match=r"profile.limits.max_ttft_s.percentile was 50.0 and is 90.0"):
        one.resume(limits=Limits(max_ttft_s=percentile(90, 1)))
    with pytest.raises(UsageError, match=r"profile.limits.max_ttft_s.value was 1.0 and is None"):
        one.resume(limits=Limits())
    assert one.resume().plan.profile.limits == Limits(max_ttft_s=Limit(value=1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(min_context_tokens=5000), "the model holds 4096 tokens, fewer than the limit of 5000"),
        (Limits(max_device_bytes=1), "device cpu has no memory of its own to limit"),
    ],
)
def test_a_limit_that_nobody_can_keep_is_refused_before_anything_is_measured(
    command: Command, limits: Limits, message: str
) -> None:
    one = command(limits=limits)
    with pytest.raises(UsageError, match=message):
        one.run()
    assert not one.out.exists()


def test_a_server_that_does_not_tell_its_memory_leaves_the_limit_undecided(command: Command) -> None:
    plan = command(model="fake-server:tiny", limits=Limits(max_host_bytes=2**30)).run().plan
    assert any("(its peak is not known)" in note for note in plan.notes)
