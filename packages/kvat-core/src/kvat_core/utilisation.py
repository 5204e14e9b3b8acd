"""Pure: how much of what the machine allows each candidate's measured figures use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvat_core import roofline
from kvat_core.run import Run
from kvat_core.schema import CandidateEntry, CandidateResult, Scenario


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
    over = [
        (result.bandwidth_use, candidate.label)
        for candidate in candidates
        for result in candidate.scenarios
        if result.bandwidth_use is not None and result.bandwidth_use > roofline.MAX_USE
    ]
    if not over:
        return []
    most, label = max(over)
    return [
        f"the byte model is wrong, or the measured bandwidth too low: {label} seems to read {most:.0%} of what this "
        "machine's memory delivers at most; rely on no bandwidth use of this run"
    ]
