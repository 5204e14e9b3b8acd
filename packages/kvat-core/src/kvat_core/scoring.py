"""Pure: what the journal says of a candidate → its utility per block, or why it has none.

Utility is the logarithm of a weighted geometric mean: Σ scenarios · Σ metrics, each metric
signed so that more is better. The difference of two utilities in the same block is the log of
their score ratio; 1.00 is the incumbent. There are no absolute scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from kvat_core import context, fidelity, limits
from kvat_core.metrics import Figures
from kvat_core.run import Run
from kvat_core.schema import Cell, Resources

MEMORY_PLENTY = 0.5
"""A peak under this share of the memory that binds earns nothing for being smaller still."""


@dataclass(frozen=True)
class Utility:
    """Log utility of a candidate, and of its two speeds alone, per complete round; and the launch it was seen in."""

    score: dict[int, float]
    ttft: dict[int, float]
    decode: dict[int, float]
    launch: dict[int, int]

    def up_to(self, last: int) -> Utility:
        """The same without the rounds after one."""
        kept = [number for number in self.score if number <= last]
        return Utility(
            score={number: self.score[number] for number in kept},
            ttft={number: self.ttft[number] for number in kept},
            decode={number: self.decode[number] for number in kept},
            launch={number: self.launch[number] for number in kept},
        )


def ineligible_reason(run: Run, candidate_id: str) -> str | None:
    """Why a candidate that may have figures must not be recommended, or None."""
    return unfit_reason(run, candidate_id) or limits.misses(run, candidate_id)


def unfit_reason(run: Run, candidate_id: str) -> str | None:
    """Why a candidate must not be recommended whatever its limits are, or None."""
    entry = run.entry(candidate_id)
    if entry.exclusion is not None:
        return entry.exclusion
    if candidate_id not in run.live:
        return "failed"
    if not complete_rounds(run, candidate_id):
        return "not measured in every scenario"
    return fidelity.objection(run, candidate_id)


def may_win(run: Run, candidate_id: str) -> bool:
    """Whether a candidate could be recommended if its figures were good, and what is still to be judged as well."""
    return candidate_id in run.live and fidelity.may_be_accepted(run, candidate_id)


def complete_rounds(run: Run, candidate_id: str) -> list[int]:
    """Blocks in which the candidate has all it needs of every scenario."""
    return [number for number in _rounds(run, candidate_id) if number not in run.before_the_blocks]


def utilities(run: Run, candidate_ids: Iterable[str]) -> dict[str, Utility]:
    """Utility of each candidate in every block that is complete for it."""
    peaks, contexts = compared_peaks(run), compared_contexts(run)
    return {
        name: _utility(run, name, complete_rounds(run, name), _log(peaks, name), _log(contexts, name))
        for name in candidate_ids
    }


def screened(run: Run, candidate_ids: Iterable[str]) -> dict[str, Utility]:
    """Utility of each candidate in every complete round of pilot and screening; memory and context do not count yet."""
    return {
        name: _utility(run, name, [one for one in _rounds(run, name) if one in run.before_the_blocks])
        for name in candidate_ids
    }


def speeds_in_order(run: Run, candidate_id: str) -> list[float]:
    """Log score of each launch of a candidate, whatever it was for, in order; without memory and context."""
    every = _utility(run, candidate_id, _rounds(run, candidate_id), 0.0)
    return [score for _, score in sorted((every.launch[number], score) for number, score in every.score.items())]


def _rounds(run: Run, candidate_id: str) -> list[int]:
    first, *others = (run.complete_rounds(cell) for cell in run.cells(candidate_id))
    return sorted(number for number in first if all(number in other for other in others))


def _log(sizes: Mapping[str, int], candidate_id: str) -> float:
    return math.log(sizes[candidate_id]) if candidate_id in sizes else 0.0


def _utility(
    run: Run, candidate_id: str, rounds: Collection[int], memory: float = 0.0, longest_context: float = 0.0
) -> Utility:
    shares = run.header.profile.objective.shares()
    total = sum(shares.values())
    ttft = _log_metric(run, candidate_id, lambda figures: figures.ttft_s, rounds)
    decode = _log_metric(run, candidate_id, lambda figures: figures.decode_tps, rounds)
    # So that nobody gains by not telling, unsteadiness counts for nobody where the gaps of any sample are unknown.
    counts = run.gaps_told and shares["stability"] > 0
    unsteady = _log_metric(run, candidate_id, _jitter, rounds) if counts else dict.fromkeys(rounds, 0.0)
    score = {
        number: (
            -shares["ttft"] * ttft[number]
            + shares["decode"] * decode[number]
            - shares["stability"] * unsteady[number]
            - shares["memory"] * memory
            + shares["context"] * longest_context
        )
        / total
        for number in rounds
    }
    first = run.samples_of(run.cells(candidate_id)[0])
    return Utility(
        score=score,
        ttft={number: -ttft[number] for number in rounds},
        decode=decode,
        launch={number: first[number][0].launch for number in rounds},
    )


def _log_metric(
    run: Run, candidate_id: str, metric: Callable[[Figures], float], rounds: Collection[int]
) -> dict[int, float]:
    """Per round: weighted mean over scenarios of the log of the launch median."""
    cells = [(run.scenarios[cell.scenario].weight, run.medians_of(cell)) for cell in run.cells(candidate_id)]
    total = sum(weight for weight, _ in cells)
    return {
        number: sum(weight * math.log(metric(medians[number])) for weight, medians in cells) / total
        for number in rounds
    }


def _jitter(figures: Figures) -> float:
    """Of a sample whose gaps are known."""
    return figures.jitter or 1.0


def own_resources(run: Run, candidate_id: str) -> Resources | None:
    """Peaks of the candidate in a process of its own, where that was measured."""
    memory = run.own_memory
    originals = (run.original(Cell(candidate=candidate_id, scenario=key)) for key in run.scenarios)
    return next((memory[cell] for cell in originals if cell in memory), None)


def memory_matters_to(run: Run) -> list[str]:
    """Candidates with figures whose peak memory is part of their score; empty where there is plenty for all.

    A smaller peak is worth something to all where memory is limited, or where what runs today uses so much, and else to
    those that use so much themselves. So a candidate that is greedy, and hopeless, changes nothing between the others.
    As long as a peak of its own is not known, those of the launches that a candidate was in bound it from above.
    """
    limited = limits.limits_memory(run.header.profile.limits)
    if not limited and not _may_be_short(run):
        return []
    names = [name for name in run.live if complete_rounds(run, name)]
    if limited:
        return names
    shares = _shares_used(run)
    greedy = [name for name in names if _share_of(run, name, shares) > MEMORY_PLENTY]
    return names if run.incumbent in greedy or (greedy and run.incumbent not in names) else greedy


def compared_peaks(run: Run) -> Mapping[str, int]:
    """Peak of the binding memory in bytes of every candidate with figures; nothing where memory is not compared.

    That is so where it matters to nobody, or was not read yet of any to whom it does, or is unknown for the incumbent,
    without whom nobody can be said to save some. Another one whose peak could not be read counts with all memory there
    is, which wins it nothing; and one to whom memory does not matter with the incumbent's.
    """
    matters, today = memory_matters_to(run), own_peak(run, run.incumbent)
    peaks: dict[str, int] = {}
    for name in (name for name in run.live if complete_rounds(run, name)) if matters else ():
        peak = own_peak(run, name) if name in matters else today
        if peak is None and name != run.incumbent and name in matters and _was_tried(run, name):
            peak = _all_memory(run)
        if peak is None:
            return {}
        peaks[name] = peak
    return peaks


def compared_contexts(run: Run) -> Mapping[str, int]:
    """Longest context in tokens of every candidate with figures, predicted where it was not measured.

    Where it is unknown it counts as the longest scenario that was measured, which wins nothing. Nothing where it has no
    weight, or is unknown for the incumbent, without whom nobody can be said to hold more.
    """
    if run.header.profile.objective.context == 0 or context.known(run, run.incumbent) is None:
        return {}
    measured = [name for name in run.live if complete_rounds(run, name)]
    found = {name: context.known(run, name) for name in measured}
    return {name: context.held_tokens(run, name) if one is None else one.tokens for name, one in found.items()}


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


def _may_be_short(run: Run) -> bool:
    """Whether any process used so much that memory matters, or had no memory to tell how much."""
    if any(_share_used(run, measured.resources) > MEMORY_PLENTY for measured in run.measured):
        return True
    return any(cell not in run.own_memory for cell in run.memory_tried)


def _shares_used(run: Run) -> dict[Cell, float]:
    """Share of the memory that the least greedy launch with a cell has used, of every cell that was measured."""
    found: dict[Cell, float] = {}
    for measured in run.measured:
        share = _share_used(run, measured.resources)
        for cell in measured.cells:
            found[cell] = min(share, found.get(cell, math.inf))
    return found


def _share_of(run: Run, candidate_id: str, shares: Mapping[Cell, float]) -> float:
    """Of a candidate: by its own process, where there was one; else the most that its launches leave possible."""
    own = own_resources(run, candidate_id)
    if own is not None:
        return _share_used(run, own)
    known = [share for cell in run.cells(candidate_id) if (share := shares.get(run.original(cell))) is not None]
    if known:
        return max(known)
    return 1.0 if _was_tried(run, candidate_id) else 0.0


def _share_used(run: Run, resources: Resources) -> float:
    machine = run.header.machine
    if resources.peak_device_bytes is not None and machine.device_memory_bytes is not None:
        return resources.peak_device_bytes / machine.device_memory_bytes
    return (resources.peak_host_bytes or 0) / machine.memory_bytes
