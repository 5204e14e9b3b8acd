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
    from kvat_core import read_plan, snippet
    from kvat_core.errors import UsageError
    from kvat_core.outputs import SNIPPET

    if print_snippet == (write is not None):
        raise UsageError("kvat apply takes one of --print-snippet and --write FILE")
    code = snippet(read_plan(plan))[SNIPPET]
    if write is None:
        print(code, end="")
    else:
        _write_new(write, code)
        print(f"wrote {write}")


def _write_new(path: Path, text: str) -> None:
    from kvat_core.errors import UsageError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is left as it is; name a new file with --write") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --write") from error
