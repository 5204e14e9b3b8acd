"""One launch from spawn to end: the protocol by which every figure comes about."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from kvat_core import metrics
from kvat_core.errors import Paused
from kvat_core.measure.bench import Bench
from kvat_core.measure.conditions import causes
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.messages import Operation
from kvat_core.measure.redaction import published
from kvat_core.measure.session import validated
from kvat_core.measure.supervisor import HELD, WorkerFailed
from kvat_core.measure.vetting import judge, look_for_leaks
from kvat_core.schema import (
    AnotherLength,
    Applied,
    Cell,
    ContextTrial,
    Failed,
    Failure,
    FirstCall,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Measured,
    Proof,
    Recipe,
    Resources,
    Sample,
    Scenario,
    Timeline,
)

PROOF, FIRST_CALL, WARM_UP = -1, -2, -3
"""Indices of calls that are not timed; each further warm-up call has one less."""


def carry_out(order: LaunchOrder, bench: Bench) -> None:
    """Load the model in a fresh process and measure the cells of an order, or vet its candidate.

    Failures are recorded, never raised. A cell whose worker died takes the rest of the launch
    with it; the search sees what is still outstanding and orders it again.

    Raises:
        Interrupted: the user ended the run; the launch has no end in the journal.
    """
    started = time.perf_counter()
    bench.record(order)
    generate_s, failure = 0.0, None
    if order.purpose == "fidelity":
        judge(order, bench)
    elif order.purpose == "canary":
        look_for_leaks(order, bench)
    else:
        launch = _Launch(order, bench)
        launch.run_all()
        generate_s, failure = launch.generate_s, launch.failure
    wall_s = time.perf_counter() - started
    bench.record(LaunchEnd(launch=order.launch, wall_s=wall_s, generate_s=generate_s, failure=failure))


class _Launch:
    def __init__(self, order: LaunchOrder, bench: Bench) -> None:
        self._order = order
        self._bench = bench
        self._header = bench.run.header
        self._load = self._recipe(order.cells[0])
        self._session = bench.session(self._load)
        self._compiled_first: Cell | None = None
        """The cell of this launch for which the compiler found nothing cached."""
        self.generate_s = 0.0
        self.failure: Failure | None = None
        """Of the worker after its work."""

    def run_all(self) -> None:
        try:
            with self._session:
                if self._load_model():
                    self._measure()
                    self._session.cleanup()
        except _LaunchOver:
            return
        except WorkerFailed as failed:
            if failed.failure.phase == "start":
                self._fail_all(failed.failure)
            else:
                self.failure = self._session.scrubbed(failed.failure)

    def _load_model(self) -> bool:
        try:
            self._bench.announce("starting a worker")
            start_s = self._session.start()
            self._bench.announce("loading the model")
            load_s = self._session.load()
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
            timed: list[Cell] = []
            for cell in self._order.cells:
                if self._bench.run.original(cell) == cell and self._with_peak(cell, self._time):
                    timed.append(cell)
            if self._compiled_first in timed:
                self._try_another_length(self._compiled_first)

    def _with_peak(self, cell: Cell, step: Callable[[Cell], None]) -> bool:
        """Run a step and read which peak it has left; whether the step was done."""
        done = self._guarded(cell, step)
        if done:
            self._read_resources(cell)
        return done

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
        self._bench.announce(f"proving {self._bench.label(cell)}")
        spec = self._prompt(self._scenario(cell), PROOF)
        deadlines = self._bench.deadlines
        limits = Limits(deadlines.compile_s if recipe.compiles else deadlines.sample_s)
        seconds, value = self._session.ask("prove", spec, "prove", limits)
        self.generate_s += seconds
        applied = validated(Applied, value, "prove")
        if applied.mismatches:
            reason = "; ".join(applied.mismatches)
            raise WorkerFailed(Failure(kind="not_applied", phase="prove", reason=reason), alive=True)
        values = published(applied.values, self._bench.source, self._session.paths)
        applied = Applied.model_validate({"values": values})
        self._bench.record(Proof(launch=self._order.launch, cell=cell, applied=applied))

    def _compile(self, cell: Cell) -> None:
        """The first call, whose time is what a user's first request takes."""
        self._bench.announce(f"compiling {self._bench.label(cell)}")
        timeline = self._decode(cell, FIRST_CALL, "compile", self._session.compile_limits)
        cold = self._load.load_key not in self._bench.compiled
        self._bench.record(
            FirstCall(
                launch=self._order.launch,
                cell=cell,
                duration_s=timeline.duration_s,
                compilations=timeline.compilations,
                cold=cold,
            )
        )
        if cold:
            self._compiled_first = cell
            self._bench.compiled.add(self._load.load_key)

    def _time(self, cell: Cell) -> None:
        recipe = self._prepare(cell)
        for number in range(recipe.warmup_calls(self._header.profile.warmup)):
            self._bench.announce(f"warming up {self._bench.label(cell)}")
            # What was compiled for this cell may be gone with the cells between.
            limits = self._session.compile_limits if recipe.compiles and number == 0 else self._session.call_limits
            self._decode(cell, WARM_UP - number, "warm-up", limits)
        samples: list[Sample] = []
        while not self._bench.run.has_enough(self._order.launch, samples):
            self._bench.announce(f"timing {self._bench.label(cell)}")
            samples.append(self._sample(cell, len(samples)))
            self._bench.record(samples[-1])
        if all(sample.compilations for sample in samples):
            reason = "graphs were compiled inside every timed call"
            raise WorkerFailed(Failure(kind="invalid_output", phase="sample", reason=reason), alive=True)

    def _sample(self, cell: Cell, index: int) -> Sample:
        end_watch = self._bench.watch(self._session.pid)
        timeline = self._decode(cell, index, "sample", self._session.call_limits)
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

    def _try_another_length(self, cell: Cell) -> None:
        """What a prompt of another length costs, once per cell; its failure is recorded and costs no figures.

        Nothing may come after it but the end: a second length may change for good what was compiled for the first.
        """
        scenario = self._scenario(cell)
        if cell in self._bench.run.other_lengths or scenario.prompt_tokens == 1:
            return
        # One token less fits the slots that the recipe has for the scenario.
        other = scenario.reshaped(prompt_tokens=scenario.prompt_tokens - 1)
        record = partial(AnotherLength, launch=self._order.launch, cell=cell, prompt_tokens=other.prompt_tokens)
        try:
            timeline = self._call_another_length(cell, other)
        except WorkerFailed as failed:
            failure = self._session.scrubbed(failed.failure)
            self._bench.record(record(duration_s=None, compilations=None, failure=failure))
            if failed.alive:
                return
            raise _LaunchOver from failed
        self._bench.record(record(duration_s=timeline.duration_s, compilations=timeline.compilations))

    def _call_another_length(self, cell: Cell, other: Scenario) -> Timeline:
        phase, limits = "another length", self._session.compile_limits
        self._bench.announce(f"another prompt length with {self._bench.label(cell)}")
        if len(self._order.cells) > 1:
            # What was compiled for this cell may be gone with the cells between.
            self._prepare(cell)
            self._decode(cell, FIRST_CALL, phase, limits)
        return self._generate("decode", other, FIRST_CALL, phase, limits)

    def _exercise(self, cell: Cell) -> None:
        """Two whole calls in a fresh process: the peak is theirs alone."""
        recipe = self._prepare(cell)
        self._bench.announce(f"peak memory of {self._bench.label(cell)}")
        for index in range(2):
            limits = self._session.compile_limits if recipe.compiles and index == 0 else self._session.call_limits
            self._decode(cell, index, "memory", limits)

    def _reach(self, cell: Cell) -> None:
        """Whole calls at a length of which nobody knows whether it fits."""
        recipe = self._prepare(cell)
        self._bench.announce(f"longest context of {self._bench.label(cell)}")
        for index in range(self._calls):
            limits = self._session.compile_limits if recipe.compiles and index == 0 else self._session.call_limits
            self._generate("prefill", self._scenario(cell), index, "context", limits)
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
            _, value = self._session.ask("resources", {}, "resources", Limits(self._bench.deadlines.other_s))
            resources = validated(Resources, value, "resources")
        except WorkerFailed as failed:
            self._fail(cell, failed.failure)
            # To ask changes nothing in a worker, unless the answer is that its device is broken.
            if failed.alive and failed.failure.kind != "device_error":
                return
            raise _LaunchOver from failed
        processes = tuple(str(published(name, self._bench.source, self._session.paths)) for name in resources.processes)
        resources = resources.model_copy(update={"processes": processes})
        process_bytes = self._bench.process_device_bytes(self._session.pid)
        if process_bytes is not None:
            largest = max(process_bytes, resources.peak_device_bytes or 0)
            seen = {"device_process_bytes": process_bytes, "peak_device_bytes": largest}
            resources = resources.model_copy(update=seen)
        self._bench.record(Measured(launch=self._order.launch, cells=(cell,), resources=resources))

    def _prepare(self, cell: Cell) -> Recipe:
        recipe = self._recipe(cell)
        self._session.prepare(recipe)
        return recipe

    def _recipe(self, cell: Cell) -> Recipe:
        return self._bench.recipe_at(cell) if self._order.purpose == "context" else self._bench.recipes[cell]

    def _decode(self, cell: Cell, index: int, phase: str, limits: Limits) -> Timeline:
        return self._generate("decode", self._scenario(cell), index, phase, limits)

    def _generate(self, operation: Operation, scenario: Scenario, index: int, phase: str, limits: Limits) -> Timeline:
        arguments = {"prompt": self._prompt(scenario, index), "max_new_tokens": scenario.output_tokens}
        _, value = self._session.ask(operation, arguments, phase, limits)
        timeline = validated(Timeline, value, phase)
        reason = metrics.invalid_reason(timeline, scenario)
        if reason is not None:
            raise WorkerFailed(Failure(kind="invalid_output", phase=phase, reason=reason), alive=True)
        self.generate_s += timeline.duration_s
        return timeline

    def _prompt(self, scenario: Scenario, index: int) -> dict[str, Any]:
        spec = self._bench.prompt(scenario, round_number=self._order.round, index=index)
        return spec.model_dump(mode="json")

    def _fail_all(self, failure: Failure) -> None:
        for cell in self._order.cells:
            self._fail(cell, failure)

    def _fail(self, cell: Cell, failure: Failure) -> None:
        scrubbed = self._session.scrubbed(failure)
        if self._order.purpose == "context":
            self._record_trial(cell, scrubbed)
        else:
            self._bench.record(Failed(launch=self._order.launch, cell=cell, failure=scrubbed))

    def _scenario(self, cell: Cell) -> Scenario:
        return Scenario.of_key(cell.scenario)


def held(device: str) -> Paused:
    """What is to be told when a worker cannot be killed."""
    return Paused(f"{HELD.format(device)}, then go on with --resume")


class _LaunchOver(Exception):
    """The worker is gone or not to be trusted; what is left of the order is outstanding."""
