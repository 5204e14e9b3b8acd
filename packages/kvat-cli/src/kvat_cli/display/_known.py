"""Pure: what a run knows so far, in the words of a display."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from kvat_core import metrics
from kvat_core.schema import Cell
from kvat_report import numbers

if TYPE_CHECKING:
    from kvat_core.run import Run
    from kvat_core.tuner import Progress


@dataclass(frozen=True)
class Row:
    """One candidate in one scenario, as text."""

    candidate: str
    scenario: str
    samples: str
    ttft: str
    decode: str
    failure: str


def rows(run: Run) -> list[Row]:
    """Every candidate that is tried, in every scenario; plain medians of what was sampled so far."""
    tried = [entry.candidate for entry in run.candidates if entry.exclusion is None]
    return [_row(run, candidate.id, candidate.label, scenario) for candidate in tried for scenario in run.scenarios]


def _row(run: Run, candidate: str, label: str, scenario: str) -> Row:
    samples = run.calls_of(Cell(candidate=candidate, scenario=scenario))
    failures = [
        failed.failure.kind
        for failed in run.failed
        if failed.cell.candidate == candidate and not run.is_about_memory(failed)
    ]
    return Row(
        candidate=label,
        scenario=scenario,
        samples=str(len(samples)),
        ttft=numbers.seconds(median(map(metrics.ttft_s, samples))) if samples else numbers.NOTHING,
        decode=numbers.tokens_per_second(median(map(metrics.decode_tps, samples))) if samples else numbers.NOTHING,
        failure=", ".join(dict.fromkeys(failures)),
    )


def state(progress: Progress) -> str:
    """Launches and time, e.g. ``launches: 3 done, 5 left; 12 s elapsed, about 20 s left``."""
    left = "" if progress.left_s is None else f", about {numbers.duration(progress.left_s)} left"
    return (
        f"launches: {progress.launches_done} done, {progress.launches_left} left; "
        f"{numbers.duration(progress.elapsed_s)} elapsed{left}"
    )


def labels(run: Run) -> dict[str, str]:
    """Label of each candidate by its id."""
    return {entry.candidate.id: entry.candidate.label for entry in run.candidates}
