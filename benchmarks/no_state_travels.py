"""Is a candidate measured after another one in the same process what it is alone?

    python benchmarks/no_state_travels.py [--rounds 7] [--out FILE]

Takes every cell (candidate and scenario) of the safe space of the built-in Llama on the CPU, in two scenarios of
different length, and every ordered pair (Y, X) of cells that may share a launch. X after Y must be X alone: the
same read-back, the same tokens from the same prompts, and the same decode rate as far as can be told.

Each measurement has a process of its own, with one thread: a fork of one that has imported the libraries
and done nothing with them, which is what a worker is before it loads a model. There the cells are set up,
proven, warmed up and timed, as in a launch. A block is X alone, X after each Y in random order, and X alone
again; the blocks of all X, in random order, make a round. The ratio of a pair in a round is the rate
of X after Y over the geometric mean of both rates of X alone. Its interval over the rounds has a level of
1 - 0.05 ÷ pairs (Bonferroni), so that the chance of any false alarm among all pairs is at most 5 %. The noise floor
is the spread between processes of X alone, from the two of each block. A pair whose interval lies wholly outside
1 ± max(1 %, 2 × noise floor) differs. What would go unseen is printed, too.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser
from scipy.special import stdtrit

from kvat_core import Scenario, prompts
from kvat_core.decision import MIN_DIFFERENCE
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.supervisor import WorkerProcess
from kvat_core.preparation import Preparation, TuneRequest, prepare
from kvat_core.schema import Cell, Objective, Profile, PromptSource, Recipe
from kvat_engine_transformers import TransformersEngine

SCENARIOS = (Scenario(prompt_tokens=64, output_tokens=32), Scenario(prompt_tokens=512, output_tokens=32))
SOURCE = PromptSource(kind="preset", value="chat")
PROFILE = Profile(name="two-lengths", scenarios=SCENARIOS, objective=Objective(decode=1.0), prompt=SOURCE)
CALLS_BEFORE = 2
"""Of Y; what a first call may leave behind, a second one may find."""
TIMED_CALLS = 5
ALPHA = 0.05

Pair = tuple[Cell, Cell]
"""Y and X."""


@dataclass(frozen=True)
class Seen:
    """What one process tells of X."""

    applied: Mapping[str, Any]
    tokens: str
    """Digest of all tokens of all calls; the prompts are the same in each process."""
    decode_tps: float
    """Median of the timed calls."""


@dataclass(frozen=True)
class Block:
    """X alone, before and after X after each Y."""

    cell: Cell
    alone: tuple[Seen, Seen]
    after: Mapping[Cell, Seen]

    def log_ratio(self, before: Cell) -> float:
        """Of the decode rate after Y to the rate alone."""
        return math.log(self.after[before].decode_tps) - fmean(math.log(one.decode_tps) for one in self.alone)


@dataclass(frozen=True)
class Comparison:
    """The decode rate of a pair: X after Y over X alone."""

    ratio: float
    low: float
    high: float

    def lies_outside(self, margin: float) -> bool:
        """Whether all of the interval differs from 1 by more than a margin."""
        return self.low > 1 + margin or self.high < 1 - margin


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=7, metavar="N")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("an interval needs two rounds")
    record = Record(options)
    prepared = look()
    groups = sharing_a_load(prepared.recipes)
    pairs = [pair for cells in groups for pair in permutations(cells, 2)]
    with TemporaryDirectory() as scratch:
        blocks = Bench(prepared.recipes, Path(scratch)).rounds(groups, options.rounds)
    name = partial(cell_name, prepared)
    differing = {what: find_differing(blocks, what) for what in ("applied", "tokens")}
    floor = noise_floor(blocks)
    margin = max(MIN_DIFFERENCE, 2 * floor)
    compared = {pair: compare(blocks, pair, 1 - ALPHA / len(pairs)) for pair in pairs}
    outside = [pair for pair in pairs if compared[pair].lies_outside(margin)]
    for before, cell in outside:
        print(f"{name(cell)} after {name(before)}: {compared[before, cell]}")
    unseen = max(max(1 - one.low, one.high - 1) for one in compared.values()) + margin
    print(f"{len(pairs)} pairs, noise floor {floor:.2%}; a change of the decode rate by {unseen:.1%} would show in any")
    bounds = [
        Bound("processes whose read-back differs", len(differing["applied"]), "<=", 0),
        Bound("processes whose tokens differ", len(differing["tokens"]), "<=", 0),
        Bound(f"pairs out of {len(pairs)} whose decode rate differs", len(outside), "<=", 0),
    ]
    values = {
        "cells": [name(cell) for cells in groups for cell in cells],
        "noise_floor": floor,
        "margin": margin,
        "level": 1 - ALPHA / len(pairs),
        "differing": {what: [[name(one) for one in pair] for pair in found] for what, found in differing.items()},
        "pairs": [
            {"before": name(before), "cell": name(cell), **vars(compared[before, cell])} for before, cell in pairs
        ],
        "decode_tps": [
            {
                "cell": name(block.cell),
                "alone": [one.decode_tps for one in block.alone],
                "after": {name(before): one.decode_tps for before, one in block.after.items()},
            }
            for block in blocks
        ],
    }
    return record.close(prepared.header.machine, bounds, values)


def look() -> Preparation:
    """The candidates with their recipes, as `kvat tune` makes them."""
    with TemporaryDirectory() as directory:
        request = TuneRequest(
            out=Path(directory) / "out", model="builtin:llama", device="cpu", threads=1, profile=PROFILE
        )
        return prepare(request, WorkerProcess, Deadlines(), lambda activity: None)


def sharing_a_load(recipes: Mapping[Cell, Recipe]) -> list[list[Cell]]:
    """Cells by the load they need."""
    groups: dict[str, list[Cell]] = {}
    for cell, recipe in recipes.items():
        groups.setdefault(recipe.load_key, []).append(cell)
    return list(groups.values())


def cell_name(prepared: Preparation, cell: Cell) -> str:
    """A cell for a reader."""
    labels = {entry.candidate.id: entry.candidate.label for entry in prepared.entries}
    return f"{labels[cell.candidate]} at {cell.scenario}"


# Measuring


class Bench:
    """Makes processes that measure; itself it does nothing with the libraries but import them.

    Args:
        recipes: of all cells.
        scratch: see `Engine.adapter`.
    """

    def __init__(self, recipes: Mapping[Cell, Recipe], scratch: Path) -> None:
        self._recipes = recipes
        self._scenarios = {scenario.key: scenario for scenario in SCENARIOS}
        (environment,) = {tuple(recipe.environment.items()) for recipe in recipes.values()}
        # Read when torch is imported.
        os.environ.update(environment)
        self._adapter: Any = TransformersEngine().adapter(scratch)
        self._source = prompts.resolve(SOURCE)

    def rounds(self, groups: Sequence[Sequence[Cell]], count: int) -> list[Block]:
        """Every block, so many times."""
        order = random.Random(0)
        blocks = []
        for number in range(count):
            tasks = [(cell, [other for other in cells if other != cell]) for cells in groups for cell in cells]
            order.shuffle(tasks)
            for cell, others in tasks:
                order.shuffle(others)
                blocks.append(self.block(cell, others))
            print(f"round {number + 1} of {count}", flush=True)
        return blocks

    def block(self, cell: Cell, others: Sequence[Cell]) -> Block:
        """X alone, after each of the others, and alone again."""
        first = in_a_process(partial(self._measure, cell, None))
        after = {other: in_a_process(partial(self._measure, cell, other)) for other in others}
        return Block(cell, (first, in_a_process(partial(self._measure, cell, None))), after)

    def _measure(self, cell: Cell, before: Cell | None) -> Seen:
        load: dict[str, Any] = self._recipes[cell].load
        self._adapter.load_model(**load)
        if before is not None:
            self._calls(before, CALLS_BEFORE)
        applied, calls = self._calls(cell, self._recipes[cell].warmup + TIMED_CALLS)
        timed = calls[-TIMED_CALLS:]
        return Seen(
            applied=applied,
            tokens=hashlib.sha256(repr([call.tokens.tolist() for call in calls]).encode()).hexdigest(),
            decode_tps=median((len(call.token_s) - 1) / (call.token_s[-1] - call.token_s[0]) for call in timed),
        )

    def _calls(self, cell: Cell, count: int) -> tuple[Mapping[str, Any], list[Any]]:
        """Set up a cell, prove it, and make some calls, each with a prompt of its own."""
        scenario = self._scenarios[cell.scenario]
        made = [self._adapter.make_prompt(self._source, scenario.prompt_tokens, 1, nonce) for nonce in range(count)]
        self._adapter.prepare_cache(self._recipes[cell])
        applied = self._adapter.applied(made[0])
        assert not applied.mismatches, applied.mismatches
        self._adapter.prepare_cache(self._recipes[cell])
        return applied.values, [self._adapter.generate(prompt, scenario.output_tokens) for prompt in made]


def in_a_process(measure: Callable[[], Seen]) -> Seen:
    """Call it in a fork of this process; if that fails the benchmark ends."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=send_result, args=(measure, sender))
    process.start()
    sender.close()
    try:
        seen: Seen = receiver.recv()
    except EOFError:
        print("a measuring process ended without a result", file=sys.stderr)
        raise SystemExit(NOT_MEASURED) from None
    finally:
        process.join()
    return seen


