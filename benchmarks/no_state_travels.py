"""Is a candidate measured after another one in the same process what it is alone?

    python benchmarks/no_state_travels.py [--rounds 10] [--out FILE]

Takes every cell (candidate and scenario) of the safe space of the built-in Llama on the CPU, in two scenarios of
different length, and every ordered pair (Y, X) of cells that may share a launch. X after Y must be X alone: the
same read-back, the same tokens from the same prompts, and the same decode rate as far as can be told.

Each measurement has a process of its own, with one thread: a fork of one that has imported the libraries
and done nothing with them, which is what a worker is before it loads a model. There Y is set up and called, and
X set up, proven, warmed up and timed, as in a launch. A block is X alone, X after each Y in random order, and X alone
again; the blocks of all X, in random order, make a round. The ratio of a pair in a round is the rate
of X after Y over the geometric mean of both rates of X alone. Its interval over the rounds has a level of
1 - 0.05 ÷ pairs (Bonferroni), so that the chance of any false alarm among all pairs is at most 5 %. The noise floor
is the spread between processes of X alone, from the two of each block. A pair whose interval lies wholly outside
1 ± max(1 %, 2 × noise floor) differs. Since noise hides differences, the smallest one that would have shown in
every pair has a bound, too. A cell that cannot be measured at all after another one ends the benchmark with 1.
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
from kvat_core.engine import EngineError
from kvat_core.field import MIN_DIFFERENCE
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
MAX_UNSEEN = 0.2

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

    def unseen(self, margin: float) -> float:
        """The largest slow-down at which an interval of this width still would not lie outside."""
        return 1 - (1 - margin) * self.ratio / self.high


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=10, metavar="N")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("an interval needs two rounds")
    record = Record(options)
    prepared = look()
    groups = sharing_a_load(prepared.recipes)
    pairs = [pair for cells in groups for pair in permutations(cells, 2)]
    with TemporaryDirectory() as scratch:
        blocks = Bench(prepared, Path(scratch)).rounds(groups, options.rounds)
    name = partial(cell_name, prepared)
    findings = Findings(blocks, pairs)
    for pair in findings.outside:
        print(f"{name(pair[1])} after {name(pair[0])}: {findings.compared[pair]}")
    print(f"{len(pairs)} pairs, {options.rounds} rounds, noise floor {findings.noise_floor:.2%}")
    return record.close(prepared.header.machine, findings.bounds(), findings.values(name))


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
        prepared: with the recipes of all cells.
        scratch: see `Engine.adapter`.
    """

    def __init__(self, prepared: Preparation, scratch: Path) -> None:
        self._prepared = prepared
        self._recipes = prepared.recipes
        self._scenarios = {scenario.key: scenario for scenario in SCENARIOS}
        (environment,) = {tuple(recipe.environment.items()) for recipe in self._recipes.values()}
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
        first = self._in_a_process(cell, None)
        after = {other: self._in_a_process(cell, other) for other in others}
        return Block(cell, (first, self._in_a_process(cell, None)), after)

    def _in_a_process(self, cell: Cell, before: Cell | None) -> Seen:
        """X after Y, or alone, in a fork of this process; if that fails the benchmark ends."""
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=self._send, args=(cell, before, sender))
        process.start()
        sender.close()
        try:
            seen: Seen | str = receiver.recv()
        except EOFError:
            raise SystemExit(NOT_MEASURED) from None  # it has printed why
        finally:
            process.join()
        if isinstance(seen, Seen):
            return seen
        after = f" after {cell_name(self._prepared, before)}" if before else ""
        print(f"BROKEN  {cell_name(self._prepared, cell)}{after}: {seen}")
        raise SystemExit(1)

    def _send(self, cell: Cell, before: Cell | None, sender: Connection) -> None:
        """The whole life of a fork."""
        try:
            sender.send(self._measure(cell, before))
        except EngineError as error:
            sender.send(str(error))

    def _measure(self, cell: Cell, before: Cell | None) -> Seen:
        load: dict[str, Any] = self._recipes[cell].load
        self._adapter.load_model(**load)
        if before is not None:
            self._calls(before, CALLS_BEFORE)
        prompt, *_ = self._prompts(cell, 1)
        self._adapter.prepare_cache(self._recipes[cell])
        applied = self._adapter.applied(prompt)
        calls = self._calls(cell, self._recipes[cell].warmup + TIMED_CALLS)
        return Seen(
            applied=applied.model_dump(),
            tokens=hashlib.sha256(repr([call.tokens.tolist() for call in calls]).encode()).hexdigest(),
            decode_tps=median(map(decode_tps, calls[-TIMED_CALLS:])),
        )

    def _calls(self, cell: Cell, count: int) -> list[Any]:
        """Set up a cell and make some calls, each with a prompt of its own."""
        output_tokens = self._scenarios[cell.scenario].output_tokens
        made = self._prompts(cell, count)
        self._adapter.prepare_cache(self._recipes[cell])
        return [self._adapter.generate(prompt, output_tokens) for prompt in made]

    def _prompts(self, cell: Cell, count: int) -> list[Any]:
        prompt_tokens = self._scenarios[cell.scenario].prompt_tokens
        return [self._adapter.make_prompt(self._source, [prompt_tokens], nonce) for nonce in range(count)]


def decode_tps(call: Any) -> float:
    """Tokens per second of a call, the first one apart."""
    [token_s] = call.token_s
    return float((len(token_s) - 1) / (token_s[-1] - token_s[0]))


# Comparing


class Findings:
    """What the blocks say of the pairs."""

    def __init__(self, blocks: Sequence[Block], pairs: Sequence[Pair]) -> None:
        self._blocks = blocks
        self._level = 1 - ALPHA / len(pairs)
        self.noise_floor = noise_floor(blocks)
        self.margin = max(MIN_DIFFERENCE, 2 * self.noise_floor)
        self.compared = {pair: compare(blocks, pair, self._level) for pair in pairs}
        self.outside = [pair for pair, one in self.compared.items() if one.lies_outside(self.margin)]
        self._differing = {what: find_differing(blocks, what) for what in ("applied", "tokens")}

    def bounds(self) -> list[Bound]:
        """What must hold."""
        rates = f"pairs out of {len(self.compared)} whose decode rate differs"
        hidden = max(one.unseen(self.margin) for one in self.compared.values())
        return [
            Bound("processes whose read-back differs", len(self._differing["applied"]), "<=", 0),
            Bound("processes whose tokens differ", len(self._differing["tokens"]), "<=", 0),
            Bound(rates, len(self.outside), "<=", 0),
            Bound("largest slow-down that could hide in any pair", hidden, "<=", MAX_UNSEEN),
        ]

    def values(self, name: Callable[[Cell], str]) -> dict[str, Any]:
        """Raw values and what follows from them, with the names of the cells."""
        differing = {what: [list(map(name, cells)) for cells in found] for what, found in self._differing.items()}
        pairs = [
            {"before": name(before), "cell": name(cell), **vars(one)} for (before, cell), one in self.compared.items()
        ]
        rates = [
            {
                "cell": name(block.cell),
                "alone": [one.decode_tps for one in block.alone],
                "after": {name(before): one.decode_tps for before, one in block.after.items()},
            }
            for block in self._blocks
        ]
        noise = {"noise_floor": self.noise_floor, "margin": self.margin, "level": self._level}
        return {**noise, "differing": differing, "pairs": pairs, "decode_tps": rates}


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
