"""Judges kvat's decisions in worlds whose truth is known: made tables, and recorded ones that are resampled.

Each world is searched by `kvat tune`'s own race, and by what others do; their regret, their cost and, of the race,
what it claims are compared with the truth. Costs are ÷ that of an interleaved grid of three launches in the same world,
which shares loads alike; the race pays for the processes that read its peak memory, too. Nothing is measured, so worlds
run side by side.

    python benchmarks/replay --out benchmarks/results/replay.json
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import others
import own
from _record import Bound, Record, at_least_one, option_parser
from recorded import TABLES, Recorded, read_table
from worlds import Choice, Noise, World, synthetic

from kvat_core.machine import read_machine

CALM, NOISY = Noise(launch=0.01, sample=0.01), Noise(launch=0.03, sample=0.03)
DRIFTING = Noise(launch=0.01, sample=0.01, planted=0.2)
LEAST_IN_BIN = 100
LEAST_POOLED = 2000
MOST_OVERCLAIM = 0.05
LEAST_COVERED = 0.9
"""Of the intervals that are published as 95 %: of who wins, which was chosen by the same figures in part."""
RECORDED = ("llama", "smollm2")
"""Tables that have to be there."""


@dataclass(frozen=True)
class Case:
    """A kind of world."""

    name: str
    make: Callable[[int], World]
    strategies: tuple[str, ...] = ("race",)
    most_cost: float | None = None
    """Of the race ÷ that of an interleaved grid."""
    calm: bool = False
    """Whether the winner has to be within 1 % of the best nearly always."""


class Outcome(NamedTuple):
    """What a strategy has come to in one world."""

    strategy: str
    regret: float
    cost: float
    """÷ that of an interleaved grid of three launches that shares loads alike."""
    choice: Choice
    equal: bool
    """Whether the winner is the incumbent."""
    ahead: float
    """True log ratio of the winner to the incumbent."""


ALL = ("race", "one_shot", "interleaved", "at_random", "halving")
MOST_COST = {6: 1.6, 12: 1.6, 24: 1.6, 96: 0.75, 500: 0.3}


def cases(sizes: Sequence[int]) -> list[Case]:
    """All kinds of worlds, those that are resampled last."""
    found = []
    for size in sizes:
        for label, noise in (("1 %", CALM), ("3 %", NOISY)):
            found.append(
                Case(
                    f"{size} candidates, noise {label}",
                    _Made(size, noise),
                    ALL,
                    MOST_COST.get(size),
                    calm=noise is CALM,
                )
            )
            if size >= 24:
                alone = _Made(size, noise, per_load=1)
                found.append(Case(f"{size} candidates, noise {label}, no shared loads", alone, ALL, calm=noise is CALM))
        if size >= 96:
            found.append(Case(f"{size} candidates, noise 1 %, effects add up", _Made(size, CALM, additive=True), ALL))
    if 96 in sizes:
        found.append(Case("96 candidates, noise 1 %, planted drift", _Made(96, DRIFTING), calm=True))
        found += [
            Case(f"null: 96 equal candidates, noise {label}", _Made(96, noise, equal=True))
            for label, noise in (("1 %", CALM), ("3 %", NOISY))
        ]
    for label, noise in (("1 %", CALM), ("3 %", NOISY)):
        found.append(Case(f"null: 24 equal candidates, noise {label}", _Made(24, noise, equal=True)))
        found.append(Case(f"A/A: 2 equal candidates, noise {label}", _Made(2, noise, equal=True)))
    tables = sorted(table.stem for table in TABLES.glob("*.json"))
    return found + [Case(f"recorded: {table}", _Resampled(table), ALL, MOST_COST[24]) for table in tables]


@dataclass(frozen=True)
class _Made:
    size: int
    noise: Noise
    per_load: int = 8
    equal: bool = False
    additive: bool = False

    def __call__(self, seed: int) -> World:
        truth = "equal" if self.equal else "additive" if self.additive else "independent"
        return synthetic(self.size, self.noise, seed, per_load=self.per_load, truth=truth)


@dataclass(frozen=True)
class _Resampled:
    table: str

    def __call__(self, seed: int) -> World:
        return Recorded(read_table(self.table), seed)


def play(case: Case, seed: int) -> list[Outcome]:
    """Search the same world with each strategy."""
    grid_s = others.interleaved(case.make(seed), seed).cost_s
    outcomes = []
    taken_s = 0.0
    for name in case.strategies:
        world = case.make(seed)
        if name == "race":
            choice = own.race(world, seed)
            taken_s = choice.cost_s
        elif name == "at_random":
            choice = others.at_random(world, seed, taken_s)
        else:
            choice = getattr(others, name)(world, seed)
        won, today = choice.winner, world.incumbent
        ahead = world.truth[won] - world.truth[today]
        outcomes.append(Outcome(name, world.regret(won), choice.cost_s / grid_s, choice, won == today, ahead))
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a strategy has come to in all worlds of a kind."""
    regrets = sorted(one.regret for one in outcomes)
    values: dict[str, Any] = {
        "worlds": len(outcomes),
        "regret_mean": _rounded(fmean(regrets)),
        "regret_p95": _rounded(_quantile(regrets, 0.95)),
        "within_1_percent": _rounded(fmean(regret <= 0.01 for regret in regrets)),
        "cost_vs_grid": _rounded(fmean(one.cost for one in outcomes)),
        "loads": _rounded(fmean(one.choice.loads for one in outcomes)),
    }
    if outcomes[0].strategy == "race":
        values |= _claims(outcomes)
    return values


