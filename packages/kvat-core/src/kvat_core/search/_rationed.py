"""Any search, within what a run may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from kvat_core import context
from kvat_core.costs import LOADS, Costs, loads, spent_launches, spent_s
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchEnd, LaunchOrder, Purpose
from kvat_core.search._base import Allowance, memory_order, peaks_of_a_plan
from kvat_core.search._vetted import Vetted

VETTING_SHARE = 0.25
"""Of what a run may take, the most that is kept for vetting its winner: a choice comes before its proof."""


class Rationed:
    """Asks a search for launches as long as the allowance lasts, and keeps some of it for what a plan needs at its end.

    That is the peaks that it tells, and the vetting of its winner.

    Args:
        search: what is asked.
        load_keys: key of the load each cell needs.
        allowance: what all launches may take.
    """

    def __init__(self, search: Vetted, load_keys: Mapping[Cell, str], allowance: Allowance) -> None:
        self._search = search
        self._load_keys = load_keys
        self._allowance = allowance

    def next(self, run: Run) -> LaunchOrder | None:
        """The next launch that fits the allowance, or None."""
        order = self._search.next(run)
        if order is None or self._allowance == Allowance():
            return order
        vetting = [one for one in self._search.of_the_winner(run) if one.cells != order.cells]
        peaks = [[cell] for cell in peaks_of_a_plan(run)] if order.purpose not in ("memory", "context") else []
        if self._fits(run, order, peaks, vetting):
            return order
        if peaks and self._fit(run, peaks[:1], vetting):
            return memory_order(run, peaks[0])
        return next((one for one in vetting if self._fits(run, one, [], [])), None)

    def remaining(self, run: Run) -> int:
        """Launches still to come if nothing fails, for the display."""
        left = self._search.remaining(run)
        launches = self._allowance.launches
        return left if launches is None else min(left, max(0, launches - spent_launches(run)))

    def cut_short(self, run: Run) -> bool:
        """Whether the search would ask for more if it were allowed to."""
        return self._search.next(run) is not None

    def _fits(
        self, run: Run, order: LaunchOrder, peaks: Sequence[Sequence[Cell]], vetting: Sequence[LaunchOrder]
    ) -> bool:
        """Whether an order leaves enough for the peaks and the vetting that a plan needs."""
        if order.purpose == "context":
            seconds = context.trial_s(run, order)
        elif order.purpose in LOADS:
            seconds = self._vetting_s(run, order.purpose)
        else:
            return self._fit(run, [order.cells, *peaks], vetting)
        number = loads(order.purpose) + self._kept_launches(vetting)
        return self._affords(run, number, seconds + self._kept_s(run, vetting))

    def _fit(self, run: Run, groups: Sequence[Sequence[Cell]], vetting: Sequence[LaunchOrder]) -> bool:
        """Whether launches of these cells leave enough for the vetting."""
        seconds = Costs(run, self._load_keys).seconds(groups) + self._kept_s(run, vetting)
        return self._affords(run, len(groups) + self._kept_launches(vetting), seconds)

    def _kept_launches(self, vetting: Sequence[LaunchOrder]) -> int:
        needed, launches = sum(loads(one.purpose) for one in vetting), self._allowance.launches
        return needed if launches is None else min(needed, int(VETTING_SHARE * launches))

    def _kept_s(self, run: Run, vetting: Sequence[LaunchOrder]) -> float:
        needed, wall_s = sum(self._vetting_s(run, one.purpose) for one in vetting), self._allowance.wall_s
        return needed if wall_s is None else min(needed, VETTING_SHARE * wall_s)

    def _vetting_s(self, run: Run, purpose: Purpose) -> float:
        """Seconds that such a launch will take: as those before it, or else by how often it loads the model."""
        ended = [order.launch for order in run.ended_launches(purpose)]
        if ended:
            return fmean(end.wall_s for end in run.ended if end.launch in ended)
        others = [end.wall_s / len(order.cells) for order, end in _ended(run)]
        return loads(purpose) * fmean(others) if others else 0.0

    def _affords(self, run: Run, number: int, seconds: float) -> bool:
        """Whether so many launches, which take so long, are left."""
        launches, wall_s = self._allowance.launches, self._allowance.wall_s
        if launches is not None and spent_launches(run) + number > launches:
            return False
        return wall_s is None or spent_s(run) + seconds <= wall_s


def _ended(run: Run) -> list[tuple[LaunchOrder, LaunchEnd]]:
    orders = {order.launch: order for order in run.launches}
    return [(orders[end.launch], end) for end in run.ended]
