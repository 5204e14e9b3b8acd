from __future__ import annotations

import errno
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvat_core import read_plan, tuner
from kvat_core.errors import CannotWrite, Interrupted
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.interrupt import Stop
from kvat_core.tuner import TuneRequest, TuneResult

Run = Callable[..., Any]
FAKE = ("tune", "--engine", "fake", "--profile", "ci-micro")
FILES = {"journal.jsonl", "best_plan.json", "snippet.py", "report.md"}


def result_of(out: Path, **plan_changes: Any) -> TuneResult:
    plan = read_plan(out / "best_plan.json").model_copy(update=plan_changes)
    return TuneResult(
        plan=plan,
        out=out,
        files=(out / "best_plan.json", out / "snippet.py"),
        wall_s=100.0,
        loading_s=30.0,
        importing_s=10.0,
        generating_s=65.0,
        warnings=("report 'x' is broken",),
    )


def measured_already(monkeypatch: pytest.MonkeyPatch, result: TuneResult) -> tuple[list[TuneRequest], list[Deadlines]]:
    """Replace measuring by a result that is there; what was asked for, and its deadlines, end up in the lists."""
    requests: list[TuneRequest] = []
    limits: list[Deadlines] = []

    def tune(request: TuneRequest, on_progress: object, *, stop: Stop, deadlines: Deadlines) -> TuneResult:
        requests.append(request)
        limits.append(deadlines)
        return result

    monkeypatch.setattr(tuner, "tune", tune)
    return requests, limits


