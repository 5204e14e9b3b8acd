"""Limits on the command line: how they are written, and how a run ends that cannot keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Limit, Limits, read_plan, tuner
from kvat_core.tuner import TuneRequest

Run = Callable[..., Any]
FAKE = ("tune", "--engine", "fake", "--profile", "ci-micro")


class Asked(Exception):
    """Carries the request that a command line has become."""


@pytest.fixture
def asked(kvat: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TuneRequest]:
    """What a command line asks for."""

    def of(*words: str) -> TuneRequest:
        requests: list[TuneRequest] = []

        def tune(request: TuneRequest, *_: object, **__: object) -> None:
            requests.append(request)
            raise Asked

        monkeypatch.setattr(tuner, "tune", tune)
        kvat("tune", *words)
        (request,) = requests
        return request

    return of


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ("", Limits()),
        ("--max-vram 6GiB", Limits(max_device_bytes=6 * 2**30)),
        ("--max-vram 6GB", Limits(max_device_bytes=6_000_000_000)),
        ("--max-ram 800MiB", Limits(max_host_bytes=800 * 2**20)),
        ("--max-ram 1.5TiB", Limits(max_host_bytes=3 * 2**39)),
        ("--max-ttft 300ms", Limits(max_ttft_s=Limit(value=0.3))),
        ("--max-ttft 0.3s", Limits(max_ttft_s=Limit(value=0.3, percentile=50))),
        ("--max-ttft p95:300ms", Limits(max_ttft_s=Limit(value=0.3, percentile=95))),
        ("--max-tpot p99.9:70ms", Limits(max_tpot_s=Limit(value=0.07, percentile=99.9))),
        ("--min-decode-tps 20", Limits(min_decode_tps=Limit(value=20))),
        ("--min-decode-tps p95:20.5", Limits(min_decode_tps=Limit(value=20.5, percentile=95))),
        ("--min-context 32768", Limits(min_context_tokens=32768)),
        ("--max-kl 0.05", Limits(max_kl_nats=0.05)),
        ("--allow-lossy", Limits(allow_lossy=True)),
        ("--no-allow-lossy", Limits(allow_lossy=False)),
    ],
)
def test_limits_become_the_request(asked: Callable[..., TuneRequest], words: str, limits: Limits) -> None:
    assert asked(*words.split()).limits == limits


@pytest.mark.parametrize(("words", "bound"), [("", "auto"), ("--max-context off", "off"), ("--max-context 8192", 8192)])
def test_the_bound_of_the_longest_context_becomes_the_request(
    asked: Callable[..., TuneRequest], words: str, bound: Any
) -> None:
    assert asked(*words.split()).max_context == bound


NUMBERS = ("0", "-1", "nan", "inf", "1e3", "", "x", "9" * 400)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--max-vram", value) for value in ("6", "6G", "6gib", "6 GiB", "0GiB", "-6GiB", "nanGiB", "p95:6GiB", "")],
        *[("--max-ram", value) for value in ("800", "800M", "0.0MiB", "infMiB")],
        *[("--max-ttft", value) for value in ("300", "0.3", "0ms", "-3s", "nans", "3min", "p95:300", "p95:", "95:3s")],
        *[("--max-ttft", f"p{share}:3s") for share in ("0", "100", "200", "-5", "nan", "")],
        *[("--max-tpot", value) for value in ("50", "p0:50ms", "p100:50ms", "p50:p95:50ms")],
        *[("--min-decode-tps", value) for value in (*NUMBERS, "20tok/s", "p100:20", "p95:")],
        *[("--min-context", value) for value in ("0", "-1", "many", "1.5")],
        *[("--max-context", value) for value in ("0", "-1", "many", "1.5", "")],
        *[("--max-kl", value) for value in ("0", "-0.1", "nan", "inf", "some", "5%", "")],
    ],
)
def test_what_is_no_limit_is_refused_with_the_form_that_the_option_takes(kvat: Run, option: str, value: str) -> None:
    outcome = kvat("tune", f"{option}={value}")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("kvat: error: ")
    assert option in line


def test_a_limit_without_its_unit_is_told_what_it_takes(kvat: Run) -> None:
    line = "kvat: error: --max-ttft takes a time in ms or s, e.g. 300ms, 0.3s or p95:300ms; got '300'\n"
    assert kvat("tune", "--max-ttft", "300").err == line
    line = "kvat: error: --max-ttft takes a percentile above p0, up to p99.999, e.g. p95; got 'p100'\n"
    assert kvat("tune", "--max-ttft", "p100:300ms").err == line


def test_a_divergence_that_is_none_is_told_what_it_takes(kvat: Run) -> None:
    line = "kvat: error: --max-kl takes a divergence in nats above 0, e.g. 0.05; got 0\n"
    assert kvat("tune", "--max-kl", "0").err == line


@pytest.fixture(scope="module")
def infeasible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of one finished run that nothing of was feasible."""
    from kvat_cli.boundary import main

    out = tmp_path_factory.mktemp("infeasible") / "run"
    assert main([*FAKE, "--max-ttft", "1ms", "--quiet", "--out", str(out)]) == 4
    return out


