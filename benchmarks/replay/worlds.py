"""Worlds to replay a search in: what a launch of some candidates would have shown, and what it would have taken."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

SAMPLES = 3
"""Timed calls per launch."""


class Choice(NamedTuple):
    """What a strategy has come to, and what that took."""

    winner: str
    cost_s: float
    loads: int
    verdict: str = ""
    confidence: float | None = None
    epsilon: float | None = None
    ratio: tuple[float, float | None, float | None] | None = None
    """Winner ÷ incumbent, with its interval."""
    dropped: tuple[str, ...] = ()
    """Raced, and taken out of the race before its last block."""
    screened_at: float | None = None
    """Place of the winner among all launches of screening: 0 = the first, 1 = the last."""


class Call(NamedTuple):
    """What a timed call has shown."""

    ttft_s: float
    decode_tps: float


class Shown(NamedTuple):
    """A candidate in a launch: its timed calls; none if the candidate fails."""

    candidate: str
    calls: tuple[Call, ...]


class Launch(NamedTuple):
    """What a launch has shown and taken. A failure ends it: whoever comes after is not in it."""

    shown: tuple[Shown, ...]
    load_s: float
    rest_s: float


class World(ABC):
    """A table with true speeds, and noise. The same seed shows the same to whoever asks the same."""

    incumbent: str
    load_keys: Mapping[str, str]
    settings: Mapping[str, Mapping[str, str]]
    truth: Mapping[str, float]
    """Log of the true speed of each candidate that works."""

    @abstractmethod
    def launch(self, block: int, candidates: Sequence[str], samples: int) -> Launch:
        """Load the model once and measure candidates that share the load, in order.

        Args:
            block: launches of one block are neighbours in time.
            candidates: in the order in which they are measured.
            samples: timed calls of each.
        """

    @abstractmethod
    def memory_s(self, candidate: str) -> float:
        """What a process takes that reads the peak memory of a candidate."""

    def regret(self, winner: str) -> float:
        """Share of the best speed that a choice gives away."""
        return 1 - math.exp(self.truth[winner] - max(self.truth.values()))


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log speeds."""

    launch: float
    """Of a candidate from one launch to another, half of its variance shared by all of a launch."""
    sample: float
    """Of a timed call in its launch."""
    drift: float = 0.02
    """Of a slow wandering of the machine, Ornstein-Uhlenbeck."""
    drift_time_s: float = 300.0
    planted: float = 0.0
    """Log of by how much the machine is faster after `planted_s` than at first, in a straight line."""
    planted_s: float = 3600.0


LOAD_S, PROOF_S, WARMUP_S, SAMPLE_S = 20.0, 1.5, 1.5, 2.0
"""Loading, and per candidate its proof, its warm-up and each timed call (research: 20 s, 3 s together, 2 s)."""


@dataclass
class Synthetic(World):
    """A made table of candidates in groups that share a load."""

    noise: Noise
    seed: int
    truth: dict[str, float]
    load_keys: dict[str, str]
    settings: dict[str, dict[str, str]]
    failing: frozenset[str]
    incumbent: str
    now_s: float = 0.0
    _wandering: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._source = random.Random(f"noise/{self.seed}")
        self._wandering = self._source.gauss(0, self.noise.drift)

    def launch(self, block: int, candidates: Sequence[str], samples: int) -> Launch:
        """See `World.launch`. Proofs come first, and a candidate that fails does so in its proof."""
        noise, source = self.noise, self._source
        self._pass(LOAD_S)
        rest_s = 0.0
        for name in candidates:
            self._pass(PROOF_S)
            rest_s += PROOF_S
            if name in self.failing:
                return Launch((Shown(name, ()),), LOAD_S, rest_s)
        shared = source.gauss(0, noise.launch * math.sqrt(0.5))
        shown = []
        for name in candidates:
            level = self.truth[name] + shared + source.gauss(0, noise.launch * math.sqrt(0.5))
            self._pass(WARMUP_S)
            speeds = []
            for _ in range(samples):
                self._pass(SAMPLE_S)
                speed = math.exp(level + self._drift() + source.gauss(0, noise.sample))
                speeds.append(Call(ttft_s=1 / speed, decode_tps=speed))
            rest_s += WARMUP_S + samples * SAMPLE_S
            shown.append(Shown(name, tuple(speeds)))
        return Launch(tuple(shown), LOAD_S, rest_s)

    def memory_s(self, candidate: str) -> float:
        """See `World.memory_s`: a load, warm-up, and a call."""
        return LOAD_S + WARMUP_S + SAMPLE_S

    def _drift(self) -> float:
        return self._wandering + self.noise.planted * min(1.0, self.now_s / self.noise.planted_s)

    def _pass(self, seconds: float) -> None:
        keep = math.exp(-seconds / self.noise.drift_time_s)
        spread = self.noise.drift * math.sqrt(1 - keep * keep)
        self._wandering = keep * self._wandering + self._source.gauss(0, spread)
        self.now_s += seconds


Truth = Literal["independent", "additive", "equal"]


def synthetic(size: int, noise: Noise, seed: int, *, per_load: int = 8, truth: Truth = "independent") -> Synthetic:
    """A table in which 10 % of the candidates fail, unless all are equal. What runs today is any of those that work.

    Independent: 15 % lie within 1 % of the best, the rest is spread over tens of percent, whatever their settings are.
    Additive: each value of each setting has an effect, so that good ones share loads and are few.
    """
    source = random.Random(f"table/{size}/{seed}")
    names = [f"c{number:03d}" for number in range(size)]
    source.shuffle(names)
    failing = frozenset() if truth == "equal" else frozenset(names[: round(0.1 * size)])
    working = [name for name in names if name not in failing]
    ordered = sorted(names)
    source.shuffle(ordered)
    places = {name: divmod(rank, per_load) for rank, name in enumerate(ordered)}
    load_keys = {name: f"load{load}" for name, (load, _) in places.items()}
    settings = {
        name: {"one": str(load % 8), "other": str(load // 8), "third": str(rank)}
        for name, (load, rank) in places.items()
    }
    if truth == "additive":
        levels = _additive(settings, working, source)
    else:
        levels = {name: 0.0 if truth == "equal" else source.gauss(0, 0.2) for name in working}
    if truth == "independent":
        best = max(levels.values())
        for name in source.sample(working, max(1, round(0.15 * size))):
            levels[name] = best - source.uniform(0, 0.01)
    return Synthetic(noise, seed, levels, load_keys, settings, failing, source.choice(working))


def _additive(
    settings: Mapping[str, Mapping[str, str]], working: Sequence[str], source: random.Random
) -> dict[str, float]:
    """Levels that are sums of an effect of each setting, and a little of their own."""
    pairs = sorted({pair for values in settings.values() for pair in values.items()})
    effects = {pair: source.gauss(0, 0.12) for pair in pairs}
    return {name: sum(effects[pair] for pair in settings[name].items()) + source.gauss(0, 0.02) for name in working}
