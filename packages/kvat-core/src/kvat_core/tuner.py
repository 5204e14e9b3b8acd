"""`tune()`: the one module that wires the others together."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from kvat_core import discovery, machine, outputs, profiles, prompts, space
from kvat_core.engine import Engine, Probe, SpaceRequest
from kvat_core.errors import AllFailed, UsageError
from kvat_core.journal import Journal, journal_sha256, read_journal
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.launch import Bench, OpenWorker, carry_out
from kvat_core.measure.supervisor import WorkerFailed, WorkerProcess
from kvat_core.outputs import is_path
from kvat_core.planner import make_plan, public_model_id
from kvat_core.probes.cpu import usable_cores
from kvat_core.run import Run
from kvat_core.schema import (
    CandidateEntry,
    Cell,
    End,
    Event,
    Header,
    JournalRef,
    ModelRef,
    ModelShape,
    Plan,
    Profile,
    Recipe,
    Space,
    Target,
)
from kvat_core.search import Grid
from kvat_core.snippets import snippet

DEFAULT_PROFILE = "ci-micro"
DEFAULT_PROFILE_NOTE = (
    f"no profile was named, so {DEFAULT_PROFILE} was measured, a quick smoke test: name the --profile of your traffic "
    "before you rely on the result"
)


@dataclass(frozen=True)
class TuneRequest:
    """What to tune, on what, for which traffic, and how widely to search. Defaults as on the command line."""

    out: Path | str | None = None
    """Directory for the results; None = kvat-out/<model>-<profile>."""
    engine: str | None = None
    """None = the one the model names, or the only one installed."""
    model: str | None = None
    """None = the engine's demonstration model."""
    revision: str | None = None
    allow_download: bool = False
    device: str | None = None
    """None = the best one present."""
    threads: int | None = None
    """CPU threads; None = what the engine uses by itself."""
    profile: str | Profile | None = None
    """Preset name, JSON file or object; None = ci-micro, which is quick and says so."""
    contexts: tuple[int, ...] = ()
    """Prompt lengths in tokens that replace the profile's."""
    batches: tuple[int, ...] = ()
    """Batch sizes that replace the profile's."""
    space: Space = "safe"
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Knob → value for every candidate."""
    excluded: tuple[tuple[str, str], ...] = ()
    """Knob and value that no challenger may have."""
    incumbent: Mapping[str, str] = field(default_factory=dict)
    """Knob → value of what runs today, where it is not the engine's default."""
    seed: int = 0
    force: bool = False
    """Move an existing run in `out` aside."""


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
    """A finished run."""

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


OnProgress = Callable[[Progress], None]


def tune(
    request: TuneRequest,
    on_progress: OnProgress | None = None,
    *,
    open_worker: OpenWorker = WorkerProcess,
    deadlines: Deadlines | None = None,
) -> TuneResult:
    """Measure, decide, and write journal, plan, snippet and reports.

    Args:
        request: what to do.
        on_progress: called after every event and at every change of activity.
        open_worker: how to start a worker; a child process unless a test says otherwise.
        deadlines: limits per phase.

    Raises:
        UsageError: unusable input or environment; nothing was measured and nothing touched.
        AllFailed: no candidate has figures; the journal in `out` tells why.
        NothingFeasible: none of those that have may be recommended.
    """
    started = time.perf_counter()
    limits = deadlines or Deadlines()
    engine = discovery.pick_engine(request.engine, request.model)
    model = ModelRef(id=_model_id(request, engine), revision=request.revision, allow_download=request.allow_download)
    profile = _profile(request)
    source = prompts.resolve(profile.prompt)
    out = Path(request.out or _default_out(engine, model.id, profile.name))
    outputs.check_out(out, request.force)
    display = _Display(on_progress, started)
    fetching = ", and fetching what is missing" if request.allow_download else ""
    display.announce(f"looking at the machine and the model{fetching}")
    probing = time.perf_counter()
    probe, shape = _ask_child(engine, model, request.device, open_worker, limits)
    probe_s = time.perf_counter() - probing
    fitted, notes = profiles.fit(
        profile,
        preset=profile in profiles.presets().values(),
        contexts=request.contexts,
        batches=request.batches,
        max_context_tokens=shape.max_context_tokens,
    )
    notes = (*notes, *_notes(request, probe, shape))
    if request.revision is not None and shape.revision is None:
        raise UsageError(f"{model.id} has no revisions; leave --revision out")
    # What was described is what is loaded, however the hub changes meanwhile.
    model = model.model_copy(update={"revision": shape.revision, "allow_download": False})
    target = Target(model=model, device=probe.device, threads=request.threads or probe.threads)
    header = _header(request, engine, probe, shape, target, fitted, notes, probe_s)
    entries, recipes = _candidates(request, engine, probe, shape, target, fitted)

    outputs.open_out(out, request.force)
    run = Run(header)
    with Journal(out / outputs.JOURNAL) as journal:

        def record(event: Event) -> None:
            journal.append(event)
            if event is not header:
                run.add(event)
            display.show()

        record(header)
        for entry in entries:
            record(entry)
        search = Grid({cell: recipe.load_key for cell, recipe in recipes.items()}, request.seed)
        display.run = run
        bench = Bench(
            run=run,
            recipes=recipes,
            source=source,
            record=record,
            announce=display.announce,
            open_worker=open_worker,
            deadlines=limits,
        )
        while order := search.next(run):
            display.launches_left = search.remaining(run)
            carry_out(order, bench)
        record(End(wall_s=time.perf_counter() - started))
    return _write_outputs(out, started)


