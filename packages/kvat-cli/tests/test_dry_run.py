"""`kvat tune --dry-run`: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_cli.preview import print_dry_run
from kvat_core import preview
from kvat_core.preview import DryRun, TimeBounds
from kvat_core.schema import Scenario

Run = Callable[..., Any]
FAKE = ("tune", "--engine", "fake", "--profile", "ci-micro", "--dry-run")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def found(kvat: Run, out: Path) -> DryRun:
    outcome = kvat(*FAKE, "--space", "full", "--json", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    return DryRun.model_validate_json(outcome.out)


def test_candidates_exclusions_and_launches_are_printed(kvat: Run, found: DryRun, out: Path) -> None:
    outcome = kvat(*FAKE, "--space", "full", "--out", out)

    assert (outcome.code, outcome.err) == (0, "")
    assert all(candidate.label in outcome.out for candidate in found.candidates)
    told_by_value = {f"{knob.name}={one.name}" for knob in found.knobs for one in knob.values if one.unavailable}
    assert told_by_value == {"cache=paged"}
    for excluded in found.excluded:
        value, _, reason = excluded.reason.partition(": ")
        assert (reason if value in told_by_value else excluded.reason) in outcome.out
    assert "the scripted device has no pages" in outcome.out
    for knob in found.knobs:
        assert all(one.name in outcome.out for one in knob.values)
    assert f"about {found.launches} launches with --search race" in outcome.out
    assert f"to measure every candidate once takes {found.loads}" in outcome.out
    assert "Limits:" not in outcome.out


def test_nothing_is_left_behind(kvat: Run, found: DryRun, out: Path) -> None:
    assert found.out == str(out)
    assert not out.exists()


def test_an_earlier_run_is_left_alone(kvat: Run, tuned: Path) -> None:
    before = {path.name: path.read_bytes() for path in tuned.iterdir()}
    outcome = kvat(*FAKE, "--out", tuned)

    assert outcome.code == 0
    assert "the tune itself would be refused" in outcome.out
    assert {path.name: path.read_bytes() for path in tuned.iterdir()} == before


def test_json_is_one_object_alone(kvat_process: Run, out: Path) -> None:
    outcome = kvat_process(*FAKE, "--json", "--out", out)

    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out).keys() == DryRun.model_fields.keys()


def test_quiet_prints_nothing(kvat_process: Run, out: Path) -> None:
    outcome = kvat_process(*FAKE, "--quiet", "--out", out)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


@pytest.mark.parametrize(
    "words", [("--resume",), ("--model", "fake:none"), ("--set", "cache=none"), ("--json", "--quiet")]
)
def test_what_cannot_be_foretold_is_one_line_and_exit_code_2(kvat: Run, out: Path, words: tuple[str, ...]) -> None:
    outcome = kvat(*FAKE, *words, "--out", out)

    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert not out.exists()


def test_many_that_are_excluded_for_one_reason_are_counted(kvat: Run, out: Path) -> None:
    outcome = kvat(*FAKE, "--space", "full", "--exclude", "cache=static", "--out", out)

    (line,) = (line for line in outcome.out.splitlines() if "was excluded by request" in line)
    assert line.strip().startswith("cache=static; cache=static graph=on; cache=static kernel=flash and 3 more  ")


def test_options_of_what_cannot_run_are_no_choice(found: DryRun, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(unavailable: str | None) -> list[str]:
        cache = found.knobs[0]
        values = (
            one.model_copy(update={"unavailable": unavailable}) if one.name == "static" else one for one in cache.values
        )
        knobs = (cache.model_copy(update={"values": tuple(values)}), *found.knobs[1:])
        print_dry_run(found.model_copy(update={"knobs": knobs}))
        _, _, rest = capsys.readouterr().out.partition("\nValues of each knob:\n")
        return [line.split()[0] for line in rest.partition("\n\n")[0].splitlines()]

    assert shown(None) == ["cache", "kernel", "graph"]
    assert shown("nobody has it") == ["cache", "kernel"]


def test_of_very_many_candidates_some_are_named(found: DryRun, capsys: pytest.CaptureFixture[str]) -> None:
    one = found.candidates[0]
    many = tuple(one.model_copy(update={"label": f"number {number}"}) for number in range(60))
    print_dry_run(found.model_copy(update={"candidates": many}))
    said = capsys.readouterr().out
    assert "number 49 " in said
    assert "number 50 " not in said
    assert "\n  and 10 more, all of which --json names\n" in said


def test_limits_are_shown_in_words(kvat: Run, out: Path) -> None:
    outcome = kvat(*FAKE, "--max-ram", "6GiB", "--max-ttft", "p95:300ms", "--min-context", "100", "--out", out)
    _, _, limits = outcome.out.partition("\nLimits:\n")

    assert limits.splitlines()[:3] == ["  host memory ≤ 6144 MiB", "  TTFT p95 ≤ 300 ms", "  context ≥ 100 tokens"]


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("--max-kl", "0.05"), "KL from the reference ≤ 0.05 nats"),
        (("--allow-lossy",), "what loses output is recommended, however much it loses, unless it is broken"),
        (
            ("--max-kl", "0.05", "--allow-lossy"),
            "what loses output is recommended, however much it loses, unless it is broken",
        ),
    ],
)
def test_what_may_be_lost_is_among_the_limits_in_force(
    kvat: Run, out: Path, words: tuple[str, ...], limit: str
) -> None:
    _, _, limits = kvat(*FAKE, *words, "--out", out).out.partition("\nLimits:\n")

    assert limits.partition("\n\n")[0] == f"  {limit}"


def test_bounds_are_those_of_the_largest_scenario(
    kvat: Run, found: DryRun, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenarios = (Scenario(prompt_tokens=10, output_tokens=2), Scenario(prompt_tokens=5, output_tokens=2, batch_size=4))
    bounds = {"10+2x1": TimeBounds(ttft_s=1, decode_tps=10), "5+2x4": TimeBounds(ttft_s=0.0123, decode_tps=41.2)}
    first = found.candidates[0].model_copy(
        update={"bounds": bounds, "predicted_peak_bytes": 3 * 2**30, "misses": ("TTFT p50 ≤ 1 ms: 12.3 ms at best",)}
    )
    changes = {
        "profile": found.profile.model_copy(update={"scenarios": scenarios}),
        "candidates": (first,),
        "one_call_each_s": 72.0,
        "budget_s": 600.0,
    }
    monkeypatch.setattr(preview, "dry_run", lambda *_, **__: found.model_copy(update=changes))
    lines = kvat(*FAKE, "--out", out).out.splitlines()

    (title,) = (number for number, line in enumerate(lines) if line.endswith("bounds in 5+2x4:"))
    assert lines[title + 2].split("  ")[1] == "default"
    assert [cell.strip() for cell in lines[title + 2].split("  ") if cell.strip()][2:] == [
        "3.00 GiB",
        "12.3 ms",
        "41.2 tok/s",
    ]
    assert "  default  TTFT p50 ≤ 1 ms: 12.3 ms at best" in lines
    assert "  one call of every candidate in every scenario takes 1 min 12 s at least, loading apart" in lines
    assert "  it ends after 10 min 00 s, with what has been measured by then" in lines
