"""Pure: journal → plan. The same journal always gives the same plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from statistics import median
from typing import TYPE_CHECKING, Literal

from kvat_core import context, fidelity, limits, metrics, scoring, stats, utilisation
from kvat_core.decision import Decision, decide
from kvat_core.drift import drift
from kvat_core.errors import AllFailed, NotDecided, NothingFeasible
from kvat_core.field import MIN_DIFFERENCE
from kvat_core.pareto import Objectives, pareto_front
from kvat_core.rules import derive_rules
from kvat_core.run import MAX_REJECTED, Run
from kvat_core.schema import (
    CandidateEntry,
    CandidateResult,
    Cell,
    Choice,
    CompileCost,
    Estimate,
    Failed,
    Failure,
    JournalRef,
    ModelDimensions,
    NearMiss,
    Plan,
    PlanEngine,
    PlanModel,
    Ratio,
    Sample,
    ScenarioResult,
    State,
    WinnerMetrics,
    eligible_by_score,
)

if TYPE_CHECKING:
    from kvat_core.schema import Header

RANDOM_WEIGHTS_NOTE = (
    "the weights are random: speed and memory are representative of the architecture, output and fidelity are not, "
    "nor is the load time"
)
_NAMED = 3
"""Candidates that a note names; more are counted."""
PARTIAL_NOTE = "the run was ended before it had measured all it meant to ({}); go on with --resume"
PASSED_OVER = "one launch in screening, in which others looked better; its figures are of that launch"
SCREENED_SO_FAR = "one launch in screening so far; its figures are of that launch"


@dataclass(frozen=True)
class _Nobody:
    """What takes the place of a decision where no candidate keeps the limits."""

    winner: None = None
    verdict: Literal["infeasible"] = "infeasible"
    ratios: None = None
    confidence: None = None
    equivalents: tuple[()] = ()
    scores: Mapping[str, Ratio] = field(default_factory=dict)


def make_plan(run: Run, journal: JournalRef) -> Plan:
    """Decide from what was measured.

    Raises:
        AllFailed: every candidate failed.
        NotDecided: what was measured so far does not suffice.
        NothingFeasible: some have figures, but none of those may be recommended, and not only for the limits.
    """
    decision = decide(run)
    closest = () if decision is not None else _closest(run)
    if decision is None and not closest:
        raise _no_winner(run)
    chosen = decision or _Nobody()
    header = run.header
    results = tuple(_result(run, entry, chosen) for entry in run.candidates)
    return Plan(
        kvat=header.kvat,
        partial=run.end is None,
        created=header.created,
        engine=PlanEngine(name=header.engine, versions=header.versions, options=header.target.options),
        model=PlanModel(
            id=header.target.model.id,
            revision=header.shape.revision,
            weights=header.shape.weights,
            quantization=header.shape.quantization,
            sha256=header.shape.sha256,
            dimensions=ModelDimensions(**{name: getattr(header.shape, name) for name in ModelDimensions.model_fields}),
        ),
        machine=header.machine,
        profile=header.profile,
        incumbent=_choice(run, run.incumbent),
        winner=None if chosen.winner is None else _choice(run, chosen.winner),
        verdict=chosen.verdict,
        ratio=chosen.ratios,
        confidence=chosen.confidence,
        closest=closest,
        equivalents=chosen.equivalents,
        max_context=None if chosen.winner is None else context.known(run, chosen.winner),
        metrics=None if chosen.winner is None else _winner_metrics(run, chosen.winner),
        canary=None if chosen.winner is None else _canary(run, chosen.winner),
        fidelity_limits=None if header.profile.limits.allow_lossy else fidelity.limits_in_force(run),
        drift=drift(run),
        pareto=() if decision is None else _front(run, decision.winner, results),
        rules=() if decision is None else derive_rules(run, decision, results),
        notes=_notes(header, run, chosen.winner, results),
        candidates=results,
        journal=journal,
    )


def _canary(run: Run, winner: str) -> Literal["clean", "undetermined"] | None:
    found = fidelity.canary(run, winner)
    assert found != "leak", "a leak is a failure, and what has failed is no winner"
    return found


def stand_ins(run: Run) -> list[str]:
    """Candidates that the rules of a plan would name if what nobody has looked at yet turned out to be right."""
    decision = decide(run)
    if decision is None:
        return []
    results = tuple(_result(run, entry, decision) for entry in run.candidates)
    return [rule.use for rule in derive_rules(run, decision, results, unseen=True)]


def public_model_id(model_id: str, scheme: str, *, local: bool) -> str:
    """The model's name as it may be shown to others: of a local path only the last part, behind the engine's scheme."""
    return f"{scheme}./{PurePath(model_id.removeprefix(scheme)).name}" if local else model_id


def _closest(run: Run) -> tuple[NearMiss, ...]:
    """Who comes closest to the limits; nobody where what runs today might still keep them."""
    if not run.candidates:
        return ()
    fit = [name for name in run.live if run.alias_of(name) is None and scoring.unfit_reason(run, name) is None]
    return () if run.incumbent in run.live and run.incumbent not in fit else limits.closest(run, fit)


def _no_winner(run: Run) -> AllFailed | NotDecided | NothingFeasible:
    if not run.candidates:
        return NotDecided("nothing has been measured yet; go on with --resume")
    measured = [name for name in run.live if scoring.complete_rounds(run, name)]
    if run.incumbent in run.live and run.incumbent not in measured:
        return NotDecided("what runs today has not been measured in full yet; go on with --resume")
    if any(name not in measured and scoring.may_win(run, name) for name in run.live):
        return NotDecided("nobody who may be recommended has been measured in full yet; go on with --resume")
    if measured:
        return NothingFeasible(
            "no measured candidate may be recommended: each may change the output; --allow-lossy accepts that"
        )
    kinds = sorted({failed.failure.kind for failed in run.failures.values()})
    first = next((failed.failure.reason for failed in run.failures.values()), "nothing was to be tried")
    return AllFailed(f"every candidate failed ({', '.join(kinds) or 'there was none'}); the first: {first}")


def _choice(run: Run, candidate_id: str) -> Choice:
    candidate = next(entry.candidate for entry in run.candidates if entry.candidate.id == candidate_id)
    return Choice(id=candidate.id, label=candidate.label, settings=candidate.settings)


def _notes(header: Header, run: Run, winner: str | None, candidates: Sequence[CandidateResult]) -> tuple[str, ...]:
    notes = list(header.notes)
    if run.end is None:
        notes.append(PARTIAL_NOTE.format(_how_it_ended(run)))
    notes += _unstable_notes(run)
    notes += _memory_notes(run)
    notes += _context_notes(run)
    notes += _other_length_notes(run)
    notes += _worker_notes(run)
    notes += _drift_notes(run)
    if header.shape.weights == "random":
        notes.append(RANDOM_WEIGHTS_NOTE)
    if winner is not None:
        notes += _compile_notes(run, winner)
        notes += _limit_notes(run, winner)
        notes += fidelity.notes(run, winner)
    notes += utilisation.notes(candidates)
    return tuple(notes)


def _drift_notes(run: Run) -> list[str]:
    """That the machine changed, where it surely did, and by enough to matter."""
    found = drift(run)
    if found is None or found.low <= 1 <= found.high or abs(found.value - 1) < MIN_DIFFERENCE:
        return []
    way = "faster" if found.value > 1 else "slower"
    return [
        f"the machine became {way} during the run, by {abs(found.value - 1):.1%} as what runs today shows: comparisons "
        "are within blocks and hold, the figures of a single candidate are means over that"
    ]


def _how_it_ended(run: Run) -> str:
    if run.stopped is None:
        return "killed"
    return run.stopped.reason if run.stopped.kind == "budget" else f"{run.stopped.kind} {run.stopped.reason}"


def _compile_notes(run: Run, winner: str) -> list[str]:
    """What the figures of a winner that compiles leave out, one line per scenario."""
    cells = [Cell(candidate=winner, scenario=key) for key in run.scenarios]
    costs = [(cell.scenario, cost) for cell in cells if (cost := _compile_cost(run, cell)) is not None]
    return [f"the winner compiles code: {_cost(key, cost)}" for key, cost in costs]


def _limit_notes(run: Run, winner: str) -> list[str]:
    """Limits that the winner is not shown to keep."""
    doubt = limits.undecided(limits.results(run, winner))
    return [] if doubt is None else [f"undecided, as no candidate is shown to keep all limits: the winner {doubt}"]


def _cost(scenario: str, cost: CompileCost) -> str:
    filled = f" ({cost.cached_first_call_s:.1f} s with a filled cache)" if cost.cached_first_call_s is not None else ""
    again = "never" if cost.break_even_requests is None else f"after {cost.break_even_requests} requests"
    return (
        f"the first call of {scenario} in a new process takes {cost.first_call_s:.1f} s{filled}, won back {again}"
        f"{_another_length(cost)}"
    )


def _another_length(cost: CompileCost) -> str:
    if cost.another_length_s is None:
        return ""
    if not cost.another_length_graphs:
        return "; a new prompt length compiles nothing"
    return f"; a new prompt length takes {cost.another_length_s:.1f} s more"


def _unstable_notes(run: Run) -> list[str]:
    """One line on what disturbed the run, if it disturbed it much."""
    unstable = [entry for entry in run.candidates if run.rejected_share(entry.candidate.id) > MAX_REJECTED]
    causes = Counter(_kind(cause) for sample in run.samples for cause in sample.distrust)
    if not unstable or not causes:
        return []
    (cause, count), *_ = causes.most_common(1)
    rejected = sum(bool(sample.distrust) for sample in run.samples)
    fewer = ", or use fewer --threads" if "free core" in cause and (run.header.target.threads or 2) > 1 else ""
    return [
        f"{rejected} of {len(run.samples)} timed calls were rejected, {'all' if count == rejected else count} of them "
        f"because {cause}: stop other work"
        f"{fewer}, and see kvat doctor; unstable are the figures of "
        + _few([entry.candidate.label for entry in unstable])
    ]


def _memory_notes(run: Run) -> list[str]:
    """Why peaks are unknown, and what comes of it where memory is scored."""
    notes = [
        f"peak memory could not be read ({_in_words(failure)}): {_few(labels)}"
        for failure, labels in _grouped([(one.failure, _choice(run, one.cell.candidate).label) for one in _unread(run)])
    ]
    matters = scoring.memory_matters_to(run)
    if run.header.profile.objective.shares()["memory"] == 0 or not matters:
        return notes
    unknown = [_choice(run, name).label for name in matters if scoring.own_peak(run, name) is None]
    if unknown and scoring.compared_peaks(run):
        notes.append(f"where peak memory could not be read, it counts as all that there is: {_few(unknown)}")
    elif unknown:
        notes.append(
            f"memory matters, and yet does not count in the scores, because peaks are not known: {_few(unknown)}"
        )
    return notes


def _context_notes(run: Run) -> list[str]:
    """What bounds contexts other than memory and time, and why these do not count where they should."""
    ends = [
        (trial.failure, f"{_choice(run, trial.candidate).label} at {trial.tokens} tokens")
        for trial in run.context_trials
        if trial.failure is not None and trial.failure.kind not in context.EXPECTED
    ]
    notes = [
        f"a length was given up for another reason than memory or time ({_in_words(failure)}): {_few(where)}"
        for failure, where in _grouped(ends)
    ]
    if run.header.profile.objective.context == 0:
        return notes
    unknown = [
        _choice(run, name).label
        for name in run.live
        if scoring.complete_rounds(run, name) and context.known(run, name) is None
    ]
    if not unknown:
        return notes
    if scoring.compared_contexts(run):
        counts = "it counts as the longest scenario"
    else:
        counts = "it does not count in the scores, as it is not known of what runs today"
    return [*notes, f"the longest context is neither measured nor predicted of {_few(unknown)}: {counts}"]


def _other_length_notes(run: Run) -> list[str]:
    """Why it is not known what a new prompt length costs."""
    ends = [
        (one.failure, f"{_choice(run, cell.candidate).label} at {cell.scenario}")
        for cell, one in run.other_lengths.items()
        if one.failure is not None
    ]
    return [
        f"what a new prompt length costs is not known ({_in_words(failure)}): {_few(where)}"
        for failure, where in _grouped(ends)
    ]


def _unread(run: Run) -> list[Failed]:
    """Failures to read a peak that no other process of the cell has made good."""
    measured = {(one.launch in run.memory_launches, cell) for one in run.measured for cell in one.cells}
    return [
        failed
        for failed in run.memory_failures
        if (True, failed.cell) not in measured
        and (failed.launch in run.memory_launches or (False, failed.cell) not in measured)
    ]


def _worker_notes(run: Run) -> list[str]:
    """What became of workers that had done their work."""
    # One that cannot be killed pauses the run, which says so.
    failures = [(end.failure, f"launch {end.launch}") for end in run.ended if end.failure]
    ends = [(failure, launch) for failure, launch in failures if failure.kind != "unkillable"]
    return [
        f"a worker failed after its work ({_in_words(failure)}), which costs no figures: {_few(launches)}"
        for failure, launches in _grouped(ends)
    ]


def _in_words(failure: Failure) -> str:
    return f"{failure.phase}: {failure.kind}, {failure.reason}"


def _grouped(failures: list[tuple[Failure, str]]) -> list[tuple[Failure, list[str]]]:
    """Failures that differ in words, each with the names that it has befallen."""
    groups: dict[str, tuple[Failure, dict[str, None]]] = {}
    for failure, name in failures:
        groups.setdefault(_in_words(failure), (failure, {}))[1][name] = None
    return [(failure, list(names)) for failure, names in groups.values()]


def _kind(cause: str) -> str:
    """A cause without its figures."""
    return cause.partition(" (")[0]


def _few(labels: list[str]) -> str:
    return ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")


def _winner_metrics(run: Run, winner: str) -> WinnerMetrics:
    """Jitter of the winner, and how often a timed cell of its ended with a failure, which was then forgiven."""
    samples = [sample for key in run.scenarios for sample in _samples(run, Cell(candidate=winner, scenario=key))]
    jitters = [value for value in map(metrics.jitter, samples) if value is not None]
    failed = sum(failed.cell.candidate == winner for failed in run.timing_failures)
    return WinnerMetrics(error_rate=failed / (failed + len(samples)), jitter=median(jitters) if jitters else None)


def _samples(run: Run, cell: Cell) -> list[Sample]:
    return [sample for samples in run.samples_of(cell).values() for sample in samples]


def _result(run: Run, entry: CandidateEntry, decision: Decision | _Nobody) -> CandidateResult:
    candidate = entry.candidate
    failed = run.failures.get(candidate.id)
    original = run.alias_of(candidate.id)
    state = _state(run, entry)
    judged = limits.results(run, candidate.id) if state == "ok" else ()
    longest = context.measured(run, candidate.id) if state == "ok" else None
    return CandidateResult(
        id=candidate.id,
        label=candidate.label,
        settings=candidate.settings,
        state=state,
        reason=_reason(run, candidate.id, original, decision.winner) if failed is None else None,
        failure=failed.failure if failed else None,
        aliases=tuple(run.aliases.get(candidate.id, ())),
        fidelity=fidelity.result(run, candidate.id),
        rejected_share=run.rejected_share(candidate.id),
        unstable=run.rejected_share(candidate.id) > MAX_REJECTED,
        score=decision.scores.get(original or candidate.id),
        limits=judged,
        max_context_tokens=None if longest is None else longest.tokens,
        max_context_bounded_by=None if longest is None else longest.bounded_by,
        scenarios=tuple(_scenario_results(run, entry)),
    )


def _reason(run: Run, candidate_id: str, original: str | None, winner: str | None) -> str | None:
    if original is not None:
        return f"runs the very same thing as {_choice(run, original).label}, whose figures these are"
    if candidate_id in run.live and not scoring.complete_rounds(run, candidate_id) and _was_screened(run, candidate_id):
        return PASSED_OVER if run.end is not None else SCREENED_SO_FAR
    return scoring.ineligible_reason(run, candidate_id) or _passed_over(run, candidate_id, winner)


def _passed_over(run: Run, candidate_id: str, winner: str | None) -> str | None:
    """Why a candidate with an undecided limit could not win: another one keeps all limits for sure."""
    if winner is None or limits.undecided(limits.results(run, winner)) is not None:
        return None
    return limits.undecided(limits.results(run, candidate_id))


def _front(run: Run, winner: str, results: Sequence[CandidateResult]) -> tuple[str, ...]:
    """Ids of those that nobody is shown to beat in everything: the winner, if it is one, then by score."""
    utilities = scoring.utilities(run, [result.id for result in eligible_by_score(results)])
    longest = {result.id: result.max_context_tokens for result in results}
    front = pareto_front(
        {
            name: Objectives(
                ttft=utility.ttft,
                decode=utility.decode,
                peak_bytes=scoring.own_peak(run, name),
                context_tokens=longest[name],
            )
            for name, utility in utilities.items()
        }
    )
    return tuple(sorted(front, key=lambda name: name != winner))


def _state(run: Run, entry: CandidateEntry) -> State:
    if entry.exclusion is not None:
        return "excluded"
    if entry.candidate.id in run.failures:
        return "failed"
    if scoring.complete_rounds(run, entry.candidate.id):
        return "ok"
    return "pruned" if _was_screened(run, entry.candidate.id) else "not_reached"


def _was_screened(run: Run, candidate_id: str) -> bool:
    return bool(scoring.screened(run, [candidate_id])[candidate_id].score)


def _scenario_results(run: Run, entry: CandidateEntry) -> list[ScenarioResult]:
    memory = run.own_memory
    results = []
    for key, scenario in run.scenarios.items():
        cell = Cell(candidate=entry.candidate.id, scenario=key)
        rounds = run.blocks_of(cell)
        if not rounds:
            continue
        ttft_s, decode_tps = _estimate(rounds, metrics.ttft_s), _estimate(rounds, metrics.decode_tps)
        use = utilisation.use(run, entry, scenario, ttft_s=ttft_s.median, decode_tps=decode_tps.median)
        peak = memory.get(run.original(cell))
        results.append(
            ScenarioResult(
                prompt_tokens=scenario.prompt_tokens,
                output_tokens=scenario.output_tokens,
                batch_size=scenario.batch_size,
                shortest_prompt_tokens=scenario.shortest_prompt_tokens,
                ttft_s=ttft_s,
                tpot_s=_estimate(rounds, metrics.tpot_s),
                decode_tps=decode_tps,
                e2e_s=_estimate(rounds, metrics.e2e_s),
                peak_device_bytes=peak.peak_device_bytes if peak else None,
                peak_host_bytes=peak.peak_host_bytes if peak else None,
                ready_host_bytes=peak.ready_host_bytes if peak else None,
                kv_cache_bytes=peak.kv_cache_bytes if peak else None,
                kv_cache_predicted_bytes=peak.kv_cache_predicted_bytes if peak else None,
                energy_per_token_j=_energy_per_token_j(rounds),
                compile_cost=_compile_cost(run, cell),
                bandwidth_use=use.bandwidth,
                flop_use=use.flop,
            )
        )
    return results


def _energy_per_token_j(rounds: dict[int, list[Sample]]) -> float | None:
    """Median over the calls; None where any of them does not tell."""
    values = [metrics.energy_per_token_j(sample) for samples in rounds.values() for sample in samples]
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None


def _compile_cost(run: Run, cell: Cell) -> CompileCost | None:
    """What the first call of a new process costs on top of one at full speed, and when it is won back."""
    calls = [call for call in run.first_calls if call.cell == run.original(cell)]
    cold_s = next((call.duration_s for call in calls if call.cold), None)
    if cold_s is None:
        return None
    cached = [call.duration_s for call in calls if not call.cold]
    steady_s, today_s = _call_s(run, cell), _call_s(run, cell.model_copy(update={"candidate": run.incumbent}))
    full_s = steady_s or 0.0
    compile_s = max(0.0, cold_s - full_s)
    other = run.other_lengths.get(run.original(cell))
    gain_s = today_s - steady_s if steady_s is not None and today_s is not None else 0.0
    return CompileCost(
        first_call_s=cold_s,
        cached_first_call_s=median(cached) if cached else None,
        compile_s=compile_s,
        break_even_requests=math.ceil(compile_s / gain_s) if gain_s > 0 else None,
        another_length_s=None if other is None or other.duration_s is None else max(0.0, other.duration_s - full_s),
        another_length_graphs=None if other is None else other.compilations,
    )


def _call_s(run: Run, cell: Cell) -> float | None:
    samples = _samples(run, cell)
    return median(sample.duration_s for sample in samples) if samples else None


def _estimate(rounds: dict[int, list[Sample]], metric: Callable[[Sample], float]) -> Estimate:
    return stats.estimate([median(metric(sample) for sample in samples) for _, samples in sorted(rounds.items())])
