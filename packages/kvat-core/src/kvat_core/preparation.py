"""From a request to all that is known before the first measurement."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from kvat_core import (
    ceilings,
    context,
    discovery,
    limits,
    lock,
    machine,
    outputs,
    private,
    profiles,
    prompts,
    resume,
    roofline,
    space,
)
from kvat_core.engine import Engine, Probe, SpaceRequest
from kvat_core.errors import Interrupted, UsageError
from kvat_core.measure.bench import References
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.deadlines import Limits as CallLimits
from kvat_core.measure.redaction import anonymous
from kvat_core.measure.session import OpenWorker
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.outputs import is_path
from kvat_core.planner import public_model_id
from kvat_core.probes.cpu import usable_cores
from kvat_core.schema import (
    CandidateEntry,
    Ceilings,
    Cell,
    ContextBound,
    Footprint,
    Header,
    Knob,
    Limits,
    ModelRef,
    ModelShape,
    Profile,
    PromptSource,
    Recipe,
    Scenario,
    Space,
    Target,
    digest,
)
from kvat_core.search import find_search

NO_KEY_NOTE = (
    "the key by which the prompts would be known again cannot be kept in the configuration directory, so this run "
    "cannot be resumed"
)
_ADVICE = {
    "timeout": "stop other work, or allow it more time with --deadline",
    "oom_host": "close other programs, or name a smaller --model",
}
"""What to do when the child that looks at the machine fails; by kind of failure."""


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
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """What the engine alone understands, by the names in its `options`."""
    profile: str | Profile | None = None
    """Preset name, JSON file or object; None = ci-micro, which is quick and says so."""
    contexts: tuple[int, ...] = ()
    """Prompt lengths in tokens that replace the profile's."""
    batches: tuple[int, ...] = ()
    """Batch sizes that replace the profile's."""
    shortest_prompt_tokens: int | None = None
    """Of each batch, the shortest prompt: lengths are spread evenly up to the scenario's; None = the profile's."""
    limits: Limits = field(default_factory=Limits)
    """Those that are set replace the profile's."""
    max_context: int | Literal["auto", "off"] = "auto"
    """Whether to measure the longest context of the finalists, and up to how many tokens.

    auto = up to the model's limit where the profile gives it weight, else up to the least that the limits ask for, else
    off.
    """
    space: Space = "safe"
    pinned: Mapping[str, str] = field(default_factory=dict)
    """Knob → value for every candidate."""
    excluded: tuple[tuple[str, str], ...] = ()
    """Knob and value that no challenger may have."""
    incumbent: Mapping[str, str] = field(default_factory=dict)
    """Knob → value of what runs today, where it is not the engine's default."""
    seed: int = 0
    search: str = "race"
    """Who decides what is measured next: race, grid, or another one that is installed."""
    budget_s: float | None = None
    """Wall time that the whole command may take, what it hands over included; None = as long as it needs."""
    max_launches: int | None = None
    """Loads of the model that may be made; None = as many as it needs."""
    force: bool = False
    """Move an existing run in `out` aside."""
    resume: bool = False
    """Go on with the run in `out`, which has to be the same request on the same machine."""


@dataclass(frozen=True)
class Preparation:
    """What a run is about to do, and where."""

    out: Path
    header: Header
    knobs: tuple[Knob, ...]
    """All that can be set, with every value."""
    entries: tuple[CandidateEntry, ...]
    recipes: Mapping[Cell, Recipe]
    recipe_at: Callable[[Cell], Recipe]
    """For scenarios that are none of the profile's."""
    references: References
    source: PromptSource
    """With its text, unlike the profile in the header."""
    device_uuid: str | None


@dataclass(frozen=True)
class _Asked:
    """A request whose names have been looked up, the model's and the machine's apart."""

    engine: Engine
    model: ModelRef
    profile: Profile
    source: PromptSource
    out: Path


def prepare(
    request: TuneRequest, open_worker: OpenWorker, deadlines: Deadlines, announce: Callable[[str], None]
) -> Preparation:
    """Look at machine and model in short-lived children, and make the candidates. Writes no result.

    Raises:
        UsageError: unusable input or environment, or another process writes into the directory.
        CannotWrite: the directory holds the lock of a dead run, which cannot be taken over.
        Interrupted: the user ended it.
    """
    asked = _look_up(request)
    lock.refuse_if_held(asked.out / outputs.LOCK)
    outputs.check_out(asked.out, force=request.force, resume=request.resume)
    seen = _look(request, asked, open_worker, deadlines, announce)
    header = _with_ceilings(seen, open_worker, deadlines, announce)
    if asked.source.kind != "preset":
        known_by = private.keyed_digest(asked.source.value or "")
        unknown = () if known_by else (NO_KEY_NOTE,)
        header = header.model_copy(update={"prompt_digest": known_by, "notes": (*header.notes, *unknown)})
    header = header.model_copy(update={"request": resume.request_digest(header, seen.entries)})
    return _predicted(replace(seen, header=header), asked.engine)