def _profile(request: TuneRequest) -> Profile:
    chosen = DEFAULT_PROFILE if request.profile is None else request.profile
    return chosen if isinstance(chosen, Profile) else profiles.load_profile(chosen)


def _model_id(request: TuneRequest, engine: Engine) -> str:
    if request.model is None and not engine.own_models:
        raise UsageError(f"engine {engine.name} has no demonstration model; name a --model")
    model_id = engine.own_models[0] if request.model is None else request.model
    if not model_id:
        raise UsageError("--model is empty; name a model, or leave it out for the engine's demonstration")
    return model_id


def _notes(request: TuneRequest, probe: Probe, shape: ModelShape) -> Iterator[str]:
    """What the user did not choose, and what decides how far the figures go."""
    if request.profile is None:
        yield DEFAULT_PROFILE_NOTE
    cores = usable_cores()
    if request.threads is None and probe.device == "cpu" and probe.threads is not None and probe.threads != cores:
        yield f"measured with {probe.threads} of {cores} cores: if you serve with another number, say so with --threads"
    if shape.weights == "checkpoint" and not shape.has_tokenizer:
        yield "the model has no tokenizer that can be loaded: its prompts were random tokens"


def _public_id(engine: Engine, model_id: str, *, local: bool) -> str:
    schemes = (own for own in engine.own_models if own.endswith(":"))
    return public_model_id(model_id, next((own for own in schemes if model_id.startswith(own)), ""), local=local)


def _default_out(engine: Engine, model_id: str, profile_name: str) -> Path:
    name = _public_id(engine, model_id, local=is_path(model_id))
    return Path("kvat-out") / re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{profile_name}").strip("-.")


def _ask_child(
    engine: Engine, model: ModelRef, device: str | None, open_worker: OpenWorker, limits: Deadlines
) -> tuple[Probe, ModelShape]:
    """Probe and describe in one short-lived child, because both may import anything."""
    try:
        with open_worker({}) as worker:
            worker.call("start", {"engine": engine.name, "adapter": False}, "start", limits.start_s)
            probe = Probe.model_validate(worker.call("probe", {"device": device}, "probe", limits.start_s))
            described = worker.call(
                "describe",
                {"model": model.model_dump(mode="json"), "device": probe.device},
                "describe",
                limits.download_s if model.allow_download else limits.load_s,
            )
            shape = ModelShape.model_validate(described)
    except WorkerFailed as failed:
        failure = failed.failure
        raise UsageError(
            f"engine {engine.name} cannot look at this machine and model ({failure.phase}: {failure.kind}, "
            f"{failure.reason}); mend its installation or name another --model"
        ) from failed
    return probe, shape


