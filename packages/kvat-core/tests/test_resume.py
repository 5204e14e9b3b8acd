"""A run that was stopped, killed or finished is continued, or refused with what differs."""

from __future__ import annotations

import dataclasses
import errno
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvat_core import Plan, discovery, read_plan
from kvat_core.engine import Probe
from kvat_core.errors import AllFailed, Interrupted, JournalDamaged, UsageError
from kvat_core.fake import FakeEngine
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.schema import (
    End,
    Failure,
    Header,
    LaunchOrder,
    PromptSource,
    Recipe,
    Resumed,
    Scenario,
    Stopped,
    Target,
)

FAILING = {"model": "fake:oom", "excluded": (("kernel", "flash"), ("cache", "paged"))}
"""One of its four candidates fails, so that all kinds of records are there."""

VETTED = [
    {"model": f"fake:{model}", "excluded": (("kernel", "flash"), ("cache", "paged"))}
    for model in ("leak", "wrong-output")
]
"""The same, with a winner that vetting finds to be wrong, and another one in its place."""

JOURNAL, PLAN = "journal.jsonl", "best_plan.json"


MakeCommand = Callable[..., Any]
"""Makes a command of `conftest.py`."""


def decided(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(exclude={"journal", "created"})


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# The same plan ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_", [FAILING, {"model": "fake-server:tiny"}, *VETTED], ids=["fake", "fake-server", "leak", "wrong-output"]
)
def test_stopped_at_any_moment_and_resumed_a_run_gives_the_plan_of_an_uninterrupted_one(
    command: MakeCommand, request_: dict[str, Any]
) -> None:
    whole, moments = command("whole", **request_).watched()
    assert whole.stopped is None
    for moment in range(2, moments, 3):
        stopped = command(f"stopped-{moment}", **request_)
        stopped.stop(moment)
        resumed = stopped.resume()
        assert decided(resumed.plan) == decided(whole.plan), f"stopped at moment {moment}"
        assert read_plan(stopped.out / PLAN) == resumed.plan


@pytest.mark.parametrize("request_", [FAILING, *VETTED], ids=["oom", "leak", "wrong-output"])
def test_stopped_again_and_again_a_run_still_comes_to_the_same_plan(
    command: MakeCommand, request_: dict[str, Any]
) -> None:
    whole = command("whole", **request_).run()
    stopped = command("stopped", **request_)
    stopped.stop(25)
    while not isinstance(stopped.events()[-1], End):
        stopped.stop(25, resume=True)
    assert sum(isinstance(event, Resumed) for event in stopped.events()) > 3
    assert decided(read_plan(stopped.out / PLAN)) == decided(whole.plan)


@pytest.mark.slow
def test_killed_after_any_record_a_run_is_resumed_to_the_same_plan(command: MakeCommand) -> None:
    whole = command("whole", **FAILING)
    expected = decided(whole.run().plan)
    lines = whole.journal.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines) + 1):
        killed = command(f"killed-{number}", **FAILING)
        killed.out.mkdir()
        killed.journal.write_bytes(b"".join(lines[:number]))
        assert decided(killed.resume().plan) == expected, f"killed after line {number}"
        assert killed.journal.read_bytes().startswith(b"".join(lines[:number]))


def test_what_was_measured_is_not_measured_again(command: MakeCommand) -> None:
    whole = command("whole")
    whole.run()
    orders = [event for event in whole.events() if isinstance(event, LaunchOrder)]
    stopped = command("stopped")
    stopped.stop(40)
    before = stopped.journal.read_bytes()
    stopped.resume()
    assert stopped.journal.read_bytes().startswith(before)
    assert len([event for event in stopped.events() if isinstance(event, LaunchOrder)]) <= len(orders) + 1


def test_a_torn_end_is_kept_aside(command: MakeCommand) -> None:
    whole = command("whole")
    expected = decided(whole.run().plan)
    data = whole.journal.read_bytes()
    cut = len(data) * 2 // 3
    kept, torn = data[: data.rfind(b"\n", 0, cut) + 1], data[data.rfind(b"\n", 0, cut) + 1 : cut]
    assert torn
    killed = command("killed")
    killed.out.mkdir()
    killed.journal.write_bytes(kept + torn)
    assert decided(killed.resume().plan) == expected
    assert killed.journal.read_bytes().startswith(kept)
    assert (killed.out / "journal.jsonl.torn").read_bytes() == torn
    assert not list(killed.out.glob("*.lock"))


