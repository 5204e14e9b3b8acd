"""`kvat plan`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core import read_plan
from kvat_core.schema import Plan

Run = Callable[..., Any]


@pytest.fixture
def first_token(tuned: Path, tmp_path: Path) -> Path:
    """The profile of the run, with another objective."""
    profile = json.loads((tuned / "best_plan.json").read_text(encoding="utf-8"))["profile"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**profile, "name": "mine", "objective": {"ttft": 1}}), encoding="utf-8")
    return path


def test_without_a_profile_it_prints_the_plan_of_the_run(kvat: Run, tuned: Path) -> None:
    outcome = kvat("plan", "--journal", tuned / "journal.jsonl", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (tuned / "best_plan.json").read_text(encoding="utf-8")


def test_another_profile_is_decided_for_and_written(kvat: Run, tuned: Path, first_token: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    before = (tuned / "journal.jsonl").read_bytes()
    words = ("plan", "--journal", tuned / "journal.jsonl", "--profile", first_token, "--out", target)
    outcome = kvat(*words)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("Tie: keep what you run today (default)")
    assert lines[-2:] == ["Files:", f"  {target}"]
    assert read_plan(target).profile.name == "mine"
    assert (tuned / "journal.jsonl").read_bytes() == before
    refused = kvat(*words)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"kvat: error: {target} exists and is left as it is; name a new file with --out\n"


def test_a_shape_that_was_not_measured_is_one_line(kvat: Run, tuned: Path) -> None:
    outcome = kvat("plan", "--journal", tuned / "journal.jsonl", "--profile", "chat-agent")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"kvat: error: {tuned / 'journal.jsonl'} does not hold ")
    assert len(outcome.err.splitlines()) == 1


def test_a_journal_without_figures_does_not_suffice(kvat: Run, tuned: Path, tmp_path: Path) -> None:
    bare = tmp_path / "journal.jsonl"
    bare.write_bytes((tuned / "journal.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert kvat("plan", "--journal", bare).code == 3


def test_limits_can_be_given_afterwards(kvat: Run, tuned: Path) -> None:
    journal = tuned / "journal.jsonl"
    tight = kvat("plan", "--journal", journal, "--max-ttft", "0.001ms")
    assert tight.code == 4
    assert "decide again for wider ones with kvat plan" in tight.err
    assert kvat("plan", "--journal", journal, "--max-ttft", "1000s").code == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of one finished run of weights that predict something, with caches that lose output."""
    from kvat_cli.boundary import main

    out = tmp_path_factory.mktemp("trained") / "run"
    words = ("--engine", "fake", "--model", "fake:trained", "--space", "full", "--exclude", "graph=on")
    assert main(["tune", *words, "--quiet", "--out", str(out)]) == 0
    return out


def test_what_may_be_lost_can_be_decided_afterwards(kvat: Run, trained: Path) -> None:
    def eligible(*words: str) -> set[str | None]:
        outcome = kvat("plan", "--journal", trained / "journal.jsonl", "--json", *words)
        assert outcome.code == 0
        found = Plan.model_validate_json(outcome.out).candidates
        return {one.fidelity.verdict for one in found if one.fidelity.lossy and one.eligible}

    assert eligible() == {"close"}
    assert eligible("--max-kl", "1e-6") == set()
    assert eligible("--allow-lossy") == {"close", "lossy"}


def test_what_a_run_allowed_to_be_lost_can_be_forbidden_afterwards(kvat: Run, tmp_path: Path) -> None:
    words = ("--engine", "fake", "--model", "fake:trained", "--space", "full", "--exclude", "graph=on")
    assert kvat("tune", *words, "--allow-lossy", "--quiet", "--out", tmp_path / "run").code == 0

    def eligible(*words: str) -> set[str | None]:
        outcome = kvat("plan", "--journal", tmp_path / "run" / "journal.jsonl", "--json", *words)
        found = Plan.model_validate_json(outcome.out).candidates
        return {one.fidelity.verdict for one in found if one.fidelity.lossy and one.eligible}

    assert "lossy" in eligible()
    assert eligible("--no-allow-lossy") == {"close"}


def test_what_is_known_of_the_winner_s_output_is_a_line(kvat: Run, trained: Path, tuned: Path) -> None:
    (line,) = (
        line for line in kvat("plan", "--journal", trained / "journal.jsonl").out.splitlines() if "Output:" in line
    )
    assert re.fullmatch(
        r"Output: exact \(over 256 forced tokens of text, KL \S+ nats, first choices agree in 100\.0 %\); "
        r"what earlier requests said changes no answer\.",
        line,
    )
    assert "Output:" not in kvat("plan", "--journal", tuned / "journal.jsonl").out


def test_it_imports_no_engine(tuned: Path) -> None:
    code = (
        "import sys; from kvat_cli.boundary import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'rich', 'jinja2'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    words = ["plan", "--journal", str(tuned / "journal.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
