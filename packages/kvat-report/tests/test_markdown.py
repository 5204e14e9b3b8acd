from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvat_core.discovery import reports
from kvat_core.schema import LimitResult, Plan
from kvat_report import MarkdownReport

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "a|b `c` <script>alert(1)</script>\n\n# head\x1b[2J ]( \u202e *x* \\"


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("KVAT_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    accepted = path.read_text(encoding="utf-8")
    diff = "\n".join(
        difflib.unified_diff(accepted.splitlines(), text.splitlines(), "accepted", "rendered", lineterm="")
    )
    assert text == accepted, f"{name} differs; accept with KVAT_ACCEPT=1 pytest {__file__}\n{diff}"


def test_golden_report(make_plan: Callable[..., Plan]) -> None:
    assert_golden("better.md", MarkdownReport().render(make_plan()))


def test_golden_report_of_a_tie_without_optional_parts(make_plan: Callable[..., Plan]) -> None:
    incumbent = make_plan().incumbent.model_dump()
    measured = make_plan().candidate("aaaaaaaaaa").model_copy(update={"aliases": ()}).model_dump()
    plan = make_plan(
        verdict="tie", winner=incumbent, ratio=None, equivalents=[], notes=[], candidates=[measured],
        pareto=[], rules=[], metrics={"error_rate": 0.0, "jitter": None},
    )  # fmt: skip
    assert_golden("tie.md", MarkdownReport().render(plan))


def test_golden_report_of_what_was_found_of_the_output(make_plan: Callable[..., Plan]) -> None:
    known = {one.id: one.model_dump() | {"aliases": [], "scenarios": []} for one in make_plan().candidates}
    today = known["aaaaaaaaaa"] | {"fidelity": {"verdict": "exact"}}
    figures = {"top1_agreement": 0.9938, "first_divergence": 41, "tokens": 512}
    close = {"lossy": True, "verdict": "close", "kl_nats": 0.00423, **figures, "full_precision_kl_nats": 0.0011}
    lossy = {"lossy": True, "verdict": "lossy", "kl_nats": 0.251, **figures, "top1_agreement": 0.874}
    reason = "loses fidelity: KL 0.25 nats of at most 0.01, first choices agree in 87.4 % of at least 99 %"
    plan = make_plan(
        equivalents=[], rules=[], pareto=[], notes=[], canary="clean",
        model={"id": "tiny", "revision": None, "weights": "checkpoint", "sha256": "ab" * 32},
        candidates=[
            today,
            known["bbbbbbbbbb"] | {"fidelity": close},
            known["cccccccccc"] | {"fidelity": lossy, "reason": reason},
        ],
    )  # fmt: skip
    assert_golden("fidelity.md", MarkdownReport().render(plan))


def test_sections_follow_the_reader_s_questions(make_plan: Callable[..., Plan]) -> None:
    report = MarkdownReport().render(make_plan())
    assert re.findall("^## (.+)$", report, flags=re.MULTILINE) == [
        "How sure", "What was measured, and on what", "Scenarios", "Ranking", "Failures", "What compiling costs",
        "Excluded and not eligible", "Aliases", "Equivalents", "Fallbacks", "Notes", "How to apply", "Definitions",
        "Evidence",
    ]  # fmt: skip


def test_ranking_is_by_state_then_score_without_what_was_excluded(make_plan: Callable[..., Plan]) -> None:
    report = MarkdownReport().render(make_plan())
    section = report.split("## Ranking")[1].split("## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    order = list(dict.fromkeys((row[0].removeprefix("| "), row[1]) for row in rows))
    assert order == [
        ("dynamic, flash", "ok"),
        ("static, sdpa (winner)", "ok"),
        ("offloaded, sdpa", "ok"),
        ("dynamic, sdpa (runs today)", "ok"),
        ("dynamic, eager", "not_reached"),
        ("static, sdpa, compiled", "failed"),
    ]


def test_many_that_are_excluded_for_one_reason_are_one_row(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    (excluded,) = (one for one in plan.candidates if one.state == "excluded")
    more = [excluded.model_copy(update={"id": f"{number:010}", "label": f"more {number}"}) for number in range(40)]
    other = excluded.model_copy(update={"id": "f" * 10, "label": "other", "reason": "was excluded by request"})
    report = MarkdownReport().render(plan.model_copy(update={"candidates": (*plan.candidates, *more, other)}))

    section = report.split("## Excluded and not eligible")[1].split("## ")[0]
    rows = [line for line in section.splitlines() if "| excluded |" in line]
    assert rows == [
        "| more 0; more 1; more 10 and 38 more | excluded | optimum-quanto is not installed |",
        "| other | excluded | was excluded by request |",
    ]
    assert "more 1" not in report.replace(section, "")


def test_hostile_strings_change_no_structure(make_plan: Callable[..., Plan]) -> None:
    harmless, hostile = (
        MarkdownReport().render(Plan.model_validate(_with_strings(make_plan(), text))) for text in ("harmless", HOSTILE)
    )
    assert _skeleton(hostile) == _skeleton(harmless)
    assert "<" not in hostile
    assert "\x1b" not in hostile
    assert "\u202e" not in hostile


def test_hostile_strings_reach_every_section(make_plan: Callable[..., Plan]) -> None:
    report = MarkdownReport().render(Plan.model_validate(_with_strings(make_plan(), "needle")))
    sections = re.split("^## ", report, flags=re.MULTILINE)
    without = [section.split("\n")[0] for section in sections if "needle" not in section]
    assert without == ["Scenarios", "How to apply", "Definitions"]


def test_is_found_through_its_entry_point(make_plan: Callable[..., Plan]) -> None:
    usable, complaints = reports()
    assert complaints == []
    (markdown,) = (report for report in usable if report.name == "markdown")
    assert markdown.file_name == "report.md"
    assert markdown.render(make_plan()) == MarkdownReport().render(make_plan())


def test_a_lone_surrogate_can_be_written(make_plan: Callable[..., Plan]) -> None:
    report = MarkdownReport().render(make_plan(notes=["undecodable \udcff byte"]))
    assert b"- undecodable byte\n" in report.encode("utf-8")


def _skeleton(report: str) -> list[tuple[str, int]]:
    """Per line: its block marker and number of table cells."""
    return [
        (re.match(r"(#* |\| |- |```|\|---|)", line)[0], len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)))  # type: ignore[index]
        for line in report.splitlines()
    ]


def _with_strings(plan: Plan, text: str) -> Any:
    """The plan with every free string from outside replaced."""
    fixed = {
        "format", "id", "verdict", "state", "kind", "level", "weights", "equivalents", "name", "created", "prompt",
        "use", "pareto",
    }  # fmt: skip

    def replace(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            free_keys = key in ("settings", "versions")
            return {(text if free_keys else k): replace(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [replace(item, key) for item in value]
        if key == "feature_missing":
            return f"knob={text}"
        return text if isinstance(value, str) and key not in fixed else value

    data = plan.model_dump(mode="json", by_alias=True)
    data["machine"] = {key: replace(value, key) for key, value in data["machine"].items()}
    data["model"]["id"] = data["engine"]["name"] = text
    return replace(data)


def test_energy_is_a_column_where_a_card_reports_it(make_plan: Callable[..., Plan]) -> None:
    assert "energy per token" not in MarkdownReport().render(make_plan())
    data = make_plan().model_dump(mode="json")
    measured = next(candidate for candidate in data["candidates"] if candidate["scenarios"])
    measured["scenarios"][0]["energy_per_token_j"] = 0.25
    report = MarkdownReport().render(Plan.model_validate(data))
    ranking = report.split("## Ranking")[1].split("## ")[0]
    rows = [line for line in ranking.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| 0.250 J |" in ranking or "| 0.25 J |" in ranking


def test_of_a_failed_worker_the_last_line_is_shown_and_harmless(make_plan: Callable[..., Plan]) -> None:
    data = make_plan().model_dump(mode="json")
    failed = next(candidate for candidate in data["candidates"] if candidate["failure"])
    failed["failure"]["stderr_tail"] = f"first\nlast {HOSTILE}\n\n"
    report = MarkdownReport().render(Plan.model_validate(data))
    assert "<script>" not in report
    assert "\n# head" not in report


def test_limits_have_a_table_only_where_there_are_some(make_plan: Callable[..., Plan]) -> None:
    assert "## Limits" not in MarkdownReport().render(make_plan())
    plan = make_plan()
    judged = LimitResult(
        name="max_ttft_s", limit=0.3, percentile=95, scenario="8+3x1", observed=0.4, verdict="fail", missed_by=0.33,
        reason="misses TTFT p95 ≤ 300 ms by 33 %",
    )  # fmt: skip
    winner = plan.candidate(plan.require_winner().id).model_copy(update={"limits": (judged,)})
    candidates = tuple(winner if one.id == winner.id else one for one in plan.candidates)
    report = MarkdownReport().render(plan.model_copy(update={"candidates": candidates}))
    section = report.split("## Limits")[1].split("## ")[0]
    assert f"| {winner.label} | fail | misses TTFT p95 ≤ 300 ms by 33 % |" in section
    assert report.index("## Ranking") < report.index("## Limits") < report.index("## Failures")


def test_golden_report_without_a_winner(make_plan: Callable[..., Plan]) -> None:
    miss = {
        "name": "max_ttft_s", "limit": 0.3, "percentile": 95.0, "scenario": "2048+128x1", "observed": 0.41,
        "verdict": "fail", "missed_by": 0.37, "reason": "misses TTFT p95 ≤ 300 ms by 37 %: 410 ms in 2048+128x1",
    }  # fmt: skip
    measured = make_plan().candidate("aaaaaaaaaa").model_copy(update={"aliases": ()}).model_dump()
    plan = make_plan(
        verdict="infeasible", winner=None, ratio=None, confidence=None, metrics=None, equivalents=[], notes=[],
        rules=[], pareto=[],
        closest=[{"id": "aaaaaaaaaa", "label": measured["label"], "misses": [miss]}],
        candidates=[{**measured, "limits": [miss], "reason": miss["reason"], "score": None}],
    )  # fmt: skip
    assert_golden("infeasible.md", MarkdownReport().render(plan))


def test_the_winner_s_use_of_the_memory_is_told_where_it_is_known(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    winner = plan.candidate(plan.winner.id)
    scenarios = [result.model_copy(update={"bandwidth_use": 0.58, "flop_use": 0.4}) for result in winner.scenarios]
    told = winner.model_copy(update={"scenarios": tuple(scenarios)})
    candidates = tuple(told if one.id == winner.id else one for one in plan.candidates)

    report = MarkdownReport().render(plan.model_copy(update={"candidates": candidates}))

    assert "decode runs at 58 % of what this machine's memory allows, prefill at 40 % of its arithmetic" in report
    assert "this machine's memory allows" not in MarkdownReport().render(plan)


def test_the_longest_context_is_told_with_its_reserve(make_plan: Callable[..., Plan]) -> None:
    bounded = {"tokens": 3000, "safe_tokens": 2910, "method": "probed", "bounded_by": "device_memory"}
    whole = {"tokens": 4096, "safe_tokens": 4096, "method": "predicted", "bounded_by": "model"}

    report = MarkdownReport().render(make_plan(max_context=bounded))
    assert (
        "context of the winner: 3000 tokens (probed, bounded by device memory); with a reserve of 3 %, 2910.\n"
        in report
    )
    report = MarkdownReport().render(make_plan(max_context=whole))
    assert "context of the winner: 4096 tokens (predicted, bounded by model).\n" in report