def foresee(
    request: TuneRequest, open_worker: OpenWorker, deadlines: Deadlines, announce: Callable[[str], None]
) -> Preparation:
    """The same, as far as it is known without measuring, keeping or locking anything: ceilings are those of before.

    Raises:
        UsageError: unusable input or environment; the directory for the results is not looked at.
        Interrupted: the user ended it.
    """
    asked = _look_up(request)
    seen = _look(request, asked, open_worker, deadlines, announce)
    known = _ceilings(seen.header, seen.entries, lambda _: None)
    return _predicted(replace(seen, header=seen.header.model_copy(update={"ceilings": known})), asked.engine)


def _look_up(request: TuneRequest) -> _Asked:
    find_search(request.search)
    engine = discovery.pick_engine(request.engine, request.model)
    _require_known_options(engine, request.engine_options)
    model = ModelRef(id=_model_id(request, engine), revision=request.revision, allow_download=request.allow_download)
    profile = _profile(request)
    out = Path(request.out or _default_out(engine, model.id, profile.name))
    return _Asked(engine, model, profile, prompts.resolve(profile.prompt), out)


def _look(
    request: TuneRequest,
    asked: _Asked,
    open_worker: OpenWorker,
    deadlines: Deadlines,
    announce: Callable[[str], None],
) -> Preparation:
    """What one short-lived child says of machine and model, and the candidates that follow from it."""
    engine, model = asked.engine, asked.model
    fetching = ", and fetching what is missing" if request.allow_download else ""
    announce(f"looking at the machine and the model{fetching}")
    probing = time.perf_counter()
    probe, shape = _ask_child(engine, model, request, open_worker, deadlines)
    probe_s = time.perf_counter() - probing
    fitted, notes = profiles.fit(
        asked.profile,
        preset=asked.profile in profiles.presets().values(),
        contexts=request.contexts,
        batches=request.batches,
        shortest_prompt_tokens=request.shortest_prompt_tokens,
        max_context_tokens=shape.max_context_tokens,
    )
    fitted = fitted.model_copy(update={"limits": fitted.limits.replaced_by(request.limits)})
    if reason := limits.impossible(fitted.limits, shape, probe.device):
        raise UsageError(reason)
    if request.revision is not None and shape.revision is None:
        raise UsageError(f"{model.id} has no revisions; leave --revision out")
    # What was described is what is loaded, however the hub changes meanwhile.
    model = model.model_copy(update={"revision": shape.revision, "allow_download": False})
    target = Target(
        model=model,
        device=probe.device,
        threads=request.threads or probe.threads,
        options=dict(request.engine_options),
    )
    knobs = tuple(
        _without_paths(knob)
        for knob in engine.space(shape, probe, SpaceRequest(space=request.space, threads=request.threads))
    )
    entries, recipes = _candidates(request, engine, knobs, probe, shape, target, fitted)
    notes = (*notes, *_notes(request, probe, shape))
    header = _header(request, engine, probe, shape, target, fitted, notes, probe_s)
    header = header.model_copy(update={"longest_context": _context_bound(request.max_context, fitted, shape)})
    entries = [_with_footprints(entry, engine, header) for entry in entries]
    settings = {entry.candidate.id: entry.candidate.settings for entry in entries}

    def recipe_at(cell: Cell) -> Recipe:
        return engine.recipe(settings[cell.candidate], Scenario.of_key(cell.scenario), target)

    def references(cell: Cell) -> tuple[Recipe, Recipe | None, str | None]:
        scenario = Scenario.of_key(cell.scenario)
        entry = next(entry for entry in entries if entry.candidate.id == cell.candidate)
        own, candidate = entry.reference, entry.candidate
        assert own is not None, "only what has a reference is judged"
        in_full = engine.in_full_precision(own, shape)
        if in_full == own:
            # What it may lose is in its reference as well, so that nothing would show it.
            hidden = candidate.lossy and candidate.exact
            recipe = engine.recipe(own, scenario, target)
            return recipe, recipe, "the engine names nothing more precise" if hidden else None
        impossible = engine.check(in_full, shape, probe)
        full = None if impossible else engine.recipe(in_full, scenario, target)
        return engine.recipe(own, scenario, target), full, impossible and anonymous(impossible)

    return Preparation(
        asked.out, header, knobs, tuple(entries), recipes, recipe_at, references, asked.source, probe.device_uuid
    )


