"""Longest context: the search for it, what a run makes of it, and what the plan tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvat_core.context import CALLS, TOLERANCE, Reach, longest, next_length, predicted_tokens, scenario
from kvat_core.errors import UsageError
from kvat_core.field import Field
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import (
    CandidateEntry,
    Cell,
    ContextBound,
    ContextTrial,
    Failure,
    FailureKind,
    Health,
    JournalRef,
    LaunchOrder,
    Limits,
    MaxContext,
    ModelShape,
    Objective,
    Profile,
    Scenario,
)
from kvat_core.scoring import compared_contexts
from kvat_core.search import Allowance, Grid, Race, Rationed, Search, Vetted
from kvat_core.search._entrants import survivors

MakeRun = Callable[..., Run]
MakeCommand = Callable[..., Any]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
SEARCHES = pytest.mark.parametrize("search", ["grid", "race"])
SMALL_MEMORY_TOKENS = 2929
"""What the memory of fake:small-memory holds of the default cache."""


def trial(tokens: int, kind: FailureKind | None = None, candidate: str = "c") -> ContextTrial:
    failure = None if kind is None else Failure(kind=kind, phase="context", reason="no room")
    return ContextTrial(launch=0, candidate=candidate, tokens=tokens, calls=CALLS, failure=failure)


def tried(tokens: int, limit: int, candidate: str = "c") -> ContextTrial:
    """What a device makes of a length that holds so many tokens."""
    return trial(tokens, None if tokens <= limit else "oom_device", candidate)


def searched(reach: Reach, limit: int) -> list[ContextTrial]:
    """All trials that a search makes."""
    trials: list[ContextTrial] = []
    while (tokens := next_length(reach, trials)) is not None:
        trials.append(tried(tokens, limit))
        assert len(trials) < 100
    return trials


def lengths(trials: Sequence[ContextTrial]) -> list[int]:
    return [one.tokens for one in trials]


# The search ---------------------------------------------------------------------------------------


@st.composite
def reaches(draw: st.DrawFn) -> Reach:
    held = draw(st.integers(1, 5_000))
    most = draw(st.none() | st.integers(held, 1_000_000))
    predicted = None if most is None else draw(st.none() | st.integers(1, most))
    return Reach(held, most, "model", predicted)


@given(reaches(), st.integers(1, 1_000_000))
def test_a_search_ends_within_the_tolerance_of_any_limit(reach: Reach, beyond: int) -> None:
    limit = reach.held + beyond
    trials = searched(reach, limit)
    found = longest(reach, trials)
    assert found is not None
    best = min(limit, reach.most or limit)
    assert best - max(1, TOLERANCE * found.tokens) <= found.tokens <= best
    assert found.bounded_by == ("model" if found.tokens == reach.most else "device_memory")


@given(reaches(), st.integers(1, 1_000_000))
def test_a_search_takes_few_trials(reach: Reach, beyond: int) -> None:
    limit = reach.held + beyond
    doublings = math.log2(limit / reach.held) + 1
    halvings = math.log2(max(1.0, math.log(2 * limit / reach.held) / math.log1p(TOLERANCE))) + 2
    from_the_prediction = math.log2(1_000_000)
    assert len(searched(reach, limit)) <= doublings + halvings + from_the_prediction


@given(reaches(), st.data())
def test_nothing_is_reported_that_did_not_pass(reach: Reach, data: st.DataObject) -> None:
    """However trials end, also against all sense."""
    trials: list[ContextTrial] = []
    while (tokens := next_length(reach, trials)) is not None:
        assert longest(reach, trials) is None
        ran = tokens < 2_000_000 and data.draw(st.booleans())
        trials.append(tried(tokens, tokens if ran else 0))
    found = longest(reach, trials)
    assert found is not None
    assert found.tokens in [reach.held, *(one.tokens for one in trials if one.failure is None)]
    assert all(one.tokens > found.tokens for one in trials if one.failure is not None)


@given(reaches(), st.integers(1, 1_000_000), st.data())
def test_a_search_that_is_cut_goes_on_to_the_same_answer(reach: Reach, beyond: int, data: st.DataObject) -> None:
    limit = reach.held + beyond
    whole = searched(reach, limit)
    trials = whole[: data.draw(st.integers(0, len(whole)))]
    while (tokens := next_length(reach, trials)) is not None:
        trials.append(tried(tokens, limit))
    assert trials == whole


def test_the_bound_that_fits_takes_one_launch() -> None:
    assert searched(Reach(512, 32768, "model", predicted=32768), 10**6) == [trial(32768)]


def test_without_a_prediction_lengths_double() -> None:
    assert lengths(searched(Reach(512, 4096, "model"), 10**6)) == [1024, 2048, 4096]


def test_a_prediction_below_the_bound_is_tried_first() -> None:
    assert lengths(searched(Reach(512, 32768, "model", predicted=6000), 7000))[:3] == [6000, 12000, 8485]


def test_what_was_measured_as_a_scenario_needs_no_trial() -> None:
    found = longest(Reach(4096, 4096, "model"), [])
    assert found == MaxContext(tokens=4096, safe_tokens=4096, method="probed", bounded_by="model")


@pytest.mark.parametrize(
    ("kind", "bounded_by", "safe_tokens"),
    [
        ("oom_device", "device_memory", 970),
        ("oom_host", "host_memory", 970),
        ("timeout", "time", 970),
        ("crash", "failure", 970),
    ],
)
def test_the_failure_says_what_bounds(kind: FailureKind, bounded_by: str, safe_tokens: int) -> None:
    trials = [trial(1001, kind), trial(1000)]
    found = longest(Reach(512, 4096, "user"), trials)
    assert found is not None
    assert (found.tokens, found.bounded_by, found.safe_tokens) == (1000, bounded_by, safe_tokens)


@given(st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_a_prediction_is_the_longest_that_fits(most: int, room: int) -> None:
    assert predicted_tokens(most, lambda tokens: tokens <= room) == (min(most, room) or None)


def test_what_cannot_be_told_is_not_predicted() -> None:
    assert predicted_tokens(4096, lambda tokens: None) is None


@given(st.integers(3, 10**6))
def test_a_trial_is_as_long_as_it_says(tokens: int) -> None:
    call = scenario(tokens)
    assert call.total_tokens == tokens
    assert Scenario.of_key(call.key) == call


def test_a_name_that_is_no_scenario_is_refused() -> None:
    with pytest.raises(ValueError, match="'8192' names no scenario"):
        Scenario.of_key("8192")


def keys_of(run: Run) -> dict[Cell, str]:
    return {cell: "one" for entry in run.candidates for cell in run.cells(entry.candidate.id)}


# In a run -----------------------------------------------------------------------------------------


def longest_profile(**changes: Any) -> Profile:
    fields = {
        "name": "longest",
        "scenarios": (Scenario(prompt_tokens=64, output_tokens=8),),
        "objective": Objective(ttft=0.5, decode=0.3, context=0.2),
        "launches": 2,
        "samples": 1,
    }
    return Profile.model_validate({**fields, **changes})


SPEED = Objective(ttft=0.5, decode=0.5)


def trials_of(command: Any) -> list[ContextTrial]:
    return [event for event in command.events() if isinstance(event, ContextTrial)]


@SEARCHES
def test_the_finalists_are_measured(command: MakeCommand, search: str) -> None:
    run = command(model="fake:small-memory", profile=longest_profile(), search=search)
    plan = run.run().plan
    assert plan.max_context is not None
    assert SMALL_MEMORY_TOKENS / 1.01 <= plan.max_context.tokens <= SMALL_MEMORY_TOKENS
    assert (plan.max_context.method, plan.max_context.bounded_by) == ("probed", "device_memory")
    assert plan.winner is not None
    assert {one.candidate for one in trials_of(run)} == {plan.winner.id, plan.incumbent.id}
    assert plan.candidate(plan.winner.id).max_context_tokens == plan.max_context.tokens
    assert all(one.failure is None for one in plan.candidates)


def test_where_memory_suffices_the_model_bounds(command: MakeCommand) -> None:
    plan = command(profile=longest_profile()).run().plan
    assert plan.max_context == MaxContext(tokens=4096, safe_tokens=4096, method="probed", bounded_by="model")


def test_the_user_can_bound_it(command: MakeCommand) -> None:
    plan = command(profile=longest_profile(objective=SPEED), max_context=1000).run().plan
    assert plan.max_context == MaxContext(tokens=1000, safe_tokens=1000, method="probed", bounded_by="user")


@pytest.mark.parametrize("changes", [{}, {"max_context": "off", "profile": longest_profile()}])
def test_nobody_who_does_not_ask_for_it_pays_for_it(command: MakeCommand, changes: dict[str, Any]) -> None:
    run = command(**changes)
    assert run.run().plan.max_context is None
    assert not trials_of(run)


def test_a_server_gets_a_context_for_each_trial(command: MakeCommand) -> None:
    """Its context is part of the load."""
    plan = command(model="fake-server:small-memory", engine="fake-server", profile=longest_profile()).run().plan
    assert plan.max_context is not None
    assert plan.max_context.bounded_by == "device_memory"
    assert plan.max_context.tokens <= SMALL_MEMORY_TOKENS


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (5000, "the model holds 4096 tokens, fewer than --max-context 5000; ask for less"),
        (71, "--max-context 71 is less than the 72 tokens of a scenario; ask for more"),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(command: MakeCommand, wanted: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        command(profile=longest_profile(), max_context=wanted).run()


def test_a_run_that_is_stopped_in_a_trial_goes_on_to_the_same_answer(command: MakeCommand) -> None:
    request = {"model": "fake:small-memory", "profile": longest_profile()}
    whole = command("whole", **request)
    expected, moments = whole.watched()
    cut = command("cut", **request)
    cut.stop(moments - 20)
    assert 0 < len(trials_of(cut)) < len(trials_of(whole))
    assert cut.resume().plan.max_context == expected.plan.max_context
    assert lengths(trials_of(cut)) == lengths(trials_of(whole))


def test_an_allowance_holds_for_trials(command: MakeCommand) -> None:
    run = command(model="fake:small-memory", profile=longest_profile(), max_launches=12)
    plan = run.run().plan
    launches = [event for event in run.events() if isinstance(event, LaunchOrder)]
    assert len(launches) == 12
    assert launches[-1].purpose == "context"
    assert plan.partial
    assert plan.max_context is None


# Limits -------------------------------------------------------------------------------------------


def with_least(tokens: int) -> Profile:
    return longest_profile(objective=SPEED, limits=Limits(min_context_tokens=tokens))


def kept(plan: Any) -> dict[str, str]:
    return {one.label: one.limits[0].verdict for one in plan.candidates if one.limits}


def test_a_limit_is_tried_and_nothing_longer(command: MakeCommand) -> None:
    run = command(model="fake:small-memory", profile=with_least(2000))
    plan = run.run().plan
    assert max(lengths(trials_of(run))) == 2000
    assert plan.max_context is not None
    assert plan.max_context.bounded_by == "user"
    assert kept(plan)[plan.winner.label] == "pass"


def test_who_falls_short_of_a_limit_cannot_win(command: MakeCommand) -> None:
    """Only the offloaded cache, a quarter as large and slow, holds so many."""
    plan = command(model="fake:small-memory", profile=with_least(3500), space="default").run().plan
    assert plan.winner is not None
    assert plan.winner.settings["cache"] == "offloaded"
    verdicts = kept(plan)
    assert verdicts[plan.winner.label] == "pass"
    assert verdicts[plan.incumbent.label] == "fail"


def test_where_all_fall_short_the_closest_are_told(command: MakeCommand) -> None:
    plan = command(model="fake:small-memory", profile=with_least(3500)).run().plan
    assert plan.winner is None
    assert plan.max_context is None
    assert plan.closest[0].misses[0].observed == pytest.approx(SMALL_MEMORY_TOKENS, rel=TOLERANCE)


def test_the_next_best_is_tried_when_somebody_fell_short(make_run: MakeRun) -> None:
    """The best holds too few tokens, what runs today enough; so does what lies between, which then wins."""
    holds = {"today": 4096, "best": 50, "between": 4096}
    paces = {"today": [1.0, 1.0], "best": [0.5, 0.5], "between": [0.7, 0.7]}
    few = with_least(100).model_copy(update={"scenarios": (Scenario(prompt_tokens=8, output_tokens=3),)})
    bound = ContextBound(up_to_tokens=100, by="user")
    run = make_run(paces, shape=SHAPE, profile=few, longest_context=bound, unreadable=list(paces))
    search = Grid(keys_of(run), 0)
    while (order := search.next(run)) is not None:
        name, tokens = order.cells[0].candidate, Scenario.of_key(order.cells[0].scenario).total_tokens
        run.add(order)
        run.add(tried(tokens, holds[name], name))
        assert order.purpose == "context"
    plan = make_plan(run, REF)
    assert plan.winner is not None
    assert plan.winner.id == "between"
    assert kept(plan) == {"today": "pass", "best": "fail", "between": "pass"}


# Scores -------------------------------------------------------------------------------------------


def with_contexts(run: Run, tokens: dict[str, int | None]) -> Run:
    """The run with predictions."""
    run.candidates, entries = [], list(run.candidates)
    for entry in entries:
        change = {"predicted_context_tokens": tokens[entry.candidate.id]}
        run._take_in(CandidateEntry.model_validate({**entry.model_dump(), **change}))
    return run


EVEN = {"today": [1.0, 1.0, 1.0], "long": [1.0, 1.0, 1.0]}
SHAPE = ModelShape(architecture="fake", layers=1, attention=("full",), max_context_tokens=4096)
WEIGHTED = Profile(
    name="test",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3),),
    objective=Objective(ttft=0.5, context=0.5),
    launches=3,
    samples=1,
)


def test_a_longer_context_counts_as_its_ratio(make_run: MakeRun) -> None:
    run = make_run(EVEN, profile=WEIGHTED, shape=SHAPE)
    plan = make_plan(with_contexts(run, {"today": 1000, "long": 4000}), REF)
    assert plan.ratio is not None
    assert plan.winner is not None
    assert (plan.winner.id, plan.ratio.score.value) == ("long", pytest.approx(2.0))
    assert plan.max_context is not None
    assert (plan.max_context.tokens, plan.max_context.method) == (4000, "predicted")


def test_a_measured_context_takes_the_place_of_a_predicted_one(make_run: MakeRun) -> None:
    bound = ContextBound(up_to_tokens=4096, by="model")
    run = make_run(EVEN, profile=WEIGHTED, shape=SHAPE, longest_context=bound)
    run = with_contexts(run, {"today": 900, "long": 4000})
    for tokens in (4000, 901, 900):
        run.add(tried(tokens, 900, "long"))
    plan = make_plan(run, REF)
    assert plan.verdict == "tie"
    assert plan.candidate("long").max_context_tokens == 900


def test_a_context_that_is_unknown_wins_nothing(make_run: MakeRun) -> None:
    run = make_run(EVEN, profile=WEIGHTED, shape=SHAPE)
    plan = make_plan(with_contexts(run, {"today": 1000, "long": None}), REF)
    assert (plan.verdict, plan.winner.id if plan.winner else None) == ("tie", "today")
    unknown = "the longest context is neither measured nor predicted of long: it counts as the longest scenario"
    assert unknown in plan.notes
    scores = {one.id: one.score for one in plan.candidates}
    assert scores["long"] is not None
    assert scores["long"].value < 1


def test_a_context_that_is_unknown_of_what_runs_today_counts_for_nobody(make_run: MakeRun) -> None:
    run = make_run(EVEN, profile=WEIGHTED, shape=SHAPE)
    plan = make_plan(with_contexts(run, {"today": None, "long": 4000}), REF)
    assert plan.verdict == "tie"
    assert any("it does not count in the scores, as it is not known of what runs today" in note for note in plan.notes)


def test_a_context_without_weight_changes_nothing(make_run: MakeRun) -> None:
    run = make_run(EVEN, shape=SHAPE)
    assert make_plan(with_contexts(run, {"today": 1000, "long": 4000}), REF).verdict == "tie"


# Failures -----------------------------------------------------------------------------------------


def test_a_broken_machine_is_to_blame_for_trials_too(make_run: MakeRun) -> None:
    bound = ContextBound(up_to_tokens=4096, by="model")
    run = make_run(EVEN, shape=SHAPE, longest_context=bound)
    ran, broken = trial(22, candidate="today"), trial(44, "device_error", "today")
    run.add(ran.model_copy(update={"launch": 7}))
    run.add(broken.model_copy(update={"launch": 8}))
    run.add(Health(ok=False, reason="gone"))
    assert lengths(run.context_trials) == [22]


def test_another_reason_than_memory_or_time_is_told(make_run: MakeRun) -> None:
    bound = ContextBound(up_to_tokens=4096, by="model")
    run = make_run(EVEN, shape=SHAPE, longest_context=bound)
    run.add(trial(44, "crash", "today"))
    assert any("crash, no room): today at 44 tokens" in note for note in make_plan(run, REF).notes)


SLOW = {"today": [4.0, 4.0, 4.0]}
"""8 tokens in 4 s: 240 in 2 minutes."""


@pytest.mark.parametrize("kind", [Grid, Race])
def test_what_takes_too_long_is_not_tried(make_run: MakeRun, kind: type[Search]) -> None:
    bound = ContextBound(up_to_tokens=4096, by="model")
    few = longest_profile(scenarios=(Scenario(prompt_tokens=8, output_tokens=3),))
    run = make_run(SLOW, shape=SHAPE, profile=few, longest_context=bound, unreadable=["today"])
    search = kind(keys_of(run), 0)
    while (order := search.next(run)) is not None:
        tokens = Scenario.of_key(order.cells[0].scenario).total_tokens
        run.add(order)
        run.add(trial(tokens, candidate="today"))
        assert order.purpose == "context"
    assert max(lengths(run.context_trials)) == 240
    found = make_plan(run, REF).max_context
    assert found == MaxContext(tokens=240, safe_tokens=232, method="probed", bounded_by="time")


def test_a_bound_by_time_holds_for_predictions_and_is_one_for_all(make_run: MakeRun) -> None:
    """So who prefills faster, or was never tried, gains nothing by it."""
    bound = ContextBound(up_to_tokens=4096, by="model")
    run = make_run({**SLOW, "fast": [2.0, 2.0, 2.0]}, shape=SHAPE, profile=WEIGHTED, longest_context=bound)
    run = with_contexts(run, {"today": 4000, "fast": 4096})
    run.add(trial(240, candidate="today"))
    assert compared_contexts(run) == {"today": 240, "fast": 240}


@pytest.mark.parametrize(("longer", "stays"), [(2210, True), (2000, False)])
def test_who_holds_more_is_not_beaten_in_everything(make_run: MakeRun, longer: int, stays: bool) -> None:
    """What it loses by its pace it gains by its length, so the score does not tell."""
    bound = ContextBound(up_to_tokens=4096, by="model")
    blocks = {"today": [0.4, 0.41, 0.39, 0.4], "fast": [0.2, 0.201, 0.199, 0.2], "long": [0.221, 0.222, 0.221, 0.222]}
    run = make_run(blocks, shape=SHAPE, profile=WEIGHTED, longest_context=bound)
    run = with_contexts(run, {"today": 2000, "fast": 2000, "long": longer})
    assert ("long" in survivors(Field(run))) == stays


def test_a_trial_that_the_time_does_not_allow_is_not_made(make_run: MakeRun) -> None:
    """The launch for memory took 1 s, and the first trial three times 22 tokens, which take 33 s."""
    bound = ContextBound(up_to_tokens=4096, by="model")
    run = make_run(SLOW, shape=SHAPE, longest_context=bound, unreadable=["today"])

    def ordered(wall_s: float) -> LaunchOrder | None:
        return Rationed(Vetted(Grid(keys_of(run), 0), lambda _: ()), keys_of(run), Allowance(wall_s=wall_s)).next(run)

    assert ordered(33.9) is None
    order = ordered(34.1)
    assert order is not None
    assert order.cells == (Cell(candidate="today", scenario="1+21x1"),)
