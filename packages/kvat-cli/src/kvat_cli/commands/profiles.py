"""`kvat profiles`: the kinds of traffic that can be named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvat_core import Profile


def profiles(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE]", help="Print this one as JSON, to start your own from.")
    ] = None,
) -> None:
    """List the kinds of traffic that --profile can name.

    A scenario is written as prompt tokens + output tokens x batch size.
    """
    from kvat_cli.columns import columns
    from kvat_core import load_profile, presets

    if name is not None:
        print(load_profile(name).model_dump_json(indent=2))
        return
    rows = [_row(profile) for profile in presets().values()]
    print(columns([("NAME", "SCENARIOS (SHARE)", "SCORE WEIGHTS", "DESCRIPTION"), *rows]))


def _row(profile: Profile) -> tuple[str, str, str, str]:
    scenarios = {scenario.key: scenario.weight for scenario in profile.scenarios}
    return (
        profile.name,
        _shares(scenarios, "{} ({})"),
        _shares(profile.objective.shares(), "{} {}"),
        profile.description,
    )


def _shares(weights: dict[str, float], shown: str) -> str:
    from kvat_report import numbers

    total = sum(weights.values())
    return ", ".join(shown.format(name, numbers.percent(weight / total)) for name, weight in weights.items() if weight)
