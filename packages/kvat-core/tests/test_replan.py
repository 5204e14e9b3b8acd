"""A journal decides again, for whatever traffic it holds, and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core import (
    Limit,
    Limits,
    Objective,
    Plan,
    Profile,
    PromptSource,
    Scenario,
    decide_again,
    lock,
    outputs,
    presets,
    read_plan,
    replan,
)
from kvat_core.errors import JournalDamaged, NotDecided, UsageError

MakeCommand = Callable[..., Any]
TWO = Profile(
    name="two",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3), Scenario(prompt_tokens=32, output_tokens=3)),
    objective=Objective(decode=1),
    launches=2,
    samples=2,
)


@pytest.fixture
def journal(command: MakeCommand) -> Path:
    """Of a run over two scenarios in which decoding counts."""
    run = command(profile=TWO)
    run.run()
    path: Path = run.journal
    return path


def asked(**changes: Any) -> Profile:
    return TWO.model_copy(update={"name": "mine", **changes})


def test_the_same_question_has_the_same_plan(journal: Path) -> None:
    assert decide_again(journal) == decide_again(journal, TWO) == read_plan(journal.parent / "best_plan.json")


def test_another_objective_has_another_winner_and_measures_nothing(journal: Path) -> None:
    before = journal.read_bytes()
    plan = decide_again(journal, asked(objective=Objective(ttft=1)))
    assert (decide_again(journal).winner.label, plan.winner.label) == ("cache=static", "default")
    assert (plan.profile.name, plan.profile.objective.shares()["ttft"]) == ("mine", 1)
    assert plan.journal == decide_again(journal).journal
    assert journal.read_bytes() == before


def test_fewer_scenarios_with_other_weights_can_be_decided_for(journal: Path) -> None:
    one = TWO.scenarios[1].model_copy(update={"weight": 7.0})
    plan = decide_again(journal, asked(scenarios=(one,)))
    assert plan.profile.scenarios == (one,)
    assert {len(candidate.scenarios) for candidate in plan.candidates if candidate.state == "ok"} == {1}


def test_a_shape_that_was_not_measured_is_named_with_those_that_were(journal: Path) -> None:
    longer = Scenario(prompt_tokens=64, output_tokens=3)
    with pytest.raises(UsageError) as error:
        decide_again(journal, asked(scenarios=(*TWO.scenarios, longer)))
    assert str(error.value) == (
        f"{journal} does not hold 64+3x1 of profile mine, only 8+3x1, 32+3x1; "
        "name a profile of these, or measure that one with kvat tune"
    )


def test_a_preset_is_cut_to_the_model_as_for_measuring(command: MakeCommand) -> None:
    rag = presets()["rag"].model_copy(update={"launches": 1, "samples": 1})
    run = command(profile="ci-micro")
    run.run()
    with pytest.raises(UsageError, match=f"does not hold .* of profile {rag.name}, only 128"):
        decide_again(run.journal, presets()["rag"])
    assert decide_again(run.journal, presets()["ci-micro"]) == decide_again(run.journal)


def test_how_it_was_measured_stays_and_is_said(journal: Path) -> None:
    plan = decide_again(journal, asked(samples=9, prompt=PromptSource(kind="text", value="Once upon a time")))
    assert (plan.profile.samples, plan.profile.prompt) == (2, TWO.prompt)
    kept = "as in the run, and not as in profile mine, for nothing was measured anew: prompt, samples"
    assert kept in plan.notes
    assert "Once" not in plan.model_dump_json()


def test_another_text_of_prompts_is_noticed_and_not_told(command: MakeCommand) -> None:
    own = asked(prompt=PromptSource(kind="text", value="Once upon a time"))
    run = command(profile=own)
    run.run()

    same = decide_again(run.journal, own)
    other = decide_again(run.journal, asked(prompt=PromptSource(kind="text", value="Never more")))

    assert not any("their text is not that" in note for note in same.notes)
    assert any("their text is not that of profile mine" in note for note in other.notes)
    assert "Never" not in other.model_dump_json()


def test_an_unfinished_run_is_decided_as_far_as_it_went(command: MakeCommand) -> None:
    run = command()
    run.stop(25)
    plan = decide_again(run.journal)
    assert plan.partial
    assert plan == read_plan(run.out / "best_plan.json")


def test_a_damaged_journal_is_refused_and_left_as_it_is(journal: Path) -> None:
    damaged = journal.read_bytes().replace(b'"round":0', b'"round":1', 1) + b'{"torn'
    journal.write_bytes(damaged)
    with pytest.raises(JournalDamaged, match="line"):
        decide_again(journal)
    assert journal.read_bytes() == damaged


def test_a_torn_end_is_no_record_and_stays(journal: Path) -> None:
    plan = decide_again(journal)
    torn = journal.read_bytes() + b'{"torn'
    journal.write_bytes(torn)
    again = decide_again(journal)
    assert again == plan.model_copy(update={"journal": again.journal})
    assert journal.read_bytes() == torn
    assert {path.name for path in journal.parent.glob("journal*")} == {"journal.jsonl"}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read journal .*: No such file"), (b"", "holds no run"), (b"{", "holds no")]
)
def test_what_is_no_journal_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "some"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{message}.*; name the journal.jsonl of"):
        decide_again(path)


def test_a_journal_without_figures_has_no_plan(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0])
    with pytest.raises(NotDecided, match="nothing has been measured yet"):
        decide_again(journal)


def test_a_journal_whose_run_is_alive_is_left_alone(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock.locked(journal.parent / outputs.LOCK):
        monkeypatch.setattr(lock, "_myself", lambda: None)
        with pytest.raises(UsageError, match="is being written; decide again when its run has ended"):
            decide_again(journal)


def test_wider_limits_are_decided_for_without_measuring(command: MakeCommand) -> None:
    limited = TWO.model_copy(update={"limits": Limits(max_ttft_s=Limit(value=1e-9))})
    run = command(profile=limited)
    run.run()
    before = run.journal.read_bytes()

    assert decide_again(run.journal).verdict == "infeasible"
    wider = decide_again(run.journal, limits=Limits(max_ttft_s=Limit(value=1e9)))

    assert wider.winner is not None
    assert wider.profile.limits.max_ttft_s == Limit(value=1e9)
    assert replan.LIMITS_NOTE in wider.notes
    assert run.journal.read_bytes() == before


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_device_bytes=1000), "device cpu has no memory of its own to limit"),
        (Limits(min_context_tokens=10**9), "the model holds .* fewer than the limit"),
    ],
)
def test_a_limit_that_nobody_can_keep_is_refused_as_by_a_tune(journal: Path, limits: Limits, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decide_again(journal, limits=limits)


def test_names_do_instead_of_objects(journal: Path) -> None:
    mine = journal.parent / "mine.json"
    mine.write_text(asked(objective=Objective(ttft=1)).model_dump_json())
    assert decide_again(str(journal), str(mine)).profile.name == "mine"
    assert read_plan(str(journal.parent / "best_plan.json")) == decide_again(str(journal))


def test_a_plan_is_no_journal(journal: Path) -> None:
    with pytest.raises(UsageError, match=r"best_plan\.json holds no run; name the journal"):
        decide_again(journal.parent / "best_plan.json")


def test_deciding_again_makes_no_key(journal: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "empty"))
    decide_again(journal, asked(prompt=PromptSource(kind="text", value="Once upon a time")))
    assert not (tmp_path / "empty").exists()


def test_a_journal_that_grows_meanwhile_is_no_evidence(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(path: Path) -> Any:
        yield from read_journal(path)
        path.write_bytes(path.read_bytes() + b"more")

    read_journal = replan.read_journal
    monkeypatch.setattr(replan, "read_journal", growing)
    with pytest.raises(UsageError, match="is being written; decide again when its run has ended"):
        decide_again(journal)


def test_rules_are_those_of_the_new_question(journal: Path) -> None:
    def features(plan: Plan) -> list[str | None]:
        return [rule.when.feature_missing for rule in plan.rules if rule.when.feature_missing]

    assert features(decide_again(journal)) == ["cache=static"]
    assert features(decide_again(journal, asked(objective=Objective(ttft=1)))) == []