def test_options_become_the_request(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, _ = measured_already(monkeypatch, result_of(tuned))
    words = (
        "tune --engine e --model m --revision r --allow-download --device cuda:1 --threads 3 --profile p "
        "--context 2048,4096 --batch 1,4 --space full --set a=1 --set b=x=y --exclude c=2 --exclude c=3 "
        "--incumbent d=4 --seed 7 --search grid --budget 10m --max-launches 9 --out o --force --quiet"
    )
    assert kvat(*words.split()).code == 0
    assert requests == [
        TuneRequest(
            out=Path("o"),
            engine="e",
            model="m",
            revision="r",
            allow_download=True,
            device="cuda:1",
            threads=3,
            profile="p",
            contexts=(2048, 4096),
            batches=(1, 4),
            space="full",
            pinned={"a": "1", "b": "x=y"},
            excluded=(("c", "2"), ("c", "3")),
            incumbent={"d": "4"},
            seed=7,
            search="grid",
            budget_s=600.0,
            max_launches=9,
            force=True,
        )
    ]


def test_without_options_the_request_is_the_default(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, limits = measured_already(monkeypatch, result_of(tuned))
    kvat("tune")
    assert requests == [TuneRequest()]
    assert limits == [Deadlines()]


def test_resume_is_part_of_the_request(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, _ = measured_already(monkeypatch, result_of(tuned))
    assert kvat("tune", "--resume", "--quiet").code == 0
    assert requests == [TuneRequest(resume=True)]


def test_a_deadline_replaces_that_of_its_phase_alone(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, limits = measured_already(monkeypatch, result_of(tuned))
    assert kvat("tune", "--quiet", "--deadline", "load=7.5", "--deadline", "first-token=2").code == 0
    assert limits == [Deadlines(load_s=7.5, first_token_s=2)]


def test_a_run_prints_launches_decision_settings_files_and_times(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--model", "fake:tiny", "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    run, summary = outcome.out.split("Better: switch to cache=static", 1)
    launches = run.splitlines()
    assert all(line.startswith(f"launch {number} for ") for number, line in enumerate(launches))
    assert len(launches) == len(_records(tmp_path / "run", "launch"))
    assert "(today: dynamic)" in summary
    assert "\nNotes:\n  the weights are random: speed and memory are representative" in summary
    for name in FILES:
        assert f"\n  {tmp_path / 'run' / name}\n" in summary
    assert f"\n  kvat apply --plan {tmp_path / 'run' / 'best_plan.json'} --write FILE " in summary
    assert summary.splitlines()[-1].startswith("Took ")


def test_a_failure_is_one_line_while_the_run_goes_on(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--model", "fake:crash", "--space", "full", "--out", tmp_path / "run")
    failures = [line for line in outcome.out.splitlines() if line.startswith("failed: ")]
    assert outcome.code == 0
    assert len(failures) == len(_records(tmp_path / "run", "failed")) > 0
    assert all("crash" in line for line in failures)
    again = [line.endswith("; it is tried once more") for line in failures]
    assert again == [True, False]


def test_json_is_the_plan_alone(kvat_process: Run, tmp_path: Path) -> None:
    outcome = kvat_process(*FAKE, "--json", "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (tmp_path / "run" / "best_plan.json").read_text(encoding="utf-8")


def test_quiet_prints_nothing(kvat_process: Run, tmp_path: Path) -> None:
    outcome = kvat_process(*FAKE, "--quiet", "--out", tmp_path / "run")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_an_earlier_run_is_left_alone_without_force(kvat: Run, tmp_path: Path) -> None:
    words = (*FAKE, "--quiet", "--out", tmp_path / "run")
    assert kvat(*words).code == 0
    refused = kvat(*words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--force" in refused.err
    assert kvat(*words, "--force").code == 0


def test_all_failed_is_exit_code_5(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--model", "fake:all-fail", "--quiet", "--out", tmp_path / "run")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (5, "", 1)


def test_undecided_is_a_result_and_no_failure(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    incumbent = read_plan(tuned / "best_plan.json").incumbent
    result = result_of(tuned, verdict="undecided", winner=incumbent)
    measured_already(monkeypatch, result)
    outcome = kvat("tune")
    assert outcome.code == 0
    assert outcome.out.startswith("Undecided: keep what you run today (default)")


def test_the_wall_time_is_split(kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_already(monkeypatch, result_of(tuned))
    outcome = kvat("tune")
    assert outcome.out.splitlines()[-1] == (
        "Took 1 min 40 s: 20 s loading the model, 10 s importing libraries, 1 min 05 s generating, 5.0 s other"
    )
    assert outcome.err == "kvat: warning: report 'x' is broken\n"


def test_the_next_step_names_the_directory_that_a_plan_does_not(
    kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(tuned / "best_plan.json")
    local = plan.model.model_copy(update={"id": "random:./mine"})
    measured_already(monkeypatch, result_of(tuned, model=local))
    shown = kvat("tune", "--model", "random:/some where/mine").out
    assert f"\n  python {tuned / 'snippet.py'} '/some where/mine' " in shown


def test_a_renderer_s_complaint_is_not_swallowed_by_json(
    kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_already(monkeypatch, replace(result_of(tuned), warnings=("one", "two")))
    assert kvat("tune", "--json").err == "kvat: warning: one\nkvat: warning: two\n"
    assert kvat("tune", "--quiet").err == "kvat: warning: one\nkvat: warning: two\n"


def test_a_full_disk_behind_standard_output_hides_not_how_a_run_ended(
    kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    stopped = Interrupted("interrupted; go on with --resume")
    measured_already(monkeypatch, replace(result_of(tuned), stopped=stopped))
    monkeypatch.setattr("kvat_cli.summary.print_summary", full)
    outcome = kvat("tune")
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, f"kvat: error: {stopped}")


@pytest.mark.parametrize("option", ["--quiet", "--json", None])
def test_a_file_that_could_not_be_written_is_no_success(
    kvat: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch, option: str | None
) -> None:
    result = result_of(tuned)
    files = tuple(path for path in result.files if path.name != "snippet.py")
    full = CannotWrite("snippet.py cannot be written (No space left on device); write it with --resume")
    measured_already(monkeypatch, replace(result, files=files, unwritten=full))
    outcome = kvat("tune", *filter(None, [option]))
    assert outcome.code == 2
    assert outcome.err.endswith(f"kvat: error: {full}\n")
    assert "snippet.py" not in outcome.out


def test_a_terminal_gets_a_live_table(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "kvat_cli", *FAKE, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = _read_all(leader)
    assert process.returncode == 0
    for text in (
        "looking at the machine",
        "candidate",
        "TTFT",
        "cache=static",
        "launches: 0 done",
        "tok/s",
        "Better: switch to",
    ):
        assert text in shown
    assert "launch 0 for" not in shown


def _read_all(leader: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(leader)
    return b"".join(chunks).decode("utf-8", "replace")


def _records(out: Path, kind: str) -> list[Any]:
    lines = (out / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["payload"] for record in map(json.loads, lines) if record["type"] == kind]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_search_whose_package_is_missing_names_it(
    kvat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = kvat(*FAKE, "--search", "optuna", *more, "--out", tmp_path / "run")

    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert 'pip install "kvat-core[optuna]"' in outcome.err
    assert not (tmp_path / "run").exists()
