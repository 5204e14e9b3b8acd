"""What kvat finds on an accelerator, and whether it is so: for large models of random weights, in short stages.

    python benchmarks/gpu DIR [--device NAME] [--minutes 8] [--models random:NAME ...] [--prompts 2048 8192]

Each call is one stage: it does what fits into its minutes, and ends with exit code 3 while something is left. The same
command goes on, from the journals in DIR. In order:

1. the engine's tests that need a card: what is offered runs as its recipe says and answers right, what is excluded
   really cannot run;
2. each value of each knob, whatever the engine has: applied as set, and right, or the reason why it cannot run here;
3. for each model and prompt length: `kvat tune`, resumed from stage to stage, its time and memory noted;
4. and then the winner beside what Transformers does by itself, in fresh processes by `_plain_generate.py`, no kvat.

Bounds: the tests pass, and a stage is enough for them; every value that can run is applied; what loses nothing forgets
nothing, and nowhere clearly predicts another token than its reference. Of each tuned model: the winner's decode rate
measured afresh is in the plan's interval widened by its noise floor; on a card, the model of 8 billion parameters
decodes at least 3 times as fast as by default with prompts of 2048 tokens, and reads its weights and cache at 0.6 of
the rate at which memory was copied.

It runs without a card as well, where a small model shows that all stages work:

    python benchmarks/gpu DIR --device cpu --models random:smollm2-135m --prompts 32 --output-tokens 8 --space safe
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script beside it has it

import knob_values
from _record import NOT_MEASURED, Bound, Record, at_least_one, kvat_command, option_parser
from claimed_ratio import PLAIN
from stage import Stage
from tune_cost import watched

from kvat_core import Plan, read_plan, stats
from kvat_core.journal import read_journal
from kvat_core.outputs import JOURNAL, PLAN
from kvat_core.schema import Ceilings, Header, LaunchEnd, ScenarioResult
from kvat_engine_transformers import random_path

MODELS = ("random:llama-3.2-1b", "random:llama-3.1-8b", "random:mistral-7b")
PROMPTS = (2048, 8192)
BOUND_TO = ("random:llama-3.1-8b", 2048)
LEAST_DECODE_RATIO = 3.0
LEAST_COPY_SHARE = 0.6
LEFT = 3
"""Exit code where a further stage is needed."""
TIMED_OUT = 124
"""Exit code of tests that outlast a stage, as timeout(1) has it."""
LEAST_TUNE_S = 60.0
TESTS = Path(__file__).parents[2] / "packages/kvat-engine-transformers/tests"
ORDERS = (("default", "winner"), ("winner", "default"))


@dataclass(frozen=True)
class Cell:
    """A model with a prompt length, and where what is known of it is kept."""

    model: str
    prompt_tokens: int
    folder: Path

    @property
    def plan(self) -> Plan | None:
        """The plan of a run that has ended, or None."""
        found = read_plan(self.folder / PLAN) if (self.folder / PLAN).is_file() else None
        return None if found is None or found.partial else found

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """What was measured afresh so far."""
        file = self.folder.with_suffix(".pairs.json")
        return list(json.loads(file.read_text())) if file.is_file() else []

    def keep(self, pairs: Sequence[dict[str, Any]]) -> None:
        """Write down what was measured afresh."""
        self.folder.with_suffix(".pairs.json").write_text(json.dumps(pairs) + "\n")

    @property
    def costs(self) -> list[dict[str, float]]:
        """What `kvat tune` took in each stage so far."""
        file = self.folder.with_suffix(".costs.json")
        return list(json.loads(file.read_text())) if file.is_file() else []

    def pay(self, cost: dict[str, float]) -> None:
        """Write down what it took in one more stage."""
        self.folder.with_suffix(".costs.json").write_text(json.dumps([*self.costs, cost]) + "\n")


def main() -> int:
    options = _options()
    stage, record = Stage(options.minutes), Record(options)
    options.directory.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(model, tokens, options.directory / f"{Path(model.removeprefix('random:')).name}-{tokens}")
        for model in options.models
        for tokens in options.prompts
    ]
    run_tests(options, stage)
    if not knob_values.checked(options.directory, options.device, stage):
        return _left(f"the values of the knobs, of which each may take {knob_values.LONGEST_S:.0f} s")
    for cell in cells:
        if not tuned(cell, options, stage):
            return _left(f"kvat tune of {cell.folder.name}")
        if not afresh(cell, options, stage):
            return _left(f"{cell.folder.name} without kvat")
    return close(record, cells, options)


def _options() -> Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the stages leave what they have done")
    parser.add_argument("--device", default="cuda:0", metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="of this stage")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="random:NAME")
    parser.add_argument("--prompts", nargs="+", type=at_least_one, default=list(PROMPTS), metavar="TOKENS")
    parser.add_argument("--output-tokens", type=at_least_one, default=128, metavar="N")
    parser.add_argument("--launches", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--samples", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--pairs", type=at_least_one, default=4, metavar="N", help="of fresh processes")
    parser.add_argument("--space", default="default", metavar="NAME")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="KNOB=VALUE", help="not to be tried, to save time")
    return parser.parse_args()


def _left(what: str) -> int:
    print(f"not done in this stage: {what}; the same command goes on", flush=True)
    return LEFT


def run_tests(options: Namespace, stage: Stage) -> None:
    """Run the tests that need the card, once; that they outlast the stage is a result as well."""
    file = options.directory / "tests.json"
    if file.is_file():
        return
    # What the libraries of that machine warn of is not ours to mend.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "gpu", "--no-header", str(TESTS)]
    longest_s = stage.left_s
    try:
        done = subprocess.run(
            [*command, "--import-mode=importlib", "-p", "no:cacheprovider"],
            capture_output=True,
            text=True,
            timeout=longest_s,
            check=False,
        )
        print(done.stdout[-6000:], flush=True)
        # All are skipped, and none fails, where there is no card: 0 as well.
        found = {"exit_code": done.returncode, "summary": done.stdout.splitlines()[-1]}
    except subprocess.TimeoutExpired:
        told = f"no end within {longest_s:.0f} s; to try again, remove {file.name} and give a stage more --minutes"
        print(told, file=sys.stderr)
        found = {"exit_code": TIMED_OUT, "summary": told}
    file.write_text(json.dumps(found) + "\n")


def tuned(cell: Cell, options: Namespace, stage: Stage) -> bool:
    """Go on with `kvat tune`; whether it has ended."""
    if cell.plan is not None:
        return True
    if stage.left_s < LEAST_TUNE_S:
        return False
    profile = cell.folder.with_suffix(".profile.json")
    scenario = {"prompt_tokens": cell.prompt_tokens, "output_tokens": options.output_tokens}
    told = {"format": 1, "name": "gpu", "description": "One prompt at a time.", "scenarios": [scenario]}
    counts = {"launches": options.launches, "samples": options.samples}
    profile.write_text(json.dumps({**told, **counts, "objective": {"ttft": 0.5, "decode": 0.5}}) + "\n")
    asked = ["--engine", "transformers", "--model", cell.model, "--device", options.device, "--profile", str(profile)]
    wide = ["--space", options.space, *(word for one in options.exclude for word in ("--exclude", one))]
    limit = ["--budget", f"{stage.left_s:.0f}s", "--out", str(cell.folder)]
    resumed = ["--resume"] if (cell.folder / JOURNAL).is_file() else []
    exit_code, cost = watched(kvat_command("tune", *asked, *wide, *limit, *resumed))
    cell.pay(cost)
    if exit_code not in (0, LEFT):
        print(f"kvat tune ended with exit code {exit_code}", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return cell.plan is not None


def afresh(cell: Cell, options: Namespace, stage: Stage) -> bool:
    """Measure pairs of fresh processes as far as they fit; whether all are there. A winner that runs today has none."""
    plan, pairs = cell.plan, cell.pairs
    assert plan is not None
    winner = plan.require_winner()
    if winner.id == plan.incumbent.id:
        return True
    longest_s = 0.0
    while len(pairs) < options.pairs:
        if stage.left_s < 1.2 * longest_s:
            return False
        started = time.monotonic()
        settings = {"default": {"device": options.device}, "winner": {**winner.settings, "device": options.device}}
        pair = {kind: plain(cell, options, settings[kind], stage) for kind in ORDERS[len(pairs) % 2]}
        if None in pair.values():
            return False
        pairs.append(pair)
        cell.keep(pairs)
        longest_s = max(longest_s, time.monotonic() - started)
        print(json.dumps(pair), flush=True)
    return True


def plain(cell: Cell, options: Namespace, settings: dict[str, str], stage: Stage) -> dict[str, Any] | None:
    """One process without kvat; None where the stage ends before it."""
    shape = [str(one) for one in (cell.prompt_tokens, options.output_tokens, options.samples)]
    words = [f"{knob}={value}" for knob, value in settings.items() if value != "own"]
    command = [sys.executable, str(PLAIN), str(random_path(cell.model.removeprefix("random:"))), *shape, *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(1.0, stage.left_s), check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        print(f"exit code {done.returncode} of {PLAIN.name}\n{done.stderr[-2000:]}", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def close(record: Record, cells: Sequence[Cell], options: Namespace) -> int:
    """The result of all stages."""
    tests = json.loads((options.directory / "tests.json").read_text())
    rows, values = [row(cell) for cell in cells], knob_values.found(options.directory)
    # Where all are skipped for want of a card, that nothing failed tells nothing.
    ran = tests["exit_code"] != 0 or " passed" in tests["summary"]
    of_tests = [Bound("exit code of the tests on this device", tests["exit_code"], "<=", 0)] if ran else []
    bounds = [*of_tests, *knob_values.bounds(values)]
    for one in rows:
        bounds += bounds_of(one, on_card=options.device.startswith("cuda"))
    for line in (*knob_values.table(values), "", *table(rows)):
        print(line)
    last = cells[-1].plan
    assert last is not None
    return record.close(last.machine, bounds, {"tests": tests["summary"], "knob_values": values, "cells": rows})


def row(cell: Cell) -> dict[str, Any]:
    """Everything that is told of one model with one prompt length."""
    plan = cell.plan
    assert plan is not None
    header, launches_s = _header_and_launches(cell.folder / JOURNAL)
    winner, today = plan.candidate(plan.require_winner().id), plan.candidate(plan.incumbent.id)
    ceilings = header.ceilings
    return {
        "model": plan.model.id,
        "prompt_tokens": cell.prompt_tokens,
        "verdict": plan.verdict,
        "winner": winner.label,
        "noise_floor": plan.confidence.noise_floor if plan.confidence else None,
        "claimed": None if plan.ratio is None else plan.ratio.model_dump(),
        "afresh": afresh_ratios(cell.pairs),
        "default": figures(today.scenarios[0], ceilings),
        "tuned": figures(winner.scenarios[0], ceilings),
        "launches": len(launches_s),
        "launches_s": sum(launches_s),
        "tune": {
            "wall_s": sum(cost["wall_s"] for cost in cell.costs),
            "peak_own_bytes": max(cost["peak_own_bytes"] for cost in cell.costs),
            "peak_all_bytes": max(cost["peak_all_bytes"] for cost in cell.costs),
            "peak_device_bytes": max((one.peak_device_bytes or 0 for one in plan.candidates), default=0) or None,
        },
        "pairs": cell.pairs,
    }


def figures(result: ScenarioResult, ceilings: Ceilings | None) -> dict[str, float | None]:
    """What was measured of one candidate."""
    use, share = result.bandwidth_use, None
    if use is not None and ceilings is not None:
        share = use * ceilings.read_bytes_per_s.best / ceilings.copy_bytes_per_s.best
    return {
        "ttft_s": result.ttft_s.median,
        "decode_tps": result.decode_tps.median,
        "peak_device_bytes": result.peak_device_bytes,
        "read_share": use,
        "copy_share": share,
    }


def afresh_ratios(pairs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Winner ÷ default, as speed."""
    if not pairs:
        return None
    ttft = [math.log(pair["default"]["ttft_s"] / pair["winner"]["ttft_s"]) for pair in pairs]
    decode = [math.log(pair["winner"]["decode_tps"] / pair["default"]["decode_tps"]) for pair in pairs]
    return {
        "ttft": stats.compare(ttft).ratio().model_dump(),
        "decode": stats.compare(decode).ratio().model_dump(),
    }


