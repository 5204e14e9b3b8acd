"""What `kvat tune` prints at the end, and `kvat plan`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from textwrap import indent
from typing import TYPE_CHECKING

from kvat_cli.columns import columns
from kvat_core.outputs import PLAN, SNIPPET
from kvat_report import decision, numbers, one_line, output

if TYPE_CHECKING:
    from pathlib import Path

    from kvat_core.schema import Choice, Confidence, Plan, Ratios
    from kvat_core.tuner import TuneResult


def print_summary(result: TuneResult, model: str | None) -> None:
    """Decision, figures, settings, files, next steps and time."""
    print_decision(result.plan)
    print_files(result.files)
    if then := _next(result, model):
        _print_block("Next:", then)
    print("\n" + _times(result))


def print_decision(plan: Plan) -> None:
    """Decision, figures and settings, and what to know of them."""
    print(decision(plan))
    if plan.winner is None or plan.confidence is None:
        _print_block("Closest to the limits:", _misses(plan))
    else:
        _print_winner(plan, plan.winner, plan.confidence)
    if failed := [(one.label, f"{one.failure.kind}: {one.failure.reason}") for one in plan.candidates if one.failure]:
        _print_block("Failed:", [tuple(map(one_line, row)) for row in failed])
    if plan.notes:
        _print_block("Notes:", [(note,) for note in plan.notes])


def print_files(paths: Sequence[Path]) -> None:
    """What was written."""
    _print_block("Files:", [(str(path),) for path in paths])


def print_warnings(warnings: Sequence[str]) -> None:
    """One line each on standard error, so that they never get into a plan on standard output."""
    with suppress(OSError):
        for warning in warnings:
            print(f"kvat: warning: {one_line(warning)}", file=sys.stderr)


def _print_winner(plan: Plan, winner: Choice, confidence: Confidence) -> None:
    noise = confidence.noise_floor
    known = "unknown, from a single launch" if noise is None else numbers.percent(noise)
    print(f"Confidence: {confidence.level}. Noise floor of this run: {known}.")
    if told := output(plan):
        print(f"Output: {told}.")
    if plan.ratio is not None and winner.id != plan.incumbent.id:
        _print_block("Winner ÷ what runs today, as speed:", _ratios(plan.ratio))
    _print_block("Settings:", _settings(winner, plan.incumbent.settings))


def _print_block(title: str, rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n{indent(columns(rows), '  ')}")


def _ratios(ratios: Ratios) -> list[tuple[str, str]]:
    return [
        ("score", numbers.ratio(ratios.score)),
        ("time to first token", numbers.ratio(ratios.ttft)),
        ("decoding", numbers.ratio(ratios.decode)),
    ]


def _misses(plan: Plan) -> list[tuple[str, str]]:
    return [(one_line(near.label), miss.reason) for near in plan.closest for miss in near.misses]


def _settings(winner: Choice, today: Mapping[str, str]) -> list[tuple[str, str]]:
    """Settings of the winner, each with today's value where that is another one."""
    return [
        (knob, value if today.get(knob) == value else f"{value} (today: {today.get(knob, numbers.NOTHING)})")
        for knob, value in winner.settings.items()
    ]


def _next(result: TuneResult, model: str | None) -> list[tuple[str, str]]:
    """What is usually done with a plan, ready to be pasted."""
    snippet, plan = (shlex.quote(str(result.out / name)) for name in (SNIPPET, PLAN))
    scheme, local, _ = result.plan.model.id.partition("./")
    where = [shlex.quote(model.removeprefix(scheme))] if local and model else []
    unfinished = [("the same command with --resume", "measure what is missing")] if result.plan.partial else []
    if result.plan.winner is None:
        return unfinished
    again = [(" ".join(["python", snippet, *where]), "measure the winner again")]
    return [
        *unfinished,
        *(again if result.out / SNIPPET in result.files else []),
        (f"kvat apply --plan {plan} --write FILE", "write the code that runs it"),
    ]


def _times(result: TuneResult) -> str:
    loading_s = result.loading_s - result.importing_s
    other_s = max(0.0, result.wall_s - result.loading_s - result.generating_s)
    parts = {
        "loading the model": loading_s,
        "importing libraries": result.importing_s,
        "generating": result.generating_s,
        "other": other_s,
    }
    return f"Took {numbers.duration(result.wall_s)}: " + ", ".join(
        f"{numbers.duration(seconds)} {what}" for what, seconds in parts.items()
    )
