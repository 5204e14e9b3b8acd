"""Pure: how much of what the machine allows each candidate's measured figures use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvat_core import roofline
from kvat_core.run import Run
from kvat_core.schema import CandidateEntry, CandidateResult, Scenario

_AGAIN = "delete ceilings-*.json in kvat's cache directory to have the ceilings measured again"


class Use(NamedTuple):
    """Shares of the ceilings; None = not known."""

    bandwidth: float | None = None
    flop: float | None = None


def use(run: Run, entry: CandidateEntry, scenario: Scenario, *, ttft_s: float, decode_tps: float) -> Use:
    """Of one cell.

    Args:
        ttft_s: median that was measured.
        decode_tps: median that was measured, tokens of all requests together.
    """
    shape, ceilings, footprint = run.header.shape, run.header.ceilings, entry.footprints.get(scenario.key)
    doing = None if footprint is None else roofline.work(shape, footprint, scenario)
    if ceilings is None or footprint is None or doing is None:
        return Use()
    return Use(
        bandwidth=roofline.bandwidth_use(doing, footprint, ceilings, scenario.batch_size, decode_tps),
        flop=roofline.flop_use(doing, footprint, ceilings, ttft_s),
    )


def notes(candidates: Sequence[CandidateResult]) -> list[str]:
    """What cannot be: the tool checks itself, and says so."""
    cells = [(candidate.label, result) for candidate in candidates for result in candidate.scenarios]
    reading = _most([(result.bandwidth_use, label) for label, result in cells])
    computing = _most([(result.flop_use, label) for label, result in cells])
    found = []
    if reading is not None:
        found.append(
            f"the byte model is wrong, or the measured bandwidth too low: {reading[1]} seems to read {reading[0]:.0%} "
            f"of what this machine's memory delivers at most; rely on no bandwidth use of this run, and {_AGAIN}"
        )
    if computing is not None:
        found.append(
            f"the model of operations is wrong, or the measured rate too low: {computing[1]} seems to compute "
            f"{computing[0]:.0%} of what this machine can at most; rely on no use of its arithmetic, and {_AGAIN}"
        )
    return found


def _most(uses: Iterable[tuple[float | None, str]]) -> tuple[float, str] | None:
    """The largest impossible use, with whose it is."""
    return max(((use, label) for use, label in uses if use is not None and use > roofline.MAX_USE), default=None)