def send_result(measure: Callable[[], Seen], sender: Connection) -> None:
    """The whole life of a fork."""
    sender.send(measure())


# Comparing


def find_differing(blocks: Sequence[Block], what: str) -> list[tuple[Cell, ...]]:
    """X, and Y where there is one, of each process that differs from the first one of X alone."""
    found: list[tuple[Cell, ...]] = []
    first: dict[Cell, Seen] = {}
    for block in blocks:
        expected = getattr(first.setdefault(block.cell, block.alone[0]), what)
        found += [(block.cell,) for one in block.alone if getattr(one, what) != expected]
        found += [(block.cell, before) for before, one in block.after.items() if getattr(one, what) != expected]
    return found


def noise_floor(blocks: Sequence[Block]) -> float:
    """Relative spread between processes that do the same."""
    logs = [[math.log(one.decode_tps) for one in block.alone] for block in blocks]
    return math.sqrt(fmean((first - second) ** 2 / 2 for first, second in logs))


def compare(blocks: Sequence[Block], pair: Pair, level: float) -> Comparison:
    """The ratio of a pair with its t interval over the rounds."""
    before, cell = pair
    logs = [block.log_ratio(before) for block in blocks if block.cell == cell]
    half = float(stdtrit(len(logs) - 1, 0.5 + level / 2)) * stdev(logs) / math.sqrt(len(logs))
    centre = fmean(logs)
    return Comparison(ratio=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half))


if __name__ == "__main__":
    sys.exit(main())
