"""`tune()`: the one module that wires the others together."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvat_core import discovery, lock, outputs, resume
from kvat_core.errors import (
    AllFailed,
    BudgetUsedUp,
    CannotWrite,
    Interrupted,
    KvatError,
    NotDecided,
    NothingFeasible,
    Paused,
    UsageError,
)
from kvat_core.journal import Journal, continue_journal, create_journal, journal_sha256, read_journal
from kvat_core.measure.bench import Bench
from kvat_core.measure.breaker import Breaker
from kvat_core.measure.conditions import SystemWatch, Watch
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.interrupt import Stop
from kvat_core.measure.launch import carry_out
from kvat_core.measure.session import OpenWorker
from kvat_core.measure.supervisor import Client, WorkerProcess
from kvat_core.planner import make_plan, stand_ins
from kvat_core.preparation import Preparation, TuneRequest, prepare, utc_now
from kvat_core.report import Report
from kvat_core.run import Run
from kvat_core.schema import End, Event, Header, JournalRef, Plan, Resumed, Stopped
from kvat_core.search import Allowance, Rationed, Vetted, find_search
from kvat_core.snippets import snippet

__all__ = ["Progress", "TuneRequest", "TuneResult", "tune"]


@dataclass(frozen=True)
class Progress:
    """A moment of a run, for a display."""

    run: Run | None
    """None until machine and model have been looked at."""
    activity: str
    launches_done: int
    launches_left: int
    elapsed_s: float
    left_s: float | None
    """None until a launch has ended."""


@dataclass(frozen=True)
class TuneResult:
    """A run with a plan."""

    plan: Plan
    out: Path
    files: tuple[Path, ...]
    wall_s: float
    loading_s: float
    """Spawning workers, importing their libraries and loading the model."""
    importing_s: float
    """The part of `loading_s` before `load_model`, the probing child included."""
    generating_s: float
    warnings: tuple[str, ...]
    """What could not be written, a snippet or a report, one line each."""
    unwritten: CannotWrite | None = None
    """The first file that the system refused, with what to do; the plan is written."""
    stopped: KvatError | None = None
    """Why the run was ended before it had measured all it meant to; its plan is partial then.

    None as well where it was the budget that it was given: then there is all that was asked for.
    """


OnProgress = Callable[[Progress], None]


def tune(
    request: TuneRequest,
    on_progress: OnProgress | None = None,
    *,
    stop: Stop | None = None,
    deadlines: Deadlines | None = None,
    open_worker: OpenWorker | None = None,
    watch: Watch | None = None,
) -> TuneResult:
    """Measure, decide, and write journal, plan, snippet and reports.

    Args:
        request: what to do.
        on_progress: called after every event and at every change of activity.
        stop: asked to end the run early; `stop_on_signals` makes one that Ctrl-C and SIGTERM ask.
        deadlines: limits per phase.
        open_worker: how to start a worker; a child process unless a test says otherwise.
        watch: what looks at the machine around each timed call.

    Returns:
        The plan; a partial one if the run was stopped, and `stopped` says why. It has no winner if no candidate
        keeps the limits; `plan.require_winner()` says which come closest.

    Raises:
        UsageError: unusable input or environment; nothing was measured and nothing touched.
        AllFailed: every candidate failed; the journal in `out` tells why.
        NothingFeasible: none of those that have may be recommended, and not only for the limits.
        BudgetUsedUp: before anything could be decided; what was measured is in the journal.
        CannotWrite: a result cannot be written; what was measured before is in the journal.
        EndedAtOnce: ended a second time, while a worker cannot be killed; what was measured is in the journal.
        Interrupted, Paused: stopped before anything could be decided; what was measured is in the journal.
        JournalDamaged: the journal that should be resumed does not verify; nothing was changed.
    """
    started = time.perf_counter()
    stop, limits = stop or Stop(), deadlines or Deadlines()
    if request.budget_s is not None:
        stop.at(time.monotonic() + request.budget_s)
    display = _Display(on_progress, started, request.budget_s)

    def start_worker(environment: Mapping[str, str]) -> Client:
        return WorkerProcess(environment, stop=stop, grace_s=limits.grace_s)

    open_worker = open_worker or start_worker
    prepared = prepare(request, open_worker, limits, display.announce)
    _open_out(prepared.out, request)
    with (
        lock.locked(prepared.out / outputs.LOCK),
        _open_journal(prepared, request) as (run, record_in_journal),
        _scratch() as scratch,
    ):

        def record(event: Event) -> None:
            record_in_journal(event)
            display.show()

        system = SystemWatch(prepared.device_uuid)
        bench = Bench(
            run=run,
            recipes=prepared.recipes,
            recipe_at=prepared.recipe_at,
            references=prepared.references,
            source=prepared.source,
            scratch=scratch,
            record=record,
            announce=display.announce,
            open_worker=open_worker,
            watch=watch or system,
            process_device_bytes=system.process_bytes,
            deadlines=limits,
            options=request.engine_options,
        )
        display.run = run
        before = _Times.of(run)
        left_s = None if request.budget_s is None else request.budget_s - (time.perf_counter() - started)
        allowance = Allowance(wall_s=left_s, launches=request.max_launches)
        stopped = _measure(bench, stop, display, allowance) if run.end is None else None
        if run.end is None and stopped is None:
            record(End(wall_s=time.perf_counter() - started))
        return _write_outputs(prepared, started, before, stopped)


def _measure(bench: Bench, stop: Stop, display: _Display, allowance: Allowance) -> KvatError | None:
    """Carry out what the search asks for; why it was stopped, or None when it has all it wants."""
    run = bench.run
    load_keys = {cell: recipe.load_key for cell, recipe in bench.recipes.items()}
    strategy = find_search(run.header.search)(load_keys, run.header.seed, allowance)
    search = Rationed(Vetted(strategy, stand_ins), load_keys, allowance)
    stopped: KvatError
    breaker = Breaker(run, bench.record, bench.announce, bench.open_worker, bench.deadlines, bench.options)
    try:
        while order := search.next(run):
            stop.check()
            display.launches_left = search.remaining(run)
            # Before the order is on record, so that a display knows what is new.
            display.show()
            carry_out(order, bench)
            breaker.after_launch()
            # What is on record stays: for the collector to look through all of it takes longer than a decision.
            gc.freeze()
        if search.cut_short(run):
            raise BudgetUsedUp("what the run may take does not suffice for another launch")
    except BudgetUsedUp as used_up:
        stopped = used_up
        bench.record(Stopped(kind="budget", reason=str(used_up)))
    except Interrupted as interrupted:
        stopped = Interrupted(f"{interrupted}; go on with --resume")
        bench.record(Stopped(kind="interrupted", reason="by the user"))
    except Paused as paused:
        stopped = paused
        bench.record(Stopped(kind="paused", reason=str(paused)))
    else:
        return None
    finally:
        gc.unfreeze()
    return stopped


def _open_out(out: Path, request: TuneRequest) -> None:
    if request.resume:
        return
    lock.refuse_if_held(out / outputs.LOCK)
    outputs.open_out(out, request.force)


@contextmanager
def _open_journal(prepared: Preparation, request: TuneRequest) -> Iterator[tuple[Run, Callable[[Event], None]]]:
    """The run so far, and what adds to it and to its journal: a new one, or the one that is resumed."""
    path = prepared.out / outputs.JOURNAL
    run, journal = _resumed(path, prepared) if request.resume else (Run(prepared.header), create_journal(path))

    def record(event: Event) -> None:
        journal.append(event)
        run.add(event)

    with journal:
        if request.resume:
            if run.end is None:
                record(Resumed(created=utc_now()))
        else:
            journal.append(prepared.header)
        for entry in prepared.entries[len(run.candidates) :]:
            record(entry)
        yield run, record


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory that lasts as long as this process's part of the run."""
    try:
        directory = tempfile.TemporaryDirectory(prefix="kvat-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CannotWrite(
            f"no temporary directory can be made ({error.strerror}); mend that, or name one in TMPDIR, then go on with "
            "--resume"
        ) from error
    with directory as path:
        yield Path(path)