def _claims(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    in_epsilon = sorted(one.regret / (one.choice.epsilon or math.inf) for one in outcomes)
    # What runs today is screened first of all, so it tells nothing of a preference for what came late.
    placed = [one.choice.screened_at for one in outcomes if one.choice.screened_at is not None and not one.equal]
    claimed = [(one.choice.ratio, one.ahead) for one in outcomes if one.choice.ratio is not None and not one.equal]
    covered = [
        low <= math.exp(ahead) <= high for (_, low, high), ahead in claimed if low is not None and high is not None
    ]
    return {
        "epsilon_mean": _rounded(fmean(one.choice.epsilon or 0.0 for one in outcomes)),
        "regret_p95_in_epsilon": _rounded(_quantile(in_epsilon, 0.95)),
        "verdicts": dict(Counter(one.choice.verdict for one in outcomes)),
        "confidence_mean": _rounded(fmean(one.choice.confidence or 0.0 for one in outcomes)),
        "worlds_with_someone_dropped": sum(bool(one.choice.dropped) for one in outcomes),
        "winners_screened": len(placed),
        "winners_screened_in_the_later_half": _rounded(fmean(at > 0.5 for at in placed)) if placed else None,
        "intervals": len(covered),
        "intervals_that_hold_the_truth": _rounded(fmean(covered)) if covered else None,
        "claimed_over_true": _rounded(math.exp(fmean(math.log(value) - ahead for (value, _, _), ahead in claimed)))
        if claimed
        else None,
    }


def reliability(outcomes: Iterable[Outcome]) -> list[dict[str, float]]:
    """Claimed beside realised confidence, in bins of equally many worlds.

    Realised is what is claimed: that the best is not ahead of the winner by more than ε.
    """
    claims = sorted(
        (one.choice.confidence or 0.0, 1 / (1 - one.regret) - 1 <= (one.choice.epsilon or 0.0)) for one in outcomes
    )
    bins = max(1, len(claims) // (2 * LEAST_IN_BIN)) if claims else 0
    edges = [round(number * len(claims) / bins) for number in range(bins + 1)]
    found = []
    for start, end in pairwise(edges):
        part = claims[start:end]
        claimed, realised = fmean(claim for claim, _ in part), fmean(held for _, held in part)
        found.append({"worlds": len(part), "claimed": _rounded(claimed), "realised": _rounded(realised)})
    return found


def bounds(case: Case, race: dict[str, Any]) -> list[Bound]:
    """What has to hold in worlds of a kind."""
    found = [Bound(f"{case.name}: 95th percentile of regret ÷ ε", race["regret_p95_in_epsilon"], "<=", 2.0)]
    if case.calm:
        found.append(Bound(f"{case.name}: winners within 1 % of the best", race["within_1_percent"], ">=", 0.97))
    if case.most_cost is not None:
        found.append(Bound(f"{case.name}: cost ÷ interleaved grid", race["cost_vs_grid"], "<=", case.most_cost))
    ties = race["verdicts"].get("tie", 0) / race["worlds"]
    if case.name.startswith("A/A"):
        found.append(Bound(f"{case.name}: ties", ties, ">=", 0.98))
    if case.name.startswith("null"):
        dropped = race["worlds_with_someone_dropped"] / race["worlds"]
        found.append(Bound(f"{case.name}: ties", ties, ">=", 0.95))
        if " 24 " not in case.name:  # where nobody ever leaves the blocks
            found.append(Bound(f"{case.name}: worlds with a false elimination", dropped, "<=", 0.05))
    if race["intervals"] >= LEAST_IN_BIN:
        held = race["intervals_that_hold_the_truth"]
        found.append(Bound(f"{case.name}: claimed intervals that hold the truth", held, ">=", LEAST_COVERED))
    if "drift" in case.name and race["winners_screened"]:
        # One-sided, 5 %.
        most = 0.5 + 1.645 * math.sqrt(0.25 / race["winners_screened"])
        late = race["winners_screened_in_the_later_half"]
        found.append(Bound(f"{case.name}: winners that were screened late", late, "<=", _rounded(most)))
    return found


def main() -> int:
    options = _options()
    record = Record(options)
    wanted = [case for case in cases(options.sizes) if options.only is None or options.only in case.name]
    results: dict[str, Any] = {}
    checks: list[Bound] = []
    claims: list[Outcome] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for case in wanted:
            seeds = range(options.seed, options.seed + options.worlds)
            played = [one for world in pool.map(play, [case] * len(seeds), seeds, chunksize=4) for one in world]
            rows = {name: summary([one for one in played if one.strategy == name]) for name in case.strategies}
            results[case.name] = rows
            checks += bounds(case, rows["race"])
            if not getattr(case.make, "equal", False):  # there whatever is chosen is the best
                claims += [one for one in played if one.strategy == "race"]
            print(f"{case.name}: {rows['race']}", flush=True)
    bins = reliability(claims)
    if bins:
        worst = max(one["claimed"] - one["realised"] for one in bins)
        name = f"claimed less realised confidence, worst of {len(bins)} bins"
        checks.append(Bound(name, worst, "<=", MOST_OVERCLAIM))
    if options.only is None:
        checks.append(Bound("worlds whose confidence is pooled", len(claims), ">=", LEAST_POOLED))
        found = sum(f"recorded: {name}" in results for name in RECORDED)
        checks.append(Bound("recorded tables", found, ">=", len(RECORDED)))
    values = {"cases": results, "reliability": bins}
    code = record.close(read_machine("cpu", None), checks, values)
    if options.out is not None:
        from show import write_plot, write_table

        write_table(options.out.with_suffix(".md"), results, bins)
        write_plot(options.out.with_suffix(".svg"), results, bins)
    return code


def _options() -> Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--worlds", type=at_least_one, default=200, metavar="N", help="of each kind")
    parser.add_argument("--sizes", type=int, nargs="+", default=[6, 12, 24, 96, 500], metavar="N")
    parser.add_argument("--only", metavar="TEXT", help="kinds of worlds whose name holds this")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first world")
    parser.add_argument("--jobs", type=at_least_one, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser.parse_args()


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _rounded(value: float) -> float:
    return round(value, 5)


if __name__ == "__main__":
    sys.exit(main())
