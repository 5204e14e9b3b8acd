"""`kvat apply`: code that puts a plan to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def apply(
    plan: Annotated[Path, typer.Option(help="best_plan.json of a run.")],
    print_snippet: Annotated[bool, typer.Option("--print-snippet", help="Print the code.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the code to a new file.")] = None,
) -> None:
    """Print or write the code that runs a plan's winner."""
    from kvat_cli.files import write_new
    from kvat_core import read_plan, snippet
    from kvat_core.errors import UsageError
    from kvat_core.outputs import SNIPPET

    if print_snippet == (write is not None):
        raise UsageError("kvat apply takes one of --print-snippet and --write FILE")
    code = snippet(read_plan(plan))[SNIPPET]
    if write is None:
        print(code, end="")
    else:
        write_new(write, code, "--write")
        print(f"wrote {write}")
