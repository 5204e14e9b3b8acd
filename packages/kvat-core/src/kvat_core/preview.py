"""`dry_run()`: what a tune would try, and what is known of it before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from kvat_core import outputs, roofline
from kvat_core.bounds import PEAKS, TIMED
from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Deadlines
from kvat_core.measure.interrupt import Stop
from kvat_core.measure.session import OpenWorker
from kvat_core.measure.supervisor import Client, WorkerProcess
from kvat_core.planner import stand_ins
from kvat_core.preparation import Preparation, TuneRequest, foresee
from kvat_core.run import Run
from kvat_core.schema import CandidateEntry, Header, Knob, Profile, Record, Scenario, Space
from kvat_core.search import Allowance, Rationed, Vetted, find_search

NO_CEILINGS_NOTE = (
    "what this machine can do at most is not known yet, so nothing is bounded, and peaks lack what the first call of a "
    "process takes; a tune measures it once"
)
LOOSE_NOTE = (
    "candidates are not bounded whose weights a cache of the processor may serve, or whose threads are not those that "
    "the machine's ceilings were measured with"
)


class TimeBounds(Record):
    """What no measurement of a candidate in a scenario can beat, see `kvat_core.roofline`."""

    ttft_s: float = Field(description="time to first token, at least")
    decode_tps: float = Field(description="tokens of all requests together per second, at most")


class Prospect(Record):
    """A candidate that would be tried."""

    id: str
    label: str
    incumbent: bool
    settings: dict[str, str]
    loads: tuple[int, ...] = Field(description="numbers of the loads it needs; who has one in common shares a launch")
    predicted_peak_bytes: int | None = Field(
        description="weights, KV cache and activations at the peak of its largest scenario, libraries apart; null = no "
        "prediction"
    )
    bounds: dict[str, TimeBounds] = Field(description="by scenario; without those in which nothing is known")
    misses: tuple[str, ...] = Field(description="limits that it cannot keep, by its predicted peak or by its bounds")


class Exclusion(Record):
    """Candidates that would not be tried, all for the same reason."""

    reason: str
    labels: tuple[str, ...]


class DryRun(Record):
    """A tune that was not made."""

    engine: str
    model: str
    device: str
    threads: int | None
    out: str = Field(description="where the results would be")
    search: str
    profile: Profile = Field(description="fitted to the model, with the limits in force")
    space: Space
    knobs: tuple[Knob, ...] = Field(description="all that can be set, each value that cannot run here with its reason")
    candidates: tuple[Prospect, ...] = Field(description="incumbent first, then those that could be fastest")
    excluded: tuple[Exclusion, ...]
    loads: int = Field(description="launches of a block in which every candidate takes part")
    launches: int = Field(description="those that the search would order if nothing failed, as far as it can tell")
    one_call_each_s: float | None = Field(
        description="what one call of every candidate in every scenario takes at least by their bounds, loading apart; "
        "null where one is not bounded"
    )
    budget_s: float | None
    max_launches: int | None
    notes: tuple[str, ...]


def dry_run(
    request: TuneRequest,
    *,
    stop: Stop | None = None,
    deadlines: Deadlines | None = None,
    open_worker: OpenWorker | None = None,
) -> DryRun:
    """Look at machine and model as `tune` does, and say what it would do. Loads no weights, and writes nothing.

    Another run may be writing into `out`; whether it could be used is told in the notes.

    Args:
        request: what `tune` would get.
        stop: asked to end it early.
        deadlines: limits per phase.
        open_worker: how to start a worker; a child process unless a test says otherwise.

    Raises:
        UsageError: unusable input or environment, or a request to resume.
        Interrupted: it was ended early.
    """
    if request.resume:
        raise UsageError("what a run still lacks is in no dry run; leave out one of --dry-run and --resume")
    stop, limits = stop or Stop(), deadlines or Deadlines()

    def start_worker(environment: Mapping[str, str]) -> Client:
        return WorkerProcess(environment, stop=stop, grace_s=limits.grace_s)

    return _foretold(foresee(request, open_worker or start_worker, limits, lambda _: None), request)


def _foretold(prepared: Preparation, request: TuneRequest) -> DryRun:
    header = prepared.header
    tried = [entry for entry in prepared.entries if entry.exclusion is None]
    ordered = roofline.order(tried, header.shape, header.profile.scenarios, header.ceilings)
    loads = _numbered_loads(prepared, ordered)
    candidates = tuple(_prospect(entry, header, loads[entry.candidate.id]) for entry in ordered)
    return DryRun(
        engine=header.engine,
        model=header.target.model.id,
        device=header.target.device,
        threads=header.target.threads,
        out=str(prepared.out),
        search=header.search,
        profile=header.profile,
        space=header.space,
        knobs=prepared.knobs,
        candidates=candidates,
        excluded=_exclusions(prepared.entries),
        loads=len({number for numbers in loads.values() for number in numbers}),
        launches=_launches(prepared, request),
        one_call_each_s=_one_call_each_s(candidates, header.profile.scenarios),
        budget_s=request.budget_s,
        max_launches=request.max_launches,
        notes=(*header.notes, *_notes(prepared, request, candidates)),
    )


def _numbered_loads(prepared: Preparation, entries: Sequence[CandidateEntry]) -> dict[str, tuple[int, ...]]:
    """Per candidate, which loads it needs, numbered from 1 in the order of the entries."""
    numbers: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    for name in (entry.candidate.id for entry in entries):
        keys = [recipe.load_key for cell, recipe in prepared.recipes.items() if cell.candidate == name]
        found[name] = tuple(dict.fromkeys(numbers.setdefault(key, len(numbers) + 1) for key in keys))
    return found


def _launches(prepared: Preparation, request: TuneRequest) -> int:
    run = Run(prepared.header)
    for entry in prepared.entries:
        run.add(entry)
    load_keys = {cell: recipe.load_key for cell, recipe in prepared.recipes.items()}
    allowance = Allowance(wall_s=request.budget_s, launches=request.max_launches)
    strategy = find_search(request.search)(load_keys, request.seed, allowance)
    return Rationed(Vetted(strategy, stand_ins), load_keys, allowance).remaining(run)


def _exclusions(entries: Sequence[CandidateEntry]) -> tuple[Exclusion, ...]:
    labels: dict[str, list[str]] = {}
    for entry in entries:
        if entry.exclusion is not None:
            labels.setdefault(entry.exclusion, []).append(entry.candidate.label)
    return tuple(Exclusion(reason=reason, labels=tuple(names)) for reason, names in labels.items())


def _prospect(entry: CandidateEntry, header: Header, loads: tuple[int, ...]) -> Prospect:
    scenarios = {scenario.key: scenario for scenario in header.profile.scenarios}
    known = {key: _bounds(entry, header, scenario) for key, scenario in scenarios.items()}
    bounds = {key: found for key, found in known.items() if found is not None}
    timed = (miss for key, found in bounds.items() for miss in _missed_times(found, scenarios[key], header.profile))
    return Prospect(
        id=entry.candidate.id,
        label=entry.candidate.label,
        incumbent=entry.incumbent,
        settings=entry.candidate.settings,
        loads=loads,
        predicted_peak_bytes=entry.predicted_peak_bytes,
        bounds=bounds,
        misses=(*_missed_memory(entry, header), *timed),
    )


def _bounds(entry: CandidateEntry, header: Header, scenario: Scenario) -> TimeBounds | None:
    footprint, ceilings = entry.footprints.get(scenario.key), header.ceilings
    work = None if footprint is None else roofline.work(header.shape, footprint, scenario)
    if footprint is None or ceilings is None or work is None or not roofline.holds(work, footprint, ceilings):
        return None
    found = roofline.bounds(work, footprint, ceilings, scenario.batch_size)
    return None if found is None else TimeBounds(ttft_s=found.ttft_s, decode_tps=found.decode_tps)


def _missed_memory(entry: CandidateEntry, header: Header) -> Iterator[str]:
    """By the limit of the memory that the model is in; libraries, which are not predicted, only add to a peak."""
    where = "max_host_bytes" if header.machine.device_memory_bytes is None else "max_device_bytes"
    bound = next(bound for bound, _ in PEAKS if bound.name == where)
    most, peak = getattr(header.profile.limits, where), entry.predicted_peak_bytes
    if most is not None and peak is not None and not bound.keeps(peak, most):
        yield f"{bound.condition(most, None)}: {bound.shown(peak)} predicted"


def _missed_times(bounds: TimeBounds, scenario: Scenario, profile: Profile) -> Iterator[str]:
    """What not even the bound keeps, no share of the calls does."""
    at_best = {
        "max_ttft_s": bounds.ttft_s,
        "max_tpot_s": scenario.batch_size / bounds.decode_tps,
        "min_decode_tps": bounds.decode_tps,
    }
    for bound, _ in TIMED:
        limit = getattr(profile.limits, bound.name)
        if limit is not None and not bound.keeps(at_best[bound.name], limit.value):
            condition = bound.condition(limit.value, limit.percentile)
            yield f"{condition}: {bound.shown(at_best[bound.name])} at best in {scenario.key}"


def _one_call_each_s(candidates: Sequence[Prospect], scenarios: Sequence[Scenario]) -> float | None:
    if any(scenario.key not in candidate.bounds for candidate in candidates for scenario in scenarios):
        return None
    return sum(_call_s(candidate.bounds[scenario.key], scenario) for candidate in candidates for scenario in scenarios)


def _call_s(bounds: TimeBounds, scenario: Scenario) -> float:
    return bounds.ttft_s + (scenario.output_tokens - 1) * scenario.batch_size / bounds.decode_tps


def _notes(prepared: Preparation, request: TuneRequest, candidates: Sequence[Prospect]) -> Iterator[str]:
    """Why something is not known, and why the tune itself would be refused."""
    scenarios = len(prepared.header.profile.scenarios)
    if not any(entry.footprints for entry in prepared.entries):
        yield f"engine {prepared.header.engine} predicts neither memory nor bounds"
    elif prepared.header.ceilings is None:
        yield NO_CEILINGS_NOTE
    elif any(len(candidate.bounds) < scenarios for candidate in candidates):
        yield LOOSE_NOTE
    least_s = _one_call_each_s(candidates, prepared.header.profile.scenarios)
    if request.budget_s is not None and least_s is not None and least_s > request.budget_s:
        yield "not even one call of every candidate fits into the budget, so some will not be seen"
    try:
        outputs.check_out(prepared.out, force=request.force, resume=False)
    except UsageError as refused:
        yield f"the tune itself would be refused: {refused}"
