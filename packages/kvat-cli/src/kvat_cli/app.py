"""All commands, in the order of `kvat --help`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvat_cli.commands.apply import apply
from kvat_cli.commands.doctor import doctor
from kvat_cli.commands.engines import engines
from kvat_cli.commands.plan import plan
from kvat_cli.commands.profiles import profiles
from kvat_cli.commands.schema import schema
from kvat_cli.commands.tune import tune

# Rich is slow to import, and only the live display of `tune` needs it.
app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

for command in (tune, plan, apply, engines, profiles, doctor, schema):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvat {version('kvat-cli')}")
        raise typer.Exit


@app.callback()
def kvat(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere in the line.")
    ] = False,
) -> None:
    """Find the KV-cache settings that are fastest for a model on this machine.

    \b
    Exit codes: 0 done, 2 unusable input or environment, 3 not measured
    enough to decide, 4 nothing feasible, 5 every candidate failed, 70
    internal error, 130 interrupted.
    """
