"""`kvat plan`: decide again, measure nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    journal: Annotated[Path, typer.Option(help="journal.jsonl of a run; it is only read.")],
    profile: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Kind of traffic to decide for; default: the run's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan to a new file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
) -> None:
    """Decide again from the journal of a run, without measuring.

    Another profile needs no other shapes than those that were measured.
    """
    from kvat_cli.files import write_new
    from kvat_cli.summary import print_decision, print_files
    from kvat_core import decide_again, load_profile

    decided = decide_again(journal, None if profile is None else load_profile(profile))
    text = decided.model_dump_json(indent=2)
    if out is not None:
        write_new(out, text + "\n", "--out")
    if as_json:
        print(text)
    else:
        print_decision(decided)
        if out is not None:
            print_files([out])
    decided.require_winner()
