"""The search that asks a sampler, replayed in made spaces without measuring."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kvat_core import TuneRequest, tune
from kvat_core.decision import decide
from kvat_core.errors import UsageError
from kvat_core.run import Run
from kvat_core.schema import (
    Candidate,
    CandidateEntry,
    Cell,
    Event,
    Failed,
    Failure,
    Header,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    RequestTiming,
    Sample,
)
from kvat_core.search import Allowance, Optuna, Race

from .conftest import SCENARIO, header

NOISE = 0.005
"""Standard deviation of a launch's log speed, as of a calm machine."""
FIRST, LAST = "a", "e"


class Space:
    """Knobs of four values each, the first two of which make the load; effects add up, and some pairs interact."""

    def __init__(self, seed: int, knobs: int = 5, failing: float = 0.0, excluded: float = 0.0) -> None:
        source = random.Random(f"space/{seed}")
        self.seed = seed
        self.names = [f"knob{number}" for number in range(knobs)]
        effect = {(knob, value): source.gauss(0, 0.12) for knob in self.names for value in "0123"}
        pairs = {(x, y): source.gauss(0, 0.04) for x, y in itertools.product("0123", repeat=2)}
        self.settings = {
            "".join(values): dict(zip(self.names, values, strict=True))
            for values in itertools.product("0123", repeat=knobs)
        }
        self.truth = {
            name: sum(effect[pair] for pair in one.items()) + pairs[one["knob1"], one["knob2"]]
            for name, one in self.settings.items()
        }
        self.incumbent = source.choice(sorted(self.settings))
        others = [name for name in sorted(self.settings) if name != self.incumbent]
        self.failing = {name for name in others if source.random() < failing}
        self.excluded = {name for name in others if source.random() < excluded}

    @property
    def load_keys(self) -> Mapping[Cell, str]:
        return {Cell(candidate=name, scenario=SCENARIO.key): name[:2] for name in self.settings}

    def empty_run(self) -> Run:
        run = Run(header(seed=self.seed))
        for name in [self.incumbent, *(name for name in self.settings if name != self.incumbent)]:
            candidate = Candidate(id=name, label=name, settings=self.settings[name])
            exclusion = "cannot be" if name in self.excluded else None
            run.add(CandidateEntry(candidate=candidate, incumbent=name == self.incumbent, exclusion=exclusion))
        return run

    def launched(self, order: LaunchOrder) -> Iterator[Event]:
        """What a launch shows; the same whenever it is repeated."""
        yield order
        yield Loaded(launch=order.launch, start_s=1.0, load_s=1.0)
        for cell in order.cells:
            if cell.candidate in self.failing:
                failure = Failure(kind="oom_device", phase="prove", reason="it does not fit")
                yield Failed(launch=order.launch, cell=cell, failure=failure)
                break
            source = random.Random(f"{self.seed}/{order.round}/{cell.candidate}")
            pace = math.exp(-self.truth[cell.candidate] + source.gauss(0, NOISE))
            for index in range(order.samples or 1):
                yield _sample(cell.candidate, order, pace, index)
        yield LaunchEnd(launch=order.launch, wall_s=3.0, generate_s=1.0)

    def best(self) -> float:
        return max(self.truth[name] for name in self.truth.keys() - self.failing - self.excluded)


def _sample(candidate: str, order: LaunchOrder, pace: float, index: int) -> Sample:
    request = RequestTiming(prompt_tokens=8, output_tokens=3, ttft_s=pace, e2e_s=3 * pace, token_gaps_s=(pace, pace))
    return Sample(
        clock="host",
        duration_s=3 * pace,
        requests=(request,),
        launch=order.launch,
        round=order.round,
        candidate=candidate,
        scenario=SCENARIO.key,
        index=index,
    )


def searched(space: Space, run: Run, search: Race, until: str = "memory") -> list[LaunchOrder]:
    """Carry out what the search orders until the first launch for a purpose."""
    orders: list[LaunchOrder] = []
    while (order := search.next(run)) is not None and order.purpose != until:
        for event in space.launched(order):
            run.add(event)
        orders.append(order)
    return orders


def screened(run: Run) -> set[str]:
    return {cell.candidate for order in run.launches if order.purpose == "screening" for cell in order.cells}
