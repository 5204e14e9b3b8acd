"""What `kvat tune` prints at the end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvat_cli.columns import columns
from kvat_report import decision, numbers, one_line

if TYPE_CHECKING:
    from kvat_core.schema import Plan, Ratios
    from kvat_core.tuner import TuneResult


def print_summary(result: TuneResult) -> None:
    """Decision, figures, settings, files and time; complaints about report packages on standard error."""
    plan = result.plan
    print(decision(plan))
    if plan.ratio is not None and plan.winner.id != plan.incumbent.id:
        print("\n" + columns(_ratios(plan.ratio)))
    print("\n" + columns(_settings(plan)))
    print("\nFiles:")
    for path in result.files:
        print(f"  {path}")
    print("\n" + _times(result))
    for warning in result.warnings:
        print(f"kvat: warning: {one_line(warning)}", file=sys.stderr)


def _ratios(ratios: Ratios) -> list[tuple[str, str]]:
    return [
        ("  score", numbers.ratio(ratios.score)),
        ("  time to first token", numbers.ratio(ratios.ttft)),
        ("  decoding", numbers.ratio(ratios.decode)),
    ]


def _settings(plan: Plan) -> list[tuple[str, str]]:
    """Settings of the winner, each with today's value where that is another one."""
    today = plan.incumbent.settings
    return [
        (f"  {knob}", value if today.get(knob) == value else f"{value} (today: {today.get(knob, numbers.NOTHING)})")
        for knob, value in plan.winner.settings.items()
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
