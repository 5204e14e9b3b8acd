"""Pure decisions about what may be recommended and shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvat_core.errors import AllFailed, NotDecided, NothingFeasible
from kvat_core.planner import make_plan, public_model_id
from kvat_core.run import Run
from kvat_core.schema import (
    Cell,
    Failed,
    Failure,
    JournalRef,
    LaunchOrder,
    ModelDimensions,
    ModelShape,
    Objective,
    Profile,
    Scenario,
)

MakeRun = Callable[..., Run]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)


def fail(run: Run, name: str) -> Run:
    failure = Failure(kind="oom_host", phase="sample", reason="the host ran out of memory")
    run.add(Failed(launch=0, cell=Cell(candidate=name, scenario="8+3x1"), failure=failure))
    return run


def test_only_lossy_survivors_are_not_recommended(make_run: MakeRun) -> None:
    run = fail(make_run({"today": [1.0, 1.0], "lossy": [0.5, 0.5]}, lossy=["lossy"]), "today")
    with pytest.raises(NothingFeasible, match="may change the output"):
        make_plan(run, REF)


def test_no_survivors_at_all_are_told_apart_with_the_first_reason(make_run: MakeRun) -> None:
    run = fail(make_run({"today": [1.0, 1.0]}), "today")
    with pytest.raises(AllFailed, match=r"every candidate failed \(oom_host\); the first: the host ran out of memory"):
        make_plan(run, REF)


def test_random_weights_are_said_in_the_plan(make_run: MakeRun) -> None:
    shape = ModelShape(architecture="fake", layers=1, attention=("full",), weights="random")
    plan = make_plan(make_run({"today": [1.0, 1.0]}, shape=shape), REF)
    assert plan.model.weights == "random"
    assert any("fidelity are not" in note for note in plan.notes)
    assert plan.model.dimensions == ModelDimensions(architecture="fake", layers=1)


def test_a_run_cut_short_tells_what_was_not_reached(make_run: MakeRun) -> None:
    plan = make_plan(make_run({"today": [1.0, 1.0], "late": []}), REF)
    assert {candidate.id: candidate.state for candidate in plan.candidates} == {"today": "ok", "late": "not_reached"}


def test_a_candidate_that_lacks_a_scenario_is_not_eligible(make_run: MakeRun) -> None:
    # Only one of both scenarios is measured: a candidate must not win by the part that suits it.
    profile = Profile(
        name="two",
        scenarios=(Scenario(prompt_tokens=8, output_tokens=3), Scenario(prompt_tokens=9, output_tokens=3)),
        objective=Objective(ttft=1),
        samples=1,
    )
    with pytest.raises(NotDecided, match="has not been measured in full yet"):
        make_plan(make_run({"today": [1.0, 1.0]}, profile=profile), REF)


@pytest.mark.parametrize(
    ("model_id", "scheme", "local", "public"),
    [
        ("/home/somebody/models/mine", "", True, "./mine"),
        ("models/mine", "", True, "./mine"),
        ("/home/somebody/10:30/mine", "", True, "./mine"),
        ("random:/home/somebody/shapes/mine", "random:", True, "random:./mine"),
        ("random:/home/somebody/10:30/mine", "random:", True, "random:./mine"),
        ("owner/name", "", False, "owner/name"),
        ("builtin:llama", "", False, "builtin:llama"),
    ],
)
def test_of_a_local_path_only_the_last_part_is_shown(model_id: str, scheme: str, local: bool, public: str) -> None:
    assert public_model_id(model_id, scheme, local=local) == public


def test_a_peak_that_could_not_be_read_costs_no_figures(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.01, 0.99], "slow": [2.0, 2.02, 1.98]}, peaks={"slow": 300})
    cell = Cell(candidate="today", scenario="8+3x1")
    run.add(LaunchOrder(launch=7, round=9, purpose="memory", cells=(cell,)))
    run.add(Failed(launch=7, cell=cell, failure=Failure(kind="timeout", phase="start", reason="no answer in 300 s")))
    plan = make_plan(run, REF)
    assert (plan.winner.id, plan.verdict) == ("today", "tie")
    assert plan.candidate("today").scenarios[0].peak_host_bytes is None
    assert plan.metrics.error_rate == 0
    assert "peak memory could not be read (start: timeout, no answer in 300 s): today" in plan.notes


def test_what_is_done_without_a_peak_is_said_where_memory_is_short(make_run: MakeRun) -> None:
    objective = Objective(ttft=0.45, decode=0.45, memory=0.1)
    profile = Profile(name="m", scenarios=(Scenario(prompt_tokens=8, output_tokens=3),), objective=objective, samples=1)
    paces = {"today": [1.0, 1.01, 0.99], "a": [2.0, 2.02, 1.98]}
    told = make_plan(make_run(paces, peaks={"today": 800}, unreadable=["a"], profile=profile), REF).notes
    without = make_plan(make_run(paces, peaks={"a": 800}, unreadable=["today"], profile=profile), REF).notes
    whole = make_plan(make_run(paces, peaks={"today": 800, "a": 800}, profile=profile), REF).notes
    assert "peak memory could not be read (memory: oom_host, no room): a" in told
    assert any("counts as all that there is: a" in note for note in told)
    assert any("does not count in the scores, because peaks are not known: today" in note for note in without)
    assert not any("peak" in note for note in whole)