def _predicted(seen: Preparation, engine: Engine) -> Preparation:
    return replace(seen, entries=tuple(_with_predictions(entry, engine, seen.header) for entry in seen.entries))


def utc_now() -> str:
    """Time of day, UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _profile(request: TuneRequest) -> Profile:
    chosen = profiles.DEFAULT if request.profile is None else request.profile
    return chosen if isinstance(chosen, Profile) else profiles.load_profile(chosen)


def _context_bound(wanted: int | Literal["auto", "off"], profile: Profile, shape: ModelShape) -> ContextBound | None:
    """Up to where the longest context is to be measured; None = it is not."""
    holds, least = shape.max_context_tokens, profile.limits.min_context_tokens
    if isinstance(wanted, int):
        if holds is not None and holds < wanted:
            raise UsageError(f"the model holds {holds} tokens, fewer than --max-context {wanted}; ask for less")
        longest = max(scenario.total_tokens for scenario in profile.scenarios)
        if wanted < longest:
            raise UsageError(f"--max-context {wanted} is less than the {longest} tokens of a scenario; ask for more")
        if least is not None and wanted < least:
            raise UsageError(f"--max-context {wanted} is less than the limit of {least} (--min-context); ask for more")
        return ContextBound(up_to_tokens=wanted, by="model" if wanted == holds else "user")
    if wanted == "auto" and profile.objective.context > 0:
        return ContextBound(up_to_tokens=holds, by="model")
    if wanted == "auto" and least is not None:
        return ContextBound(up_to_tokens=least, by="user")
    return None


def _require_known_options(engine: Engine, options: Mapping[str, str]) -> None:
    unknown = next((name for name in options if name not in engine.options), None)
    if unknown is not None:
        known = f"choose one of {', '.join(engine.options)}" if engine.options else "it has none"
        raise UsageError(f"engine {engine.name} has no option {unknown!r} for --engine-option; {known}")


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
        yield profiles.DEFAULT_NOTE
    cores = usable_cores()
    if request.threads is None and probe.device == "cpu" and probe.threads is not None and probe.threads != cores:
        yield f"measuring with {probe.threads} of {cores} cores: if you serve with others, say so with --threads"
    if request.threads is not None and request.threads > cores:
        yield f"measuring with {request.threads} threads on {cores} cores, where they wait for each other"
    if shape.weights == "checkpoint" and not shape.has_tokenizer:
        yield "the model has no tokenizer that can be loaded: its prompts are random tokens"


def _public_id(engine: Engine, model_id: str, *, local: bool) -> str:
    scheme = _scheme(engine, model_id)
    # In full, because such as "." has no last part.
    named = scheme + os.path.abspath(model_id.removeprefix(scheme)) if local else model_id  # noqa: PTH100
    return public_model_id(named, scheme, local=local)


def _scheme(engine: Engine, model_id: str) -> str:
    """What of a model's name the engine has put in front, such as ``random:``; empty for a plain one."""
    schemes = (own for own in engine.own_models if own.endswith(":"))
    return next((own for own in schemes if model_id.startswith(own)), "")


def _default_out(engine: Engine, model_id: str, profile_name: str) -> Path:
    local = is_path(model_id.removeprefix(_scheme(engine, model_id)))
    name = _public_id(engine, model_id, local=local)
    return Path("kvat-out") / re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{profile_name}").strip("-.")


