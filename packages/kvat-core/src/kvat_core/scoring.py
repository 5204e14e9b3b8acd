"""Pure: what the journal says of a candidate → its utility per block, or why it has none.

Utility is the logarithm of a weighted geometric mean: Σ scenarios · Σ metrics, each metric
signed so that more is better. The difference of two utilities in the same block is the log of
their score ratio; 1.00 is the incumbent. There are no absolute scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from kvat_core import limits, metrics
from kvat_core.run import Run
from kvat_core.schema import Cell, Resources, Sample

MEMORY_PLENTY = 0.5
"""A peak under this share of the memory that binds earns nothing for being smaller still."""


@dataclass(frozen=True)
class Utility:
    """Log utility of a candidate, and of its two speeds alone, per complete block (round)."""

    score: dict[int, float]
    ttft: dict[int, float]
    decode: dict[int, float]


def ineligible_reason(run: Run, candidate_id: str) -> str | None:
    """Why a candidate that may have figures must not be recommended, or None."""
    return unfit_reason(run, candidate_id) or limits.misses(run, candidate_id)


def unfit_reason(run: Run, candidate_id: str) -> str | None:
    """Why a candidate must not be recommended whatever its limits are, or None."""
    entry = next(entry for entry in run.candidates if entry.candidate.id == candidate_id)
    if entry.exclusion is not None:
        return entry.exclusion
    if candidate_id not in run.live:
        return "failed"
    if not complete_rounds(run, candidate_id):
        return "not measured in every scenario"
    if entry.candidate.lossy:
        return "may change the output beyond rounding, which this run does not judge; pin it with --set to accept that"
    return None


def complete_rounds(run: Run, candidate_id: str) -> list[int]:
    """Rounds in which the candidate has all it needs of every scenario."""
    per_scenario = [run.complete_rounds(Cell(candidate=candidate_id, scenario=key)) for key in run.scenarios]
    return sorted(set.intersection(*per_scenario))


def utilities(run: Run, candidate_ids: Iterable[str]) -> dict[str, Utility]:
    """Utility of each candidate in every round that is complete for it."""
    # So that nobody gains by not telling, unsteadiness counts for nobody where the gaps of any sample are unknown.
    told = all(metrics.jitter(sample) is not None for sample in run.samples)
    return {candidate_id: _utility(run, candidate_id, gaps_told=told) for candidate_id in candidate_ids}


def _utility(run: Run, candidate_id: str, *, gaps_told: bool) -> Utility:
    rounds = complete_rounds(run, candidate_id)
    shares = run.header.profile.objective.shares()
    total = sum(shares.values())
    ttft = _log_metric(run, candidate_id, metrics.ttft_s, rounds)
    decode = _log_metric(run, candidate_id, metrics.decode_tps, rounds)
    unsteady = _log_metric(run, candidate_id, _jitter, rounds) if gaps_told else dict.fromkeys(rounds, 0.0)
    memory = memory_log(run, candidate_id)
    score = {
        number: (
            -shares["ttft"] * ttft[number]
            + shares["decode"] * decode[number]
            - shares["stability"] * unsteady[number]
            - shares["memory"] * memory
        )
        / total
        for number in rounds
    }
    return Utility(score=score, ttft={number: -ttft[number] for number in rounds}, decode=decode)


def _log_metric(run: Run, candidate_id: str, metric: Callable[[Sample], float], rounds: list[int]) -> dict[int, float]:
    """Per round: weighted mean over scenarios of the log of the launch median."""
    weights = {key: scenario.weight for key, scenario in run.scenarios.items()}
    cells = {key: run.samples_of(Cell(candidate=candidate_id, scenario=key)) for key in weights}
    return {
        number: sum(weights[key] * math.log(median(metric(sample) for sample in cells[key][number])) for key in weights)
        / sum(weights.values())
        for number in rounds
    }


def _jitter(sample: Sample) -> float:
    """Of a sample whose gaps are known."""
    return metrics.jitter(sample) or 1.0


def own_resources(run: Run, candidate_id: str) -> Resources | None:
    """Peaks of the candidate in a process of its own, where that was measured."""
    memory = run.own_memory
    originals = (run.original(Cell(candidate=candidate_id, scenario=key)) for key in run.scenarios)
    return next((memory[cell] for cell in originals if cell in memory), None)


def memory_binds(run: Run) -> bool:
    """Whether memory is limited, or any launch used so much that a smaller peak is worth something.

    The peak of a shared launch bounds the peak of each candidate in it from above.
    """
    if limits.limits_memory(run.header.profile.limits):
        return True
    return any(_share_used(run, measured.resources) > MEMORY_PLENTY for measured in run.measured)


def memory_log(run: Run, candidate_id: str) -> float:
    """Log of the binding memory's peak in bytes; 0 for all where memory is plentiful, or unknown for any of them."""
    own = compared_peaks(run).get(candidate_id)
    return 0.0 if own is None else math.log(own)


def compared_peaks(run: Run) -> Mapping[str, int]:
    """Peak of the binding memory in bytes of every candidate with figures; nothing where memory is not compared.

    That is so where it is plentiful, or not read yet for any of them, or unknown for the incumbent, without whom nobody
    can be said to save some. Another one whose peak could not be read counts with all memory there is, which wins it
    nothing.
    """
    if not memory_binds(run):
        return {}
    peaks: dict[str, int] = {}
    for name in (name for name in run.live if complete_rounds(run, name)):
        peak = own_peak(run, name)
        if peak is None and name != run.incumbent and _was_tried(run, name):
            peak = _all_memory(run)
        if peak is None:
            return {}
        peaks[name] = peak
    return peaks


def own_peak(run: Run, candidate_id: str) -> int | None:
    """Peak of the binding memory in a process of the candidate's own, bytes; None if unknown."""
    resources = own_resources(run, candidate_id)
    return None if resources is None else _peak(resources)


def _was_tried(run: Run, candidate_id: str) -> bool:
    """Whether the candidate had its processes for peak memory."""
    return any(run.original(Cell(candidate=candidate_id, scenario=key)) in run.memory_tried for key in run.scenarios)


def _all_memory(run: Run) -> int:
    """Of the kind whose peaks are compared, bytes."""
    machine = run.header.machine
    of_device = any(one.resources.peak_device_bytes is not None for one in run.measured)
    return (machine.device_memory_bytes if of_device else None) or machine.memory_bytes


def _peak(resources: Resources) -> int | None:
    return resources.peak_device_bytes or resources.peak_host_bytes


def _share_used(run: Run, resources: Resources) -> float:
    machine = run.header.machine
    if resources.peak_device_bytes is not None and machine.device_memory_bytes is not None:
        return resources.peak_device_bytes / machine.device_memory_bytes
    return (resources.peak_host_bytes or 0) / machine.memory_bytes