def _resumed(path: Path, prepared: Preparation) -> tuple[Run, Journal]:
    try:
        events = list(read_journal(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); mend that, then try again") from error
    if not events or not isinstance(events[0], Header):
        raise UsageError(f"{path} ends before anything was measured; start anew with --force instead of --resume")
    run = Run.from_events(events)
    if differs := resume.difference(run, prepared.header, prepared.entries):
        raise UsageError(f"{path} cannot be resumed: {differs}; mend that, or start anew with --force")
    return run, continue_journal(path)[1]


@dataclass(frozen=True)
class _Times:
    """Where the time of a run went, in seconds."""

    importing_s: float
    loading_s: float
    generating_s: float

    @classmethod
    def of(cls, run: Run) -> _Times:
        return cls(
            importing_s=sum(loaded.start_s for loaded in run.loaded),
            loading_s=sum(loaded.load_s for loaded in run.loaded),
            generating_s=sum(end.generate_s for end in run.ended),
        )


def _write_outputs(prepared: Preparation, started: float, before: _Times, stopped: KvatError | None) -> TuneResult:
    """Everything after measuring is a function of the journal on disk."""
    out = prepared.out
    path = out / outputs.JOURNAL
    run = Run.from_events(read_journal(path))
    ref = JournalRef(file=outputs.JOURNAL, sha256=journal_sha256(path), samples=len(run.samples))
    reports, warnings = discovery.reports()
    try:
        plan = make_plan(run, ref)
    except (AllFailed, NotDecided, NothingFeasible) as error:
        of_before = (outputs.PLAN, outputs.SNIPPET, *(report.file_name for report in reports))
        moved = _moved_aside(out, of_before)
        if stopped is not None:
            on = "; go on with --resume" if isinstance(stopped, BudgetUsedUp) else ""
            raise type(stopped)(f"{stopped}; nothing can be decided yet{on}{moved}") from error
        raise type(error)(f"{error}; {path} tells of each{moved}") from error
    files = [*outputs.write_files(out, {outputs.PLAN: plan.model_dump_json(indent=2) + "\n"})]
    unwritten: CannotWrite | None = None

    def add(what: str, name: str, make: Callable[[], Mapping[str, str]]) -> None:
        """Write what foreign code makes of the plan, which must not cost the plan itself."""
        nonlocal unwritten
        try:
            files.extend(outputs.write_files(out, make()))
        except CannotWrite as error:
            refused = CannotWrite(f"{error}{_moved_aside(out, [name])}")
            unwritten = unwritten or refused
        except Exception as error:
            warnings.append(f"{what} was not written: {_cause(error)}{_moved_aside(out, [name])}")

    if plan.winner is not None:
        add("the snippet", outputs.SNIPPET, partial(snippet, plan))
    elif moved := _moved_aside(out, [outputs.SNIPPET]):
        warnings.append(f"the snippet was not written: no candidate keeps the limits{moved}")
    for report in reports:
        add(f"report {report.name}", report.file_name, partial(_rendered, report, plan))
    times = _Times.of(run)
    importing_s = prepared.header.probe_s + times.importing_s - before.importing_s
    return TuneResult(
        plan=plan,
        out=out,
        files=(path, *files),
        wall_s=time.perf_counter() - started,
        loading_s=importing_s + times.loading_s - before.loading_s,
        importing_s=importing_s,
        generating_s=times.generating_s - before.generating_s,
        warnings=tuple(warnings),
        unwritten=unwritten,
        stopped=None if isinstance(stopped, BudgetUsedUp) else stopped,
    )


def _rendered(report: Report, plan: Plan) -> Mapping[str, str]:
    return {report.file_name: report.render(plan)}


def _moved_aside(out: Path, names: Sequence[str]) -> str:
    """Take files of an earlier start of the run out of the way; what became of them, in words."""
    done = [outputs.set_aside(out / name) for name in names if (out / name).exists()]
    return f" ({'; '.join(done)})" if done else ""


def _cause(error: Exception) -> str:
    """Of an error of our own its text, of a foreign one its type alone."""
    return str(error) if isinstance(error, KvatError) else type(error).__name__


class _Display:
    """Turns what happens into `Progress`."""

    def __init__(self, on_progress: OnProgress | None, started: float, budget_s: float | None) -> None:
        self._on_progress = on_progress
        self._started = started
        self._budget_s = math.inf if budget_s is None else budget_s
        self._activity = "starting"
        self.run: Run | None = None
        self.launches_left = 0

    def announce(self, activity: str) -> None:
        self._activity = activity
        self.show()

    def show(self) -> None:
        if self._on_progress is None:
            return
        ended = [] if self.run is None else self.run.ended
        mean_s = sum(end.wall_s for end in ended) / len(ended) if ended else None
        elapsed_s = time.perf_counter() - self._started
        most_s = max(0.0, self._budget_s - elapsed_s)
        self._on_progress(
            Progress(
                run=self.run,
                activity=self._activity,
                launches_done=len(ended),
                launches_left=self.launches_left,
                elapsed_s=elapsed_s,
                left_s=None if mean_s is None else min(most_s, mean_s * self.launches_left),
            )
        )