# What cannot be continued -------------------------------------------------------------------------


def test_a_damaged_middle_is_refused_with_its_line_and_changes_nothing(command: MakeCommand) -> None:
    done = command()
    done.run()
    lines = done.journal.read_bytes().splitlines(keepends=True)
    lines[11] = lines[11].replace(b"launch", b"lunch!", 1)
    done.journal.write_bytes(b"".join(lines))
    before = files(done.out)
    with pytest.raises(JournalDamaged, match=r"journal\.jsonl: line 12 is damaged; .* nothing was changed"):
        done.resume()
    assert files(done.out) == before


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_journal_that_ends_in_its_header_is_refused_and_unchanged(command: MakeCommand, cut: int) -> None:
    done = command()
    done.run()
    done.journal.write_bytes(done.journal.read_bytes()[:cut])
    before = files(done.out)
    with pytest.raises(UsageError, match="ends before anything was measured; start anew with --force"):
        done.resume()
    assert files(done.out) == before


def test_without_a_journal_there_is_nothing_to_resume(command: MakeCommand) -> None:
    none = command()
    with pytest.raises(UsageError, match=r"has no journal\.jsonl to go on with; leave --resume out"):
        none.resume()
    assert not none.out.exists()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed was 0 and is 1;"),
        ({"model": "fake:flat"}, "target.model.id was 'fake:tiny' and is 'fake:flat';"),
        ({"profile": "ci-micro"}, "profile.name was 'small' and is 'ci-micro';"),
        ({"contexts": (16,)}, "profile.scenarios was .*'prompt_tokens': 8.* and is .*'prompt_tokens': 16"),
        ({"space": "full"}, "space was 'safe' and is 'full';"),
        ({"pinned": {"kernel": "eager"}}, "pinned.kernel was None and is 'eager'"),
        ({"excluded": (("cache", "static"),)}, r"excluded was \[\] and is \[\['cache', 'static'\]\];"),
        ({"threads": 1}, "target.threads was None and is 1; machine.fingerprint was .*machine.threads was None"),
        ({"incumbent": {"cache": "static"}}, "what runs today is cache=static now;"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_request_is_refused_naming_what_differs(
    command: MakeCommand, changes: dict[str, Any], difference: str
) -> None:
    stopped = command()
    stopped.run(40)
    before = files(stopped.out)
    with pytest.raises(UsageError, match=f"cannot be resumed: {difference}") as caught:
        stopped.resume(**changes)
    assert str(caught.value).endswith("; mend that, or start anew with --force")
    assert files(stopped.out) == before


def test_another_engine_version_is_refused(command: MakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = command()
    stopped.run(40)

    def upgraded(self: FakeEngine, device: str | None, options: Mapping[str, str]) -> Probe:
        return Probe(device="cpu", versions={"kvat-core": "9"})

    monkeypatch.setattr(FakeEngine, "probe", upgraded)
    with pytest.raises(UsageError, match=r"versions\.kvat-core was '[^']+' and is '9'"):
        stopped.resume()


def test_another_machine_is_refused(command: MakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = command()
    stopped.run(40)
    monkeypatch.setattr("kvat_core.machine.cpu.cpu_name", lambda: "another one")
    with pytest.raises(UsageError, match=r"machine\.cpu was '[^']*' and is 'another one'"):
        stopped.resume()


def test_what_was_excluded_for_want_of_memory_stays_excluded_when_there_is_more(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(settings: Mapping[str, str], free: int) -> str | None:
        return None if settings["cache"] != "static" else f"does not fit the {free} bytes free" if free < 9 else None

    def with_free(free: int) -> None:
        monkeypatch.setattr(FakeEngine, "check", lambda self, settings, shape, probe: check(settings, free))

    with_free(3)
    stopped = command()
    stopped.run(40)
    with_free(9)
    resumed = stopped.resume().plan
    with_free(3)
    assert decided(resumed) == decided(command("whole").run().plan)
    # The other way round it cannot go on: a candidate that has begun would not fit any more.
    with_free(9)
    roomy = command("roomy")
    roomy.run(40)
    with_free(4)
    with pytest.raises(UsageError, match=r"cache=static was tried; now it is excluded \(does not fit the 4 bytes free"):
        roomy.resume()
    # Of a complete run nothing is tried any more.
    with_free(9)
    complete = command("complete")
    plan = complete.run().plan
    with_free(4)
    assert complete.resume().plan == plan


def test_a_run_with_equal_recipes_is_continued(command: MakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FakeEngine.recipe

    def alike(self: FakeEngine, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        kernel = "auto" if settings["kernel"] == "flash" else settings["kernel"]
        return recipe(self, {**settings, "kernel": kernel}, scenario, target)

    monkeypatch.setattr(FakeEngine, "recipe", alike)
    stopped = command()
    stopped.run(40)
    plan = stopped.resume().plan
    assert any("has the same recipe as" in (candidate.reason or "") for candidate in plan.candidates)
    assert decided(plan) == decided(command("whole").run().plan)


def test_another_recipe_for_a_candidate_is_refused(command: MakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = command()
    stopped.run(40)
    recipe = FakeEngine.recipe

    def changed(self: FakeEngine, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        made = recipe(self, settings, scenario, target)
        return made.model_copy(update={"warmup": 3}) if settings["kernel"] == "eager" else made

    monkeypatch.setattr(FakeEngine, "recipe", changed)
    with pytest.raises(UsageError, match=r"what is done for (cache=\w+ )?kernel=eager differs"):
        stopped.resume()


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"excluded": (("cache", "static"),)}, {"incumbent": {"cache": "static"}}, "excluded was"),
        (
            {"excluded": (("cache", "static"), ("cache", "paged"))},
            {"excluded": (("kernel", "eager"), ("kernel", "flash"))},
            "excluded was",
        ),
    ],
)
def test_another_request_is_told_by_what_differs_and_nothing_else(
    command: MakeCommand, before: dict[str, Any], now: dict[str, Any], named: str
) -> None:
    command(**before).run(30)
    with pytest.raises(UsageError, match=named):
        command(**now).resume()


@pytest.fixture
def own_prompt(command: MakeCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The command with a prompt text of the user's own; their key stays in a directory of the test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(text: str) -> Any:
        prompt = PromptSource(kind="text", value=text)
        return command(profile=command().request.profile.model_copy(update={"prompt": prompt}))

    return make


def test_another_text_of_ones_own_is_refused_without_telling_it(own_prompt: Callable[[str], Any]) -> None:
    own_prompt("the first text").run(40)
    with pytest.raises(UsageError, match="cannot be resumed: the text of the prompts differs") as caught:
        own_prompt("the second text").resume()
    assert "second" not in str(caught.value)
    assert own_prompt("the first text").resume().stopped is None


def test_where_no_text_can_be_told_from_another_a_run_is_not_resumed(
    own_prompt: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    own_prompt("the first text").run(40)
    with pytest.raises(UsageError, match="whether the prompt text is the same cannot be told"):
        own_prompt("the second text").resume()


# What a stopped and a finished run have -----------------------------------------------------------


def test_a_stopped_run_has_a_partial_plan(command: MakeCommand) -> None:
    stopped = command()
    result = stopped.run(40)
    assert isinstance(result.stopped, Interrupted)
    assert str(result.stopped) == "interrupted; go on with --resume"
    assert result.plan.partial
    assert read_plan(stopped.out / PLAN) == result.plan
    assert any("go on with --resume" in note for note in result.plan.notes)
    assert stopped.events()[-1] == Stopped(kind="interrupted", reason="by the user")
    assert not stopped.resume().plan.partial
    assert isinstance(stopped.events()[-1], End)


def test_a_partial_plan_that_turned_out_wrong_is_moved_aside(command: MakeCommand) -> None:
    stopped = command()
    partial = stopped.run(40).plan
    snippet = (stopped.out / "snippet.py").read_text()

    class Failing(stopped.worker):  # type: ignore[name-defined,misc]
        def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
            if operation == "decode":
                raise WorkerFailed(Failure(kind="oom_host", phase=phase, reason="no room"), alive=False)
            return super().call(operation, arguments, phase, limits)

    moved = r"best_plan\.json is of before and now called best_plan\.json\.1; snippet\.py is .* snippet\.py\.1"
    with pytest.raises(AllFailed, match=moved):
        dataclasses.replace(stopped, worker=Failing).resume()
    assert not {PLAN, "snippet.py"} & files(stopped.out).keys()
    assert read_plan(stopped.out / f"{PLAN}.1") == partial
    assert (stopped.out / "snippet.py.1").read_text() == snippet


def test_a_snippet_of_before_does_not_stay_beside_a_new_plan(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = command()
    stopped.run(40)

    def broken(self: FakeEngine, plan: Plan) -> dict[str, str]:
        raise KeyError("gone")

    monkeypatch.setattr(FakeEngine, "snippet", broken)
    (warning,) = stopped.resume().warnings
    assert warning.startswith("the snippet was not written: KeyError")
    assert warning.endswith("(snippet.py is of before and now called snippet.py.1)")
    assert not (stopped.out / "snippet.py").exists()


class SecondReport:
    name = "second"
    file_name = "second.txt"

    def render(self, plan: Plan) -> str:
        return plan.verdict


def test_no_file_of_before_stays_beside_a_new_plan_on_a_full_disk(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "reports", lambda: ([SecondReport()], []))
    stopped = command()
    stopped.run(40)
    mkstemp = tempfile.mkstemp

    def full(*, dir: Path, prefix: str) -> tuple[int, str]:
        if PLAN not in prefix:
            raise OSError(errno.ENOSPC, "No space left on device")
        return mkstemp(dir=dir, prefix=prefix)

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert "snippet.py cannot be written" in str(stopped.resume().unwritten)
    assert files(stopped.out).keys() == {JOURNAL, PLAN, "snippet.py.1", "second.txt.1"}


def test_a_file_that_cannot_be_moved_aside_is_named_and_costs_no_plan(
    command: MakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = command()
    stopped.run(40)

    def broken(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FakeEngine, "snippet", broken)
    monkeypatch.setattr(Path, "rename", broken)
    result = stopped.resume()
    (warning,) = result.warnings
    assert "snippet.py is of before, do not use it; it cannot be moved aside (Permission denied)" in warning
    assert read_plan(stopped.out / PLAN) == result.plan


def test_a_run_stopped_before_anything_is_decidable_says_so(command: MakeCommand) -> None:
    stopped = command()
    with pytest.raises(Interrupted, match=r"^interrupted; go on with --resume; nothing can be decided yet$"):
        stopped.run(20)
    assert {path.name for path in stopped.out.iterdir()} == {JOURNAL}
    assert isinstance(stopped.events()[-1], Stopped)


def test_a_run_stopped_before_it_has_begun_leaves_nothing(command: MakeCommand) -> None:
    stopped = command()
    with pytest.raises(Interrupted, match=r"^interrupted; measuring had not begun, and nothing was changed$"):
        stopped.run(1)
    assert not stopped.out.exists()


def test_a_finished_run_gets_its_lost_plan_back_without_measuring(command: MakeCommand) -> None:
    done = command()
    plan = done.run().plan
    before = files(done.out)
    (done.out / PLAN).unlink()
    asked: list[str] = []

    class Watched(done.worker):  # type: ignore[name-defined,misc]
        def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
            asked.append(operation)
            return super().call(operation, arguments, phase, limits)

    again = dataclasses.replace(done, worker=Watched).resume()
    assert again.plan == plan
    assert files(done.out) == before
    assert asked == ["start", "probe", "describe"]


def test_the_header_and_the_start_of_a_run_stay_what_they_were(command: MakeCommand) -> None:
    stopped = command()
    stopped.run(40)
    first = stopped.events()[0]
    assert isinstance(first, Header)
    plan = stopped.resume().plan
    assert stopped.events()[0] == first
    assert plan.created == first.created