def _header(
    request: TuneRequest,
    engine: Engine,
    probe: Probe,
    shape: ModelShape,
    target: Target,
    profile: Profile,
    notes: tuple[str, ...],
    probe_s: float,
) -> Header:
    public = target.model.model_copy(update={"id": _public_id(engine, target.model.id, local=shape.local)})
    return Header(
        kvat=version("kvat-core"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        engine=engine.name,
        versions=probe.versions,
        target=target.model_copy(update={"model": public}),
        shape=shape,
        machine=machine.read_machine(target.device, target.threads, probe.device_memory_bytes),
        profile=profile.redacted(),
        space=request.space,
        pinned=dict(request.pinned),
        excluded=request.excluded,
        seed=request.seed,
        probe_s=probe_s,
        instrument=tuple(engine.instrument()),
        notes=notes,
    )


def _candidates(
    request: TuneRequest, engine: Engine, probe: Probe, shape: ModelShape, target: Target, profile: Profile
) -> tuple[list[CandidateEntry], dict[Cell, Recipe]]:
    """Candidates with their recipes; two with the same recipes are one."""
    entries = space.enumerate_candidates(
        engine.space(shape, probe, SpaceRequest(space=request.space)),
        request.space,
        pinned=request.pinned,
        excluded=request.excluded,
        incumbent=request.incumbent,
        check=lambda settings: engine.check(settings, shape, probe),
    )
    recipes: dict[Cell, Recipe] = {}
    seen: dict[tuple[str, ...], str] = {}
    distinct: list[CandidateEntry] = []
    for entry in entries:
        name = entry.candidate.id
        if entry.exclusion is None:
            mine = {s.key: engine.recipe(entry.candidate.settings, s, target) for s in profile.scenarios}
            first = seen.setdefault(tuple(recipe.key for recipe in mine.values()), entry.candidate.label)
            if first != entry.candidate.label:
                entry = entry.model_copy(update={"exclusion": f"has the same recipe as {first}"})
            recipes |= {Cell(candidate=name, scenario=key): recipe for key, recipe in mine.items()}
        distinct.append(entry)
    return distinct, recipes


def _write_outputs(out: Path, started: float) -> TuneResult:
    """Everything after measuring is a function of the journal on disk."""
    path = out / outputs.JOURNAL
    run = Run.from_events(read_journal(path))
    ref = JournalRef(file=outputs.JOURNAL, sha256=journal_sha256(path), samples=len(run.samples))
    try:
        plan = make_plan(run, ref)
    except AllFailed as error:
        raise AllFailed(f"{error}; {path} tells of each") from error
    files = [*outputs.write_files(out, {outputs.PLAN: plan.model_dump_json(indent=2) + "\n"})]
    reports, warnings = discovery.reports()
    try:
        files += outputs.write_files(out, snippet(plan))
    except Exception as error:  # an adapter is foreign code, and must not cost the plan
        warnings.append(f"the snippet was not written: {type(error).__name__}")
    for report in reports:
        try:
            files += outputs.write_files(out, {report.file_name: report.render(plan)})
        except Exception as error:  # a renderer is foreign code, and must not cost the plan
            warnings.append(f"report {report.name} was not written: {type(error).__name__}")
    importing_s = run.header.probe_s + sum(loaded.start_s for loaded in run.loaded)
    return TuneResult(
        plan=plan,
        out=out,
        files=(path, *files),
        wall_s=time.perf_counter() - started,
        loading_s=importing_s + sum(loaded.load_s for loaded in run.loaded),
        importing_s=importing_s,
        generating_s=sum(end.generate_s for end in run.ended),
        warnings=tuple(warnings),
    )


class _Display:
    """Turns what happens into `Progress`."""

    def __init__(self, on_progress: OnProgress | None, started: float) -> None:
        self._on_progress = on_progress
        self._started = started
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
        self._on_progress(
            Progress(
                run=self.run,
                activity=self._activity,
                launches_done=len(ended),
                launches_left=self.launches_left,
                elapsed_s=time.perf_counter() - self._started,
                left_s=None if mean_s is None else mean_s * self.launches_left,
            )
        )