def bounds_of(one: dict[str, Any], *, on_card: bool) -> Iterator[Bound]:
    """What has to hold of one row."""
    name = f"{one['model'].removeprefix('random:')} at {one['prompt_tokens']}"
    found, claim = one["afresh"], one["claimed"]
    if found is not None and claim is not None:
        noise, value = 1 + (one["noise_floor"] or 0.0), found["decode"]["value"]
        yield Bound(f"{name}: decode ratio afresh", value, ">=", claim["decode"]["low"] / noise)
        yield Bound(f"{name}: decode ratio afresh", value, "<=", claim["decode"]["high"] * noise)
    if on_card and (one["model"], one["prompt_tokens"]) == BOUND_TO:
        ratio = 1.0 if found is None else found["decode"]["value"]
        yield Bound(f"{name}: decode rate ÷ default", ratio, ">=", LEAST_DECODE_RATIO)
        yield Bound(f"{name}: share of the copy rate", one["tuned"]["copy_share"] or 0.0, ">=", LEAST_COPY_SHARE)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| model | prompt | winner | TTFT, default → tuned | decode, default → tuned | afresh | copy rate | tuning |"
    yield "|---|--:|---|---|---|---|--:|--:|"
    for one in rows:
        default, best, found = one["default"], one["tuned"], one["afresh"]
        again = "–" if found is None else f"{found['ttft']['value']:.2f}× / {found['decode']['value']:.2f}×"
        share = "–" if best["copy_share"] is None else f"{best['copy_share']:.0%}"
        yield (
            f"| {one['model'].removeprefix('random:')} | {one['prompt_tokens']} | {one['winner']} "
            f"| {1e3 * default['ttft_s']:.1f} → {1e3 * best['ttft_s']:.1f} ms "
            f"| {default['decode_tps']:.1f} → {best['decode_tps']:.1f} tok/s | {again} | {share} "
            f"| {one['tune']['wall_s']:.0f} s, {one['launches']} launches, "
            f"{one['tune']['peak_all_bytes'] / 2**30:.1f} GiB |"
        )


def _header_and_launches(journal: Path) -> tuple[Header, list[float]]:
    events = list(read_journal(journal))
    header = next(event for event in events if isinstance(event, Header))
    return header, [event.wall_s for event in events if isinstance(event, LaunchEnd)]


if __name__ == "__main__":
    sys.exit(main())
