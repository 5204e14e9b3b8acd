from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvat_core import tuner
from kvat_core.errors import AllFailed, Interrupted, NothingFeasible, UsageError

Run = Callable[..., Any]
FAKE = ("tune", "--engine", "fake", "--model", "fake:tiny")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune", "--context", "abc"), "--context takes whole numbers above 0, separated by commas, e.g. 2048,4096; "),
        (("tune", "--context", "0"), "--context takes whole numbers above 0"),
        (("tune", "--context", ""), "--context takes whole numbers above 0"),
        (
            ("tune", "--batch", "1,,4"),
            "--batch takes whole numbers above 0, separated by commas, e.g. 1,4,8; got '1,,4'",
        ),
        (("tune", "--set", "cache"), "--set takes KNOB=VALUE, e.g. cache=static; got 'cache'"),
        (("tune", "--exclude", "=static"), "--exclude takes KNOB=VALUE"),
        (("tune", "--incumbent", "cache="), "--incumbent takes KNOB=VALUE"),
        (("tune", "--set", "a=1", "--set", "a=2"), "--set gives 'a' two values, '1' and '2'; give one"),
        (("tune", "--quiet", "--json"), "kvat tune takes one of --quiet and --json"),
        (("tune", "--force", "--resume"), "kvat tune takes one of --force and --resume"),
        (
            (*FAKE, "--resume"),
            "--out kvat-out/fake-tiny-ci-micro has no journal.jsonl to go on with; leave --resume out",
        ),
        (
            ("tune", "--deadline", "lunch=60"),
            "--deadline has no phase 'lunch'; choose one of start, load, download, compile, first-token, gap, sample, "
            "other, grace",
        ),
        (("tune", "--deadline", "load_s=60"), "--deadline has no phase 'load_s'"),
        (("tune", "--deadline", "load"), "--deadline takes PHASE=SECONDS, above 0, e.g. load=600; got 'load'"),
        (("tune", "--deadline", "load=soon"), "--deadline takes PHASE=SECONDS, above 0, e.g. load=600; got 'soon'"),
        (("tune", "--deadline", "load=0"), "--deadline takes PHASE=SECONDS"),
        (("tune", "--deadline", "load=-1"), "--deadline takes PHASE=SECONDS"),
        (("tune", "--deadline", "load=inf"), "--deadline takes PHASE=SECONDS"),
        (("tune", "--deadline", "load=nan"), "--deadline takes PHASE=SECONDS"),
        (("tune", "--deadline", "gap=1", "--deadline", "gap=2"), "--deadline gives 'gap' two values, '1' and '2'"),
        (("tune", "--space", "huge"), "Invalid value for '--space'"),
        (("tune", "--threads", "0"), "Invalid value for '--threads'"),
        (("tune", "--threads", "two"), "Invalid value for '--threads'"),
        (("tune", "--colour"), "No such option: --colour"),
        (("tune", "--engine", "none-such"), "no engine is called 'none-such'"),
        ((*FAKE, "--profile", "none-such"), "unknown profile 'none-such'"),
        ((*FAKE, "--set", "none=such"), ""),
        (("profiles", "none-such"), "unknown profile 'none-such'"),
        (("profiles", "none.json"), "cannot read profile none.json"),
        (("apply",), "Missing option '--plan'"),
        (
            ("apply", "--plan", "p.json"),
            "kvat apply takes one of --print-snippet, --write FILE and",
        ),
        (("apply", "--plan", "p.json", "--print-snippet", "--write", "x"), "kvat apply takes one of"),
        (("apply", "--plan", "p.json", "--generation-config", ".", "--write", "x"), "kvat apply takes one of"),
        (("apply", "--plan", "p.json", "--print-snippet", "--partial"), "--partial goes with --generation-config DIR"),
        (("apply", "--plan", "none.json", "--print-snippet"), "cannot read plan none.json"),
        (("schema", "report"), "Invalid value for 'kind'"),
        (("schema",), "Missing argument 'kind'"),
        (("tuna",), "No such command 'tuna'"),
        (("--colour",), "No such option: --colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    kvat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kvat(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"kvat: error: {message}")
    assert outcome.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(kvat_process: Run) -> None:
    outcome = kvat_process("tune", "--context", "abc")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("kvat: error: --context takes")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("wrong\nplace"), 2, "kvat: error: wrong place\n"),
        (NothingFeasible("none fits"), 4, "kvat: error: none fits\n"),
        (AllFailed("all failed"), 5, "kvat: error: all failed\n"),
        (
            ZeroDivisionError("a secret prompt"),
            70,
            "kvat: error: internal error (ZeroDivisionError); repeat with --debug for the traceback\n",
        ),
        (Interrupted("interrupted; go on with --resume"), 130, "kvat: error: interrupted; go on with --resume\n"),
        (KeyboardInterrupt(), 130, "kvat: error: interrupted; if a run had begun, go on with --resume\n"),
    ],
)
def test_what_escapes_becomes_one_line(
    kvat: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(tuner, "tune", fail)
    outcome = kvat("tune", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", line)


@pytest.mark.parametrize("words", [("--debug", "profiles", "none-such"), ("profiles", "none-such", "--debug")])
def test_debug_gives_the_traceback_wherever_it_stands(kvat: Run, words: tuple[str, ...]) -> None:
    outcome = kvat(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert "kvat: error: unknown profile 'none-such'" in outcome.err.splitlines()[-1]


def test_help_lists_every_command(kvat: Run) -> None:
    assert kvat().out == kvat("--help").out
    for command in ("tune", "plan", "apply", "engines", "profiles", "doctor", "schema"):
        assert f"\n  {command} " in kvat("--help").out
        assert f"Usage: kvat {command}" in kvat(command, "--help").out


def test_version(kvat: Run) -> None:
    outcome = kvat("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("kvat 0.")


def test_a_reader_that_goes_away_is_no_traceback(tuned: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kvat_cli", "apply", "--plan", str(tuned / "best_plan.json"), "--print-snippet"]
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


CLOSED = ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("words", ["--help", "profiles none-such", "tune --engine fake --out {out}"])
def test_streams_that_are_closed_from_the_start_change_nothing(tmp_path: Path, words: str, closed: str) -> None:
    line = f"{shlex.quote(sys.executable)} -m kvat_cli {words.format(out=shlex.quote(str(tmp_path / 'run')))} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == (2 if "none-such" in words else 0)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert (tmp_path / "run" / "report.md").exists() == ("tune" in words)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [("--help",), ("tune", "--engine", "fake", "--out", "run")])
def test_a_full_standard_output_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "kvat_cli", *words]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path, timeout=120
        )
    assert done.returncode == 2
    assert done.stderr.startswith("kvat: error: standard output cannot be written (No space left on device)")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "run" / "report.md").exists() == ("tune" in words)


def test_an_error_comes_after_all_output_also_in_a_file(tmp_path: Path) -> None:
    code = "import sys; from kvat_cli.boundary import main; print('first'); sys.exit(main(['profiles', 'none-such']))"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, check=False)
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == "first"
    assert second.startswith("kvat: error: unknown profile")


def test_an_encoding_without_the_characters_is_no_error(tuned: Path) -> None:
    command = [sys.executable, "-m", "kvat_cli", "tune", "--engine", "fake", "--out", str(tuned.parent / "ascii")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert b"\\xd7" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["profiles"], ["profiles", "rag"], ["apply", "PLAN", "--print-snippet"]])
def test_quick_commands_import_nothing_heavy(tuned: Path, words: list[str]) -> None:
    words = [
        option for word in words for option in (("--plan", str(tuned / "best_plan.json")) if word == "PLAN" else [word])
    ]
    code = (
        "import sys; from kvat_cli.boundary import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'scipy', 'numpy', 'rich', 'jinja2'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_does_not_import_the_schema() -> None:
    code = "import sys; from kvat_cli.boundary import main; main(['--help']); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
