"""`kvat tune`: measure, decide, hand over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvat_cli.commands._limits import AllowLossy, MaxKl, MaxRam, MaxTpot, MaxTtft, MaxVram, MinContext, MinDecodeTps

Pairs = list[str] | None


def tune(
    engine: Annotated[str | None, typer.Option(help="Engine, where several are installed.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model id, directory, or one of the engine's own; default: its demonstration.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Let the engine fetch missing files of the model.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda, cuda:1, mps; default: the best one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the engine's own.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Kind of traffic, see kvat profiles.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N,N", help="Prompt lengths in tokens instead of the profile's.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N", help="Batch sizes instead of the profile's.")] = None,
    shortest: Annotated[
        int | None, typer.Option(min=1, help="Shortest prompt of a batch, in tokens: unequal ones, up to the longest.")
    ] = None,
    space: Annotated[Literal["safe", "default", "full"], typer.Option(help="How much to try.")] = "safe",
    pin: Annotated[
        Pairs, typer.Option("--set", metavar="KNOB=V", help="Give every candidate this value; repeatable.")
    ] = None,
    exclude: Annotated[Pairs, typer.Option(metavar="KNOB=V", help="Try no such candidate; repeatable.")] = None,
    incumbent: Annotated[
        Pairs, typer.Option(metavar="KNOB=V", help="What runs today, where it is not the default; repeatable.")
    ] = None,
    engine_option: Annotated[
        Pairs, typer.Option(metavar="K=V", help="What only the engine understands; repeatable.")
    ] = None,
    max_vram: MaxVram = None,
    max_ram: MaxRam = None,
    max_ttft: MaxTtft = None,
    max_tpot: MaxTpot = None,
    min_decode_tps: MinDecodeTps = None,
    min_context: MinContext = None,
    max_kl: MaxKl = None,
    allow_lossy: AllowLossy = None,
    max_context: Annotated[
        str,
        typer.Option(
            metavar="auto|off|N", help="Find the longest context, up to N tokens; auto: where profile or limit ask."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of launches and of the prompts.")] = 0,
    search: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Who decides what is measured next: race, grid (everything alike), optuna (large spaces).",
        ),
    ] = "race",
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time that the whole command may take, e.g. 10m; default: no limit."),
    ] = None,
    max_launches: Annotated[
        int | None, typer.Option(min=1, help="Times that the model may be loaded; default: no limit.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the results; default: kvat-out/MODEL-PROFILE.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Move an earlier run in DIR aside.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR; all else as it was.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be tried and what is known of it; measure nothing.")
    ] = False,
    deadline: Annotated[
        Pairs, typer.Option(metavar="PHASE=S", help="Seconds before a phase counts as hung; repeatable.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
) -> None:
    """Measure which settings are fastest, and hand them over.

    DIR gets best_plan.json, snippet.py, report.md and the journal of all measurements.
    """
    from kvat_cli.display import open_display
    from kvat_cli.limits import limits
    from kvat_cli.options import context_bound, deadlines, duration_s, pairs, settings, whole_numbers
    from kvat_cli.preview import print_dry_run
    from kvat_cli.streams import suppress_lost_terminal
    from kvat_cli.summary import print_summary, print_warnings
    from kvat_core import preview, tuner
    from kvat_core.errors import UsageError
    from kvat_core.measure.interrupt import stop_on_signals

    if quiet and as_json:
        raise UsageError("kvat tune takes one of --quiet and --json")
    if force and resume:
        raise UsageError("kvat tune takes one of --force and --resume")
    request = tuner.TuneRequest(
        out=out,
        engine=engine,
        model=model,
        revision=revision,
        allow_download=allow_download,
        device=device,
        threads=threads,
        engine_options=settings("--engine-option", engine_option, "NAME=VALUE, e.g. device_map=auto"),
        profile=profile,
        contexts=whole_numbers("--context", context, "2048,4096"),
        batches=whole_numbers("--batch", batch, "1,4,8"),
        shortest_prompt_tokens=shortest,
        space=space,
        pinned=settings("--set", pin),
        excluded=pairs("--exclude", exclude),
        incumbent=settings("--incumbent", incumbent),
        limits=limits(
            max_vram=max_vram,
            max_ram=max_ram,
            max_ttft=max_ttft,
            max_tpot=max_tpot,
            min_decode_tps=min_decode_tps,
            min_context=min_context,
            max_kl=max_kl,
            allow_lossy=allow_lossy,
        ),
        max_context=context_bound("--max-context", max_context),
        seed=seed,
        search=search,
        budget_s=duration_s("--budget", budget),
        max_launches=max_launches,
        force=force,
        resume=resume,
    )
    allowed = deadlines("--deadline", deadline)
    if dry_run:
        with stop_on_signals() as stop:
            found = preview.dry_run(request, stop=stop, deadlines=allowed)
        if as_json:
            print(found.model_dump_json(indent=2))
        elif not quiet:
            print_dry_run(found)
        return
    with stop_on_signals() as stop, open_display(silent=quiet or as_json) as on_progress:
        result = tuner.tune(request, on_progress, stop=stop, deadlines=allowed)
    ended = result.stopped or result.unwritten
    # Everything is written by now; a terminal that was lost meanwhile, or a full disk behind it, changes nothing of it.
    try:
        with suppress_lost_terminal():
            print_warnings(result.warnings)
            if as_json:
                print(result.plan.model_dump_json(indent=2))
            elif not quiet:
                print_summary(result, model)
    except OSError as error:
        if ended is None:
            raise
        raise ended from error
    if ended:
        raise ended
    result.plan.require_winner()
