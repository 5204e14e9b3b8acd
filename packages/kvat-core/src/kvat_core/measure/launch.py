"""One launch from spawn to end: the protocol by which every figure comes about."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from kvat_core import metrics
from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.messages import PromptSpec
from kvat_core.measure.redaction import anonymous
from kvat_core.measure.supervisor import Client, WorkerFailed
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Cell,
    Event,
    Failed,
    Failure,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Measured,
    PromptSource,
    Proof,
    Recipe,
    Record,
    Resources,
    Sample,
    Scenario,
    Timeline,
)

_Answer = TypeVar("_Answer", bound=Record)

OpenWorker = Callable[[Mapping[str, str]], Client]
"""Starts a worker with these additional environment variables."""


@dataclass(frozen=True)
class Bench:
    """What all launches of a run share."""

    run: Run
    recipes: Mapping[Cell, Recipe]
    source: PromptSource
    """With its text, unlike the profile in the journal."""
    record: Callable[[Event], None]
    """Journals an event; returns when it is on disk."""
    announce: Callable[[str], None]
    """Shows what is being done now."""
    open_worker: OpenWorker
    deadlines: Deadlines = field(default_factory=Deadlines)


def carry_out(order: LaunchOrder, bench: Bench) -> None:
    """Load the model once in a fresh process and measure the cells of an order.

    Failures are recorded, never raised. A cell whose worker died takes the rest of the launch
    with it; the search sees what is still outstanding and orders it again.
    """
    started = time.perf_counter()
    bench.record(order)
    launch = _Launch(order, bench)
    launch.run_all()
    wall_s = time.perf_counter() - started
    bench.record(LaunchEnd(launch=order.launch, wall_s=wall_s, generate_s=launch.generate_s))


def nonce(seed: int, round_number: int, scenario: str, index: int) -> int:
    """Start of a prompt: the same for all candidates of a block, different for everything else."""
    name = f"{seed}/{round_number}/{scenario}/{index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


class _Launch:
    def __init__(self, order: LaunchOrder, bench: Bench) -> None:
        self._order = order
        self._bench = bench
        self._header = bench.run.header
        self._load = bench.recipes[order.cells[0]]
        self.generate_s = 0.0

    def run_all(self) -> None:
        try:
            with self._bench.open_worker(self._load.environment) as self._client:
                if self._load_model():
                    self._measure()
        except (_LaunchOver, WorkerFailed):
            # Either it is recorded, or it befell what no cell depends on: memory, and the end of the worker.
            return

    def _load_model(self) -> bool:
        deadlines = self._bench.deadlines
        try:
            self._bench.announce("starting a worker")
            start_s, _ = self._ask(
                "start", {"engine": self._header.engine, "adapter": True}, "start", deadlines.start_s
            )
            self._bench.announce("loading the model")
            load_s, _ = self._ask("load", dict(self._load.load), "load", deadlines.load_s)
        except WorkerFailed as failed:
            for cell in self._order.cells:
                self._fail(cell, failed.failure)
            return False
        self._bench.record(Loaded(launch=self._order.launch, start_s=start_s, load_s=load_s))
        return True

    def _measure(self) -> None:
        if self._order.purpose == "memory":
            cell = self._order.cells[0]
            self._guarded(cell, self._exercise)
        else:
            # All proofs come first: a cell that runs the very same thing as another is not timed twice.
            for cell in self._order.cells:
                self._guarded(cell, self._prove)
            for cell in self._order.cells:
                if self._bench.run.original(cell) == cell:
                    self._guarded(cell, self._time)
        self._read_resources()
        self._ask("cleanup", {}, "cleanup", self._bench.deadlines.other_s)

    def _guarded(self, cell: Cell, step: Callable[[Cell], None]) -> None:
        """Run one step of a cell; its failure is recorded, and ends the launch unless the worker is sound."""
        if cell.candidate not in self._bench.run.live:
            return
        try:
            step(cell)
        except WorkerFailed as failed:
            self._fail(cell, failed.failure)
            if not failed.alive or failed.failure.kind not in ("unsupported", "not_applied"):
                raise _LaunchOver from failed

    def _prove(self, cell: Cell) -> None:
        self._prepare(cell)
        self._bench.announce(f"proving {self._label(cell)}")
        spec = self._prompt(cell, index=-1)
        seconds, value = self._ask("prove", spec, "prove", self._bench.deadlines.first_call_s)
        self.generate_s += seconds
        applied = _validated(Applied, value, "prove")
        if applied.mismatches:
            reason = "; ".join(applied.mismatches)
            raise WorkerFailed(Failure(kind="not_applied", phase="prove", reason=reason), alive=True)
        self._bench.record(Proof(launch=self._order.launch, cell=cell, applied=applied))

    def _time(self, cell: Cell) -> None:
        recipe = self._prepare(cell)
        for index in range(recipe.warmup_calls(self._header.profile.warmup)):
            self._bench.announce(f"warming up {self._label(cell)}")
            self._decode(cell, index=-2 - index, phase="warm-up")
        for index in range(self._header.profile.samples):
            self._bench.announce(f"timing {self._label(cell)}")
            timeline = self._decode(cell, index, phase="sample")
            if timeline.compilations:
                reason = f"{timeline.compilations} graphs were compiled inside the timed call"
                raise WorkerFailed(Failure(kind="invalid_output", phase="sample", reason=reason), alive=True)
            self._bench.record(
                Sample(
                    **timeline.model_dump(),
                    launch=self._order.launch,
                    round=self._order.round,
                    candidate=cell.candidate,
                    scenario=cell.scenario,
                    index=index,
                )
            )

    def _exercise(self, cell: Cell) -> None:
        """Two whole calls in a fresh process: the peak is theirs alone."""
        self._prepare(cell)
        self._bench.announce(f"peak memory of {self._label(cell)}")
        for index in range(2):
            self._decode(cell, index, phase="memory")

    def _read_resources(self) -> None:
        _, value = self._ask("resources", {}, "resources", self._bench.deadlines.other_s)
        resources = _validated(Resources, value, "resources")
        self._bench.record(Measured(launch=self._order.launch, cells=self._order.cells, resources=resources))

    def _prepare(self, cell: Cell) -> Recipe:
        recipe = self._bench.recipes[cell]
        self._ask("prepare", recipe.model_dump(mode="json"), "prepare", self._bench.deadlines.load_s)
        return recipe

    def _decode(self, cell: Cell, index: int, phase: str) -> Timeline:
        scenario = self._scenario(cell)
        arguments = {"prompt": self._prompt(cell, index), "max_new_tokens": scenario.output_tokens}
        _, value = self._ask("decode", arguments, phase, self._bench.deadlines.call_s)
        timeline = _validated(Timeline, value, phase)
        reason = metrics.invalid_reason(timeline, scenario)
        if reason is not None:
            raise WorkerFailed(Failure(kind="invalid_output", phase=phase, reason=reason), alive=True)
        self.generate_s += timeline.duration_s
        return timeline

    def _prompt(self, cell: Cell, index: int) -> dict[str, Any]:
        scenario = self._scenario(cell)
        spec = PromptSpec(
            source=self._bench.source,
            tokens=scenario.prompt_tokens,
            batch=scenario.batch_size,
            nonce=nonce(self._header.seed, self._order.round, cell.scenario, index),
        )
        return spec.model_dump(mode="json")

    def _ask(self, operation: Any, arguments: dict[str, Any], phase: str, timeout_s: float) -> tuple[float, Any]:
        """Seconds that an operation took, and its value; unusable input found this late is a failure like any other."""
        started = time.perf_counter()
        try:
            value = self._client.call(operation, arguments, phase, timeout_s)
        except UsageError as error:
            failure = Failure(kind="unsupported", phase=phase, reason=str(error))
            raise WorkerFailed(failure, alive=True) from error
        return time.perf_counter() - started, value

    def _fail(self, cell: Cell, failure: Failure) -> None:
        self._bench.record(Failed(launch=self._order.launch, cell=cell, failure=self._scrubbed(failure)))

    def _scrubbed(self, failure: Failure) -> Failure:
        """Whatever an engine prints may echo a prompt; only beside our own sample texts may it be kept."""
        if self._bench.source.kind == "preset":
            tail = anonymous(failure.stderr_tail)
        else:
            tail = failure.stderr_tail and "(withheld: the prompts are the user's own)"
        return failure.model_copy(update={"stderr_tail": tail})

    def _scenario(self, cell: Cell) -> Scenario:
        return self._bench.run.scenarios[cell.scenario]

    def _label(self, cell: Cell) -> str:
        label = next(e.candidate.label for e in self._bench.run.candidates if e.candidate.id == cell.candidate)
        return f"{label} at {cell.scenario}"


def _validated(kind: type[_Answer], value: Any, phase: str) -> _Answer:
    """The answer of an adapter as what it should be; anything else is a failure of the cell, not of kvat."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        failure = Failure(kind="invalid_output", phase=phase, reason=f"the adapter's answer is no {kind.__name__}")
        raise WorkerFailed(failure, alive=True) from error


class _LaunchOver(Exception):
    """The worker is gone or not to be trusted; what is left of the order is outstanding."""
