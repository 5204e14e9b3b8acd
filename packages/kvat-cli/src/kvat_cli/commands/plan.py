"""`kvat plan`: decide again, measure nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvat_cli.commands._limits import AllowLossy, MaxKl, MaxRam, MaxTpot, MaxTtft, MaxVram, MinContext, MinDecodeTps


def plan(
    journal: Annotated[Path, typer.Option(help="journal.jsonl of a run; it is only read.")],
    profile: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Kind of traffic to decide for; default: the run's own.")
    ] = None,
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    max_ttft: MaxTtft = None,
    max_tpot: MaxTpot = None,
    min_decode_tps: MinDecodeTps = None,
    min_context: MinContext = None,
    max_kl: MaxKl = None,
    allow_lossy: AllowLossy = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan to a new file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
) -> None:
    """Decide again from the journal of a run, without measuring.

    Another profile needs no other shapes than those that were measured. Limits replace the profile's.
    """
    from kvat_cli.files import write_new
    from kvat_cli.limits import limits
    from kvat_cli.summary import print_decision, print_files
    from kvat_core import decide_again

    wanted = limits(
        max_vram=max_vram,
        max_ram=max_ram,
        max_ttft=max_ttft,
        max_tpot=max_tpot,
        min_decode_tps=min_decode_tps,
        min_context=min_context,
        max_kl=max_kl,
        allow_lossy=allow_lossy,
    )
    decided = decide_again(journal, profile, wanted)
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
