"""`kvat apply`: code or defaults that put a plan to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def apply(
    plan: Annotated[Path, typer.Option(help="best_plan.json of a run.")],
    print_snippet: Annotated[bool, typer.Option("--print-snippet", help="Print the code.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the code to a new file.")] = None,
    generation_config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write defaults into the directory of a model.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="With --generation-config: write them even if something does not fit.")
    ] = False,
) -> None:
    """Print or write what runs a plan's winner."""
    from kvat_cli.files import write_new
    from kvat_core import read_plan, snippet
    from kvat_core.errors import UsageError
    from kvat_core.outputs import SNIPPET

    if [print_snippet, write is not None, generation_config is not None].count(True) != 1:
        raise UsageError("kvat apply takes one of --print-snippet, --write FILE and --generation-config DIR")
    if partial and generation_config is None:
        raise UsageError("--partial goes with --generation-config DIR; leave it out")
    if generation_config is not None:
        _write_defaults(plan, generation_config, partial)
        return
    code = snippet(read_plan(plan))[SNIPPET]
    if write is None:
        print(code, end="")
    else:
        write_new(write, code, "--write")
        print(f"wrote {write}")


def _write_defaults(plan: Path, folder: Path, partial: bool) -> None:
    from kvat_core import config_change, read_plan
    from kvat_core.errors import UsageError

    change = config_change(read_plan(plan), folder)
    for line in change.lost:
        print(f"does not fit {change.path.name}: {line}")
    if change.lost and not partial:
        raise UsageError(
            f"the winner does not fit {change.path.name} as a whole, nothing was written; write what fits with "
            "--partial, or all of it as code with --write FILE"
        )
    change.write()
    for line in (*change.changes, *change.left):
        print(line)
    print(f"wrote {change.path}")
