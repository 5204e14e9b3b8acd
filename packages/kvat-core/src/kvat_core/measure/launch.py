"""One launch from spawn to end: the protocol by which every figure comes about."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kvat_core import metrics
from kvat_core.errors import CannotWrite, Paused, UsageError
from kvat_core.measure.conditions import Watch, causes
from kvat_core.measure.deadlines import Deadlines, Limits
from kvat_core.measure.messages import Operation, PromptSpec, Started
from kvat_core.measure.redaction import anonymous, published, without_prompt
from kvat_core.measure.supervisor import HELD, Client, WorkerFailed
from kvat_core.outputs import is_path
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Cell,
    ContextTrial,
    Event,
    Failed,
    Failure,
    FirstCall,
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

PROOF, FIRST_CALL, WARM_UP = -1, -2, -3
"""Indices of calls that are not timed; each further warm-up call has one less."""


@dataclass(frozen=True)
class Bench:
    """What all launches of a run share."""

    run: Run
    recipes: Mapping[Cell, Recipe]
    """Of all cells that are timed."""
    recipe_at: Callable[[Cell], Recipe]
    """The same for scenarios that are none of the profile's."""
    source: PromptSource
    """With its text, unlike the profile in the journal."""
    scratch: Path
    """Of this process's part of the run; see `Engine.adapter`."""
    record: Callable[[Event], None]
    """Journals an event; returns when it is on disk."""
    announce: Callable[[str], None]
    """Shows what is being done now."""
    open_worker: OpenWorker
    watch: Watch
    process_device_bytes: Callable[[int | None], int | None]
    """Memory of a process on the device by its driver."""
    deadlines: Deadlines
    options: Mapping[str, str]
    """Of the engine, as the user gave them."""
    compiled: set[str] = field(default_factory=set)
    """Keys of the loads for which the compiler has cached something in `scratch`."""


def carry_out(order: LaunchOrder, bench: Bench) -> None:
    """Load the model once in a fresh process and measure the cells of an order.

    Failures are recorded, never raised. A cell whose worker died takes the rest of the launch
    with it; the search sees what is still outstanding and orders it again.

    Raises:
        Interrupted: the user ended the run; the launch has no end in the journal.
    """
    started = time.perf_counter()
    bench.record(order)
    launch = _Launch(order, bench)
    launch.run_all()
    wall_s = time.perf_counter() - started
    end = LaunchEnd(launch=order.launch, wall_s=wall_s, generate_s=launch.generate_s, failure=launch.failure)
    bench.record(end)


def nonce(seed: int, round_number: int, scenario: str, index: int) -> int:
    """Start of a prompt: the same for all candidates of a block, different for everything else."""
    name = f"{seed}/{round_number}/{scenario}/{index}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