def test_nothing_feasible_is_one_line_and_an_exit_code_of_its_own(kvat: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = kvat(*FAKE, "--max-ttft", "1ms", "--quiet", "--out", out)
    assert (outcome.code, outcome.out) == (4, "")
    (line,) = outcome.err.splitlines()
    nearest = read_plan(out / "best_plan.json").closest[0]
    assert line == (
        f"kvat: error: no candidate keeps the limits; the closest, {nearest.label}, {nearest.misses[0].reason}; "
        "decide again for wider ones with kvat plan, or tune anew with a wider --space"
    )
    assert "misses TTFT p50 ≤ 1 ms by " in line
    assert {path.name for path in out.iterdir()} == {"journal.jsonl", "best_plan.json", "report.md"}


def test_nothing_feasible_is_summed_up_without_a_winner(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--max-ttft", "1ms", "--out", tmp_path / "run")
    assert outcome.code == 4
    summary = outcome.out.partition("Infeasible: no candidate keeps the limits; the closest, ")[2]
    assert "\nClosest to the limits:\n  " in summary
    for absent in ("Settings:", "Confidence:", "Next:", "snippet.py"):
        assert absent not in summary


def test_nothing_feasible_prints_its_plan_as_json(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--max-ttft", "1ms", "--json", "--out", tmp_path / "run")
    plan = json.loads(outcome.out)
    assert (outcome.code, plan["winner"], plan["verdict"]) == (4, None, "infeasible")
    assert 1 <= len(plan["closest"]) <= 3


@pytest.mark.parametrize("words", [["--print-snippet"], ["--write", "serve.py"]])
def test_a_plan_without_a_winner_is_not_applied(
    kvat: Run, infeasible: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kvat("apply", "--plan", infeasible / "best_plan.json", *words)
    assert (outcome.code, outcome.out) == (4, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("kvat: error: no candidate keeps the limits; the closest, ")
    assert not (tmp_path / "serve.py").exists()


def test_a_run_within_its_limits_ends_as_ever(kvat: Run, tmp_path: Path) -> None:
    outcome = kvat(*FAKE, "--max-ttft", "1s", "--min-decode-tps", "1", "--quiet", "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    plan = read_plan(tmp_path / "run" / "best_plan.json")
    assert {one.verdict for one in plan.candidate(plan.require_winner().id).limits} == {"pass"}


def test_a_run_is_not_resumed_with_other_limits(kvat: Run, infeasible: Path) -> None:
    outcome = kvat(*FAKE, "--max-ttft", "2s", "--resume", "--out", infeasible)
    assert outcome.code == 2
    assert "profile.limits.max_ttft_s.value was 0.001 and is 2.0" in outcome.err
    assert kvat(*FAKE, "--max-ttft", "1ms", "--resume", "--quiet", "--out", infeasible).code == 4
