"""What others do: choose by the best figure, after measuring everybody, some, or fewer and fewer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from statistics import fmean, median

import optuna
from worlds import SAMPLES, Call, Choice, World

ONE_SHOT_SAMPLES = 10
RUNGS = 9
"""Launches that successive halving gives to what it never prunes."""


def one_shot(world: World, seed: int) -> Choice:
    """Everybody in one launch, ten timed calls each, and the best median wins."""
    return _best_of(_Bench(world), [list(_groups(world, random.Random(seed)))], ONE_SHOT_SAMPLES)


def interleaved(world: World, seed: int) -> Choice:
    """Everybody in three interleaved blocks, and the best mean wins."""
    source = random.Random(seed)
    return _best_of(_Bench(world), [list(_groups(world, source)) for _ in range(3)], SAMPLES)


def at_random(world: World, seed: int, cost_s: float) -> Choice:
    """Random loads with all their candidates, for as long as something else took; the best median wins."""
    bench = _Bench(world)
    seen: dict[str, float] = {}
    for names in _groups(world, random.Random(seed)):
        if bench.cost_s >= cost_s and seen:
            break
        bench.measure(0, names, SAMPLES, seen)
    return Choice(max(seen, key=lambda name: seen[name]), bench.cost_s, bench.loads)


def halving(world: World, seed: int) -> Choice:
    """Optuna's successive halving: a candidate is a trial, pruned by its mean over 1, 3 and 9 launches."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    source, bench = random.Random(seed), _Bench(world)
    names = sorted(world.load_keys)
    source.shuffle(names)
    means: dict[str, float] = {}
    for name in names:
        trial, values = study.ask(), list[float]()
        for rung in range(1, RUNGS + 1):
            seen: dict[str, float] = {}
            bench.measure(rung, [name], SAMPLES, seen)
            values += seen.values()
            if not seen:
                break
            trial.report(fmean(values), rung)
            if trial.should_prune():
                break
        if values:
            study.tell(trial, fmean(values))
            # What was pruned has lost, however good its first launches looked.
            means[name] = fmean(values) if len(values) == RUNGS else -math.inf
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return Choice(max(means, key=lambda name: means[name]), bench.cost_s, bench.loads)


class _Bench:
    """Launches in a world, with what they cost."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.cost_s = 0.0
        self.loads = 0

    def measure(self, block: int, names: list[str], samples: int, seen: dict[str, float]) -> None:
        """Launch candidates that share a load, again without those that fail, and note their log scores."""
        while names:
            launch = self._world.launch(block, names, samples)
            self.cost_s += launch.load_s + launch.rest_s
            self.loads += 1
            for shown in launch.shown:
                if shown.calls:
                    seen[shown.candidate] = median(_score(call) for call in shown.calls)
            failed = {shown.candidate for shown in launch.shown if not shown.calls}
            names = [name for name in names if name not in failed] if failed else []


def _score(call: Call) -> float:
    return 0.5 * math.log(call.decode_tps) - 0.5 * math.log(call.ttft_s)


def _groups(world: World, source: random.Random) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, key in world.load_keys.items():
        groups.setdefault(key, []).append(name)
    ordered = [groups[key] for key in sorted(groups)]
    source.shuffle(ordered)
    for names in ordered:
        source.shuffle(names)
        yield names


def _best_of(bench: _Bench, blocks: list[list[list[str]]], samples: int) -> Choice:
    values: dict[str, list[float]] = {}
    failed: set[str] = set()
    for number, groups in enumerate(blocks):
        seen: dict[str, float] = {}
        for names in groups:
            bench.measure(number, [name for name in names if name not in failed], samples, seen)
        for name, value in seen.items():
            values.setdefault(name, []).append(value)
        failed |= {name for names in groups for name in names if name not in seen}
    means = {name: fmean(shown) for name, shown in values.items()}
    return Choice(max(means, key=lambda name: means[name]), bench.cost_s, bench.loads)