def _ask_child(
    engine: Engine, model: ModelRef, request: TuneRequest, open_worker: OpenWorker, deadlines: Deadlines
) -> tuple[Probe, ModelShape]:
    """Probe and describe in one short-lived child, because both may import anything."""
    options: dict[str, JsonValue] = dict(request.engine_options)
    try:
        with open_worker({}) as worker:
            worker.call("start", {"engine": engine.name, "scratch": None}, "start", CallLimits(deadlines.start_s))
            asked: dict[str, JsonValue] = {"device": request.device, "options": options}
            probe = Probe.model_validate(worker.call("probe", asked, "probe", CallLimits(deadlines.start_s)))
            described = worker.call(
                "describe",
                {"model": model.model_dump(mode="json"), "device": probe.device, "options": options},
                "describe",
                CallLimits(deadlines.download_s if model.allow_download else deadlines.load_s),
            )
            shape = ModelShape.model_validate(described)
    except WorkerFailed as failed:
        failure = failed.failure
        raise UsageError(
            f"engine {engine.name} cannot look at this machine and model ({failure.phase}: {failure.kind}, "
            f"{failure.reason}); {_ADVICE.get(failure.kind, 'mend its installation, or name another --model')}"
        ) from failed
    except Interrupted as stopped:
        raise type(stopped)(f"{stopped}; measuring had not begun, and nothing was changed") from stopped
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
    options = {name: anonymous(value) for name, value in target.options.items()}
    return Header(
        kvat=version("kvat-core"),
        created=utc_now(),
        engine=engine.name,
        versions=probe.versions,
        target=target.model_copy(update={"model": public, "options": options}),
        shape=shape,
        machine=machine.read_machine(target.device, target.threads, probe.device_memory_bytes),
        profile=profile.redacted(),
        space=request.space,
        pinned=dict(request.pinned),
        excluded=request.excluded,
        seed=request.seed,
        search=request.search,
        probe_s=probe_s,
        instrument=tuple(engine.instrument()),
        notes=notes,
    )


def _with_footprints(entry: CandidateEntry, engine: Engine, header: Header) -> CandidateEntry:
    """What it makes of the model in each scenario; a challenger that no memory of this machine can hold is excluded."""
    if entry.exclusion is not None:
        return entry
    settings, device = entry.candidate.settings, header.target.device
    answers = {s.key: engine.footprint(settings, s, header.shape, device) for s in header.profile.scenarios}
    footprints = {key: footprint for key, footprint in answers.items() if footprint is not None}
    exclusion = None if entry.incumbent else _too_large(footprints, header)
    return entry.model_copy(update={"footprints": footprints, "exclusion": exclusion})


def _too_large(footprints: Mapping[str, Footprint], header: Header) -> str | None:
    memory_bytes = header.machine.device_memory_bytes or header.machine.memory_bytes
    reasons = (
        roofline.cannot_fit(header.shape, footprints[scenario.key], scenario, memory_bytes)
        for scenario in header.profile.scenarios
        if scenario.key in footprints
    )
    return next((reason for reason in reasons if reason is not None), None)


def _with_ceilings(
    seen: Preparation, open_worker: OpenWorker, deadlines: Deadlines, announce: Callable[[str], None]
) -> Header:
    """What the machine can do at most, where the footprints of candidates can be held against it."""
    header, notes = seen.header, list(seen.header.notes)
    today = next(entry.candidate.id for entry in seen.entries if entry.incumbent)
    place = Cell(candidate=today, scenario=header.profile.scenarios[0].key)

    def measure(dtypes: Sequence[str]) -> Ceilings | None:
        announce("measuring what this machine can do at most, once")
        try:
            return _ask_ceilings(header, dtypes, seen.recipe_at(place).environment, deadlines, open_worker)
        except WorkerFailed as failed:
            reason = f"{failed.failure.kind}, {anonymous(failed.failure.reason)}"
        except UsageError as error:
            reason = anonymous(str(error))
        notes.append(f"what this machine can do at most is not known, or not in all dtypes ({reason})")
        return None

    try:
        found = _ceilings(header, seen.entries, measure)
    except Interrupted as stopped:
        raise type(stopped)(f"{stopped}; measuring had not begun, and nothing was changed") from stopped
    return header.model_copy(update={"ceilings": found, "notes": tuple(notes)})


def _ceilings(header: Header, entries: Sequence[CandidateEntry], measure: ceilings.Measure) -> Ceilings | None:
    """Those that are kept, or measured now; None where no footprint can be held against any."""
    dtypes = _dtypes(entries)
    return ceilings.kept(header.machine, header.engine, header.versions, dtypes, measure) if dtypes else None


def _dtypes(entries: Sequence[CandidateEntry]) -> list[str]:
    return sorted({footprint.dtype for entry in entries for footprint in entry.footprints.values()})


def _ask_ceilings(
    header: Header,
    dtypes: Sequence[str],
    environment: Mapping[str, str],
    deadlines: Deadlines,
    open_worker: OpenWorker,
) -> Ceilings | None:
    """In a child of its own, as one of what runs today, in which nothing has run that would change a first call."""
    arguments: dict[str, JsonValue] = {
        "device": header.target.device,
        "threads": header.target.threads,
        "dtypes": list(dtypes),
    }
    with open_worker(environment) as worker:
        worker.call("start", {"engine": header.engine, "scratch": None}, "start", CallLimits(deadlines.start_s))
        measured = worker.call("ceilings", arguments, "ceilings", CallLimits(deadlines.load_s))
    return None if measured is None else Ceilings.model_validate(measured)