class _Launch:
    def __init__(self, order: LaunchOrder, bench: Bench) -> None:
        self._order = order
        self._bench = bench
        self._header = bench.run.header
        self._load = self._recipe(order.cells[0])
        self._sees_tokens = False
        self.generate_s = 0.0
        self.failure: Failure | None = None
        """Of the worker after its work."""

    def run_all(self) -> None:
        try:
            with self._bench.open_worker(self._load.environment) as self._client:
                if self._load_model():
                    self._measure()
                    self._ask("cleanup", {}, "cleanup", Limits(self._bench.deadlines.other_s))
        except _LaunchOver:
            return
        except WorkerFailed as failed:
            if failed.failure.phase == "start":
                self._fail_all(failed.failure)
            else:
                self.failure = self._scrubbed(failed.failure)

    def _load_model(self) -> bool:
        deadlines = self._bench.deadlines
        try:
            self._bench.announce("starting a worker")
            arguments = {"engine": self._header.engine, "scratch": str(self._scratch())}
            start_s, started = self._ask("start", arguments, "start", Limits(deadlines.start_s))
            self._sees_tokens = _validated(Started, started, "start").sees_tokens
            self._bench.announce("loading the model")
            load_s, _ = self._ask("load", dict(self._load.load), "load", Limits(deadlines.load_s))
        except WorkerFailed as failed:
            self._fail_all(failed.failure)
            return False
        self._bench.record(Loaded(launch=self._order.launch, start_s=start_s, load_s=load_s))
        return True

    def _measure(self) -> None:
        if self._order.purpose == "memory":
            self._with_peak(self._order.cells[0], self._exercise)
        elif self._order.purpose == "context":
            self._guarded(self._order.cells[0], self._reach)
        else:
            # All proofs come first: a cell that runs the very same thing as another is not timed twice.
            for cell in self._order.cells:
                self._guarded(cell, self._prove)
            for cell in self._order.cells:
                if self._bench.run.original(cell) == cell:
                    self._with_peak(cell, self._time)

    def _with_peak(self, cell: Cell, step: Callable[[Cell], None]) -> None:
        """Run a step and read which peak it has left."""
        if self._guarded(cell, step):
            self._read_resources(cell)

    def _guarded(self, cell: Cell, step: Callable[[Cell], None]) -> bool:
        """Run one step of a cell; its failure is recorded, and ends the launch unless the worker is sound."""
        if cell.candidate not in self._bench.run.live:
            return False
        try:
            step(cell)
        except WorkerFailed as failed:
            self._fail(cell, failed.failure)
            if not failed.alive or failed.failure.kind not in ("unsupported", "not_applied"):
                raise _LaunchOver from failed
            return False
        return True

    def _prove(self, cell: Cell) -> None:
        recipe = self._prepare(cell)
        if recipe.compiles:
            self._compile(cell)
        self._bench.announce(f"proving {self._label(cell)}")
        spec = self._prompt(cell, PROOF)
        deadlines = self._bench.deadlines
        limits = Limits(deadlines.compile_s if recipe.compiles else deadlines.sample_s)
        seconds, value = self._ask("prove", spec, "prove", limits)
        self.generate_s += seconds
        applied = _validated(Applied, value, "prove")
        if applied.mismatches:
            reason = "; ".join(applied.mismatches)
            raise WorkerFailed(Failure(kind="not_applied", phase="prove", reason=reason), alive=True)
        values = published(applied.values, self._bench.source, self._paths)
        applied = Applied.model_validate({"values": values})
        self._bench.record(Proof(launch=self._order.launch, cell=cell, applied=applied))

    def _compile(self, cell: Cell) -> None:
        """The first call, whose time is what a user's first request takes."""
        self._bench.announce(f"compiling {self._label(cell)}")
        timeline = self._decode(cell, FIRST_CALL, "compile", self._compile_limits)
        self._bench.record(
            FirstCall(
                launch=self._order.launch,
                cell=cell,
                duration_s=timeline.duration_s,
                compilations=timeline.compilations,
                cold=self._load.load_key not in self._bench.compiled,
            )
        )
        self._bench.compiled.add(self._load.load_key)

    def _time(self, cell: Cell) -> None:
        recipe = self._prepare(cell)
        for number in range(recipe.warmup_calls(self._header.profile.warmup)):
            self._bench.announce(f"warming up {self._label(cell)}")
            # What was compiled for this cell may be gone with the cells between.
            limits = self._compile_limits if recipe.compiles and number == 0 else self._call_limits
            self._decode(cell, WARM_UP - number, "warm-up", limits)
        samples: list[Sample] = []
        while not self._bench.run.has_enough(self._order.launch, samples):
            self._bench.announce(f"timing {self._label(cell)}")
            samples.append(self._sample(cell, len(samples)))
            self._bench.record(samples[-1])
        if all(sample.compilations for sample in samples):
            reason = "graphs were compiled inside every timed call"
            raise WorkerFailed(Failure(kind="invalid_output", phase="sample", reason=reason), alive=True)

    def _sample(self, cell: Cell, index: int) -> Sample:
        end_watch = self._bench.watch(self._client.pid)
        timeline = self._decode(cell, index, "sample", self._call_limits)
        conditions = end_watch()
        compiled = (f"graphs were compiled ({timeline.compilations})",) if timeline.compilations else ()
        return Sample(
            **timeline.model_dump(),
            launch=self._order.launch,
            round=self._order.round,
            candidate=cell.candidate,
            scenario=cell.scenario,
            index=index,
            conditions=conditions,
            distrust=(*compiled, *causes(conditions, self._bench.run.fastest_clock_mhz)),
        )

    def _exercise(self, cell: Cell) -> None:
        """Two whole calls in a fresh process: the peak is theirs alone."""
        recipe = self._prepare(cell)
        self._bench.announce(f"peak memory of {self._label(cell)}")
        for index in range(2):
            limits = self._compile_limits if recipe.compiles and index == 0 else self._call_limits
            self._decode(cell, index, "memory", limits)

    def _reach(self, cell: Cell) -> None:
        """Whole calls at a length of which nobody knows whether it fits."""
        recipe = self._prepare(cell)
        self._bench.announce(f"longest context of {self._label(cell)}")
        for index in range(self._calls):
            limits = self._compile_limits if recipe.compiles and index == 0 else self._call_limits
            self._generate("prefill", cell, index, "context", limits)
        self._record_trial(cell, None)

    def _record_trial(self, cell: Cell, failure: Failure | None) -> None:
        self._bench.record(
            ContextTrial(
                launch=self._order.launch,
                candidate=cell.candidate,
                tokens=self._scenario(cell).total_tokens,
                calls=self._calls,
                failure=failure,
            )
        )

    @property
    def _calls(self) -> int:
        return self._order.samples or 1

    def _read_resources(self, cell: Cell) -> None:
        """What cannot be read stays unknown; that is recorded, and costs the cell none of its samples."""
        try:
            _, value = self._ask("resources", {}, "resources", Limits(self._bench.deadlines.other_s))
            resources = _validated(Resources, value, "resources")
        except WorkerFailed as failed:
            self._fail(cell, failed.failure)
            # To ask changes nothing in a worker, unless the answer is that its device is broken.
            if failed.alive and failed.failure.kind != "device_error":
                return
            raise _LaunchOver from failed
        processes = tuple(str(published(name, self._bench.source, self._paths)) for name in resources.processes)
        resources = resources.model_copy(update={"processes": processes})
        process_bytes = self._bench.process_device_bytes(self._client.pid)
        if process_bytes is not None:
            largest = max(process_bytes, resources.peak_device_bytes or 0)
            seen = {"device_process_bytes": process_bytes, "peak_device_bytes": largest}
            resources = resources.model_copy(update=seen)
        self._bench.record(Measured(launch=self._order.launch, cells=(cell,), resources=resources))

    @property
    def _paths(self) -> tuple[str, ...]:
        """Where the model lies, if it is a local one: with a scheme before its path, or without."""
        model_id = str(self._load.load.get("model_id"))
        return tuple(path for path in (model_id, model_id.partition(":")[2]) if path and is_path(path))

    def _scratch(self) -> Path:
        """One directory per load, so that no other candidate has filled its compiler's cache."""
        folder = self._bench.scratch / self._load.load_key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(
                f"the temporary directory cannot be written ({error.strerror}); mend that, or name another one in "
                "TMPDIR, then go on with --resume"
            ) from error
        return folder

    def _prepare(self, cell: Cell) -> Recipe:
        recipe = self._recipe(cell)
        self._ask("prepare", recipe.model_dump(mode="json"), "prepare", Limits(self._bench.deadlines.load_s))
        return recipe

    @property
    def _compile_limits(self) -> Limits:
        return Limits(self._bench.deadlines.compile_s)

    @property
    def _call_limits(self) -> Limits:
        deadlines = self._bench.deadlines
        if not self._sees_tokens:
            return Limits(deadlines.sample_s)
        return Limits(deadlines.sample_s, deadlines.first_token_s, deadlines.gap_s)

    def _recipe(self, cell: Cell) -> Recipe:
        return self._bench.recipe_at(cell) if self._order.purpose == "context" else self._bench.recipes[cell]

    def _decode(self, cell: Cell, index: int, phase: str, limits: Limits) -> Timeline:
        return self._generate("decode", cell, index, phase, limits)

    def _generate(self, operation: Operation, cell: Cell, index: int, phase: str, limits: Limits) -> Timeline:
        scenario = self._scenario(cell)
        arguments = {"prompt": self._prompt(cell, index), "max_new_tokens": scenario.output_tokens}
        _, value = self._ask(operation, arguments, phase, limits)
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

    def _ask(self, operation: Operation, arguments: dict[str, Any], phase: str, limits: Limits) -> tuple[float, Any]:
        """Seconds that an operation took, and its value; unusable input found this late is a failure like any other."""
        started = time.perf_counter()
        try:
            value = self._client.call(operation, arguments, phase, limits)
        except UsageError as error:
            failure = Failure(kind="unsupported", phase=phase, reason=str(error))
            raise WorkerFailed(failure, alive=True) from error
        return time.perf_counter() - started, value

    def _fail_all(self, failure: Failure) -> None:
        for cell in self._order.cells:
            self._fail(cell, failure)

    def _fail(self, cell: Cell, failure: Failure) -> None:
        scrubbed = self._scrubbed(failure)
        if self._order.purpose == "context":
            self._record_trial(cell, scrubbed)
        else:
            self._bench.record(Failed(launch=self._order.launch, cell=cell, failure=scrubbed))

    def _scrubbed(self, failure: Failure) -> Failure:
        """Whatever an engine prints may echo a prompt; only beside our own sample texts may it be kept.

        A reason is the adapter's own words, and is kept unless it is the prompt's after all.
        """
        reason = anonymous(without_prompt(failure.reason, self._bench.source), self._paths)
        if self._bench.source.kind == "preset":
            tail = anonymous(failure.stderr_tail, self._paths)
        else:
            tail = failure.stderr_tail and "(withheld: the prompts are the user's own)"
        return failure.model_copy(update={"reason": reason, "stderr_tail": tail})

    def _scenario(self, cell: Cell) -> Scenario:
        return Scenario.of_key(cell.scenario)

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


def held(device: str) -> Paused:
    """What is to be told when a worker cannot be killed."""
    return Paused(f"{HELD.format(device)}, then go on with --resume")


class _LaunchOver(Exception):
    """The worker is gone or not to be trusted; what is left of the order is outstanding."""
