"""A budget: it always holds, and leaves the best plan so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_cli.options import duration_s
from kvat_core import read_plan
from kvat_core.errors import UsageError
from kvat_core.journal import read_journal
from kvat_core.schema import End, LaunchOrder, Stopped

Run = Callable[..., Any]
TUNE = ("tune", "--model", "fake:tiny", "--profile", "ci-micro", "--quiet", "--out")


def launches(out: Path) -> list[LaunchOrder]:
    return [event for event in read_journal(out / "journal.jsonl") if isinstance(event, LaunchOrder)]


def ends(out: Path) -> list[object]:
    return [event for event in read_journal(out / "journal.jsonl") if isinstance(event, Stopped | End)]


def test_launches_run_out_and_the_plan_is_of_what_there_is(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kvat(*TUNE, out, "--max-launches", 4).code == 0
    assert len(launches(out)) == 4
    plan = read_plan(out / "best_plan.json")
    assert plan.partial
    assert any("what the run may take does not suffice for another launch" in note for note in plan.notes)
    assert [one.kind for one in ends(out) if isinstance(one, Stopped)] == ["budget"]


def test_a_run_goes_on_with_another_budget(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kvat(*TUNE, out, "--max-launches", 2).code == 0
    assert kvat(*TUNE, out, "--resume", "--max-launches", 2).code == 0
    assert len(launches(out)) == 4
    assert kvat(*TUNE, out, "--resume").code == 0
    assert not read_plan(out / "best_plan.json").partial


def test_a_budget_that_is_more_than_enough_changes_nothing(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kvat(*TUNE, out, "--budget", "1h", "--max-launches", 1000).code == 0
    assert not read_plan(out / "best_plan.json").partial


@pytest.mark.slow
def test_a_hanging_call_does_not_outlast_the_budget(kvat_process: Run, tmp_path: Path) -> None:
    started = time.monotonic()
    done = kvat_process("tune", "--model", "fake:hang", "--profile", "ci-micro", "--out", tmp_path, "--budget", "8s")
    # The script hangs for an hour in the first launch; the worker gets a moment to end.
    assert time.monotonic() - started < 60
    # Whether something was measured before the call that hangs depends on the machine.
    assert done.code in (0, 3)
    assert [one.kind for one in ends(tmp_path) if isinstance(one, Stopped)] == ["budget"]


def test_a_budget_in_which_nothing_can_be_decided_has_an_exit_code_of_its_own(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = kvat("tune", "--model", "fake:tiny", "--profile", "ci-micro", "--out", out, "--budget", "0.001s")
    assert done.code == 3
    assert "the time that the run may take is used up; measuring had not begun" in done.err
    assert not out.exists()


def test_an_unknown_search_is_refused_before_anything_is_touched(kvat: Run, tmp_path: Path) -> None:
    done = kvat(*TUNE, tmp_path / "out", "--search", "luck")
    assert done.code == 2
    assert "no search is called 'luck'; choose one of grid, " in done.err
    assert not (tmp_path / "out").exists()


def test_the_grid_gives_everybody_the_same(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kvat(*TUNE, out, "--search", "grid").code == 0
    assert {order.purpose for order in launches(out)} == {"timing", "memory"}
    timed = Counter(cell.candidate for order in launches(out) if order.purpose == "timing" for cell in order.cells)
    eligible = [one.id for one in read_plan(out / "best_plan.json").candidates if one.eligible]
    assert len(eligible) > 1
    assert {timed[name] for name in eligible} == {3}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert duration_s("--budget", text) == seconds
    assert duration_s("--budget", None) is None


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-1m", "nanh", "infs", "1d", "ten m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget takes a duration with its unit, s, m or h, e\.g\. 10m; got "):
        duration_s("--budget", text)