def _with_predictions(entry: CandidateEntry, engine: Engine, header: Header) -> CandidateEntry:
    """Its peak in the largest scenario, where the engine tells the footprint of each, and its longest context."""
    first_call_bytes = header.ceilings.first_call_bytes if header.ceilings is not None else None
    predicted = [
        _loaded_peak_bytes(entry.footprints.get(scenario.key), header, scenario, first_call_bytes or 0)
        for scenario in header.profile.scenarios
    ]
    known = [peak for peak in predicted if peak is not None]
    return entry.model_copy(
        update={
            "predicted_peak_bytes": max(known) if len(known) == len(predicted) else None,
            "predicted_context_tokens": _predicted_context_tokens(entry, engine, header, first_call_bytes or 0),
        }
    )


def _predicted_context_tokens(
    entry: CandidateEntry, engine: Engine, header: Header, first_call_bytes: int
) -> int | None:
    """Up to the bound of the search, or else the model's; None without a bound, too."""
    wanted = header.longest_context
    most = header.shape.max_context_tokens if wanted is None else wanted.up_to_tokens
    memory_bytes = header.machine.device_memory_bytes or header.machine.memory_bytes
    if most is None or entry.exclusion is not None:
        return None

    def fits(tokens: int) -> bool | None:
        scenario = context.scenario(tokens)
        footprint = engine.footprint(entry.candidate.settings, scenario, header.shape, header.target.device)
        peak_bytes = _loaded_peak_bytes(footprint, header, scenario, first_call_bytes)
        return None if peak_bytes is None else peak_bytes <= memory_bytes

    return context.predicted_tokens(most, fits)


def _loaded_peak_bytes(
    footprint: Footprint | None, header: Header, scenario: Scenario, first_call_bytes: int
) -> int | None:
    if footprint is None or header.shape.parameters is None:
        return None
    rise = roofline.peak_bytes(header.shape, footprint, scenario, first_call_bytes)
    return None if rise is None else header.shape.parameters * footprint.element_bytes + rise


def _without_paths(knob: Knob) -> Knob:
    """The same with what an engine says of this machine as it may be shown."""
    shown = (
        value if value.unavailable is None else value.model_copy(update={"unavailable": anonymous(value.unavailable)})
        for value in knob.values
    )
    return knob.model_copy(update={"values": tuple(shown)})


def _candidates(
    request: TuneRequest,
    engine: Engine,
    knobs: Sequence[Knob],
    probe: Probe,
    shape: ModelShape,
    target: Target,
    profile: Profile,
) -> tuple[list[CandidateEntry], dict[Cell, Recipe]]:
    """Candidates with their recipes; two with the same recipes are one."""
    entries = space.enumerate_candidates(
        knobs,
        request.space,
        pinned=request.pinned,
        excluded=request.excluded,
        incumbent=request.incumbent,
        check=lambda settings: engine.check(settings, shape, probe),
    )
    recipes: dict[Cell, Recipe] = {}
    seen: dict[str, str] = {}
    distinct: list[CandidateEntry] = []
    for entry in entries:
        name = entry.candidate.id
        if entry.exclusion is None:
            mine = {s.key: engine.recipe(entry.candidate.settings, s, target) for s in profile.scenarios}
            known_by = digest([recipe.key for recipe in mine.values()])
            first = seen.setdefault(known_by, entry.candidate.label)
            same = None if first == entry.candidate.label else f"{space.SAME_RECIPE} {first}"
            reference = engine.reference(entry.candidate.settings, entries[0].candidate.settings, shape)
            entry = entry.model_copy(update={"exclusion": same, "recipes": known_by, "reference": reference})
            if reference is not None:
                exact = space.claims_to_be_exact(knobs, entry.candidate.settings, reference)
                candidate = entry.candidate.model_copy(update={"exact": exact})
                entry = entry.model_copy(update={"candidate": candidate})
            recipes |= {Cell(candidate=name, scenario=key): recipe for key, recipe in mine.items()}
        else:
            entry = entry.model_copy(update={"exclusion": anonymous(entry.exclusion)})
        distinct.append(entry)
    return distinct, recipes
