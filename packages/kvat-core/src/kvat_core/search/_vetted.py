"""Any search, with what it would recommend vetted: is it faithful, and does no request leave anything behind?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from kvat_core import fidelity
from kvat_core.decision import decide
from kvat_core.run import Run
from kvat_core.schema import Cell, LaunchOrder, Purpose
from kvat_core.search._base import MEMORY, Search

FIDELITY, CANARY = MEMORY + 1, MEMORY + 2
"""Rounds of launches that belong to no block."""


class Vetted:
    """Asks a search for launches, and puts others between them that time nothing.

    What may lose output is judged before it takes part in a first block, and whoever takes part in a run-off before
    that. When the search has enough, the winner is judged, and a canary sent through it; who fails makes room for the
    next best, of whom the search then may want to know more. At last those are judged who would stand in for it.

    Args:
        search: what is asked.
        stand_ins: of a run, the candidates that the plan's rules would name.
    """

    def __init__(self, search: Search, stand_ins: Callable[[Run], Iterable[str]]) -> None:
        self._search = search
        self._stand_ins = stand_ins

    def next(self, run: Run) -> LaunchOrder | None:
        """The next launch, or None when enough is known."""
        order = self._search.next(run)
        if order is None:
            return next(iter(self.of_the_winner(run) or self._of_stand_ins(run)), None)
        waiting = [cell for cell in order.cells if _has_to_wait(run, cell.candidate, order.purpose)]
        if not waiting:
            return order
        ready = tuple(cell for cell in order.cells if cell not in waiting)
        # A run that is cut short should know what it compares with before what it would rather not recommend.
        if ready and order.purpose == "timing":
            return order.model_copy(update={"cells": ready})
        # What others may lose depends on what today's loses.
        today = run.alias_of(run.incumbent) or run.incumbent
        first = today if fidelity.is_measure(run, today) and _is_to_be_judged(run, today) else waiting[0].candidate
        return _judgement(run, first)

    def remaining(self, run: Run) -> int:
        """Launches still to come if nothing fails, for the display."""
        left = self._search.remaining(run)
        if all(entry.reference is None for entry in run.candidates):
            return left
        # Until it is known, the winner is one that has to be judged.
        return left + 2 if left else len(self.of_the_winner(run)) + len(self._of_stand_ins(run))

    def _of_stand_ins(self, run: Run) -> list[LaunchOrder]:
        names = dict.fromkeys(self._stand_ins(run))
        return [_judgement(run, name) for name in names if _is_to_be_judged(run, name)]

    def of_the_winner(self, run: Run) -> list[LaunchOrder]:
        """What would vet the winner if the run were decided now, the first to be carried out first."""
        decision = decide(run)
        if decision is None:
            return []
        winner = run.alias_of(decision.winner) or decision.winner
        orders = [_judgement(run, winner)] if _is_to_be_judged(run, winner) else []
        if run.entry(winner).reference is not None and winner not in run.canaries_sent:
            scene = fidelity.canary_scene(run)
            orders.append(_order(run, CANARY, "canary", Cell(candidate=winner, scenario=scene.key)))
        return orders


def _has_to_wait(run: Run, candidate_id: str, purpose: Purpose) -> bool:
    """Whether a candidate is judged before it takes part: in a block if it may lose output, in a run-off anyway."""
    lossy = run.entry(candidate_id).candidate.lossy
    return (purpose == "run_off" or (purpose == "timing" and lossy)) and _is_to_be_judged(run, candidate_id)


def _is_to_be_judged(run: Run, candidate_id: str) -> bool:
    pointless = run.header.shape.weights == "random" and fidelity.objection(run, candidate_id) is not None
    return fidelity.can_be_judged(run, candidate_id) and candidate_id not in run.fidelity_tried and not pointless


def _judgement(run: Run, candidate_id: str) -> LaunchOrder:
    return _order(run, FIDELITY, "fidelity", Cell(candidate=candidate_id, scenario=fidelity.scene(run).key))


def _order(run: Run, number: int, purpose: Literal["fidelity", "canary"], cell: Cell) -> LaunchOrder:
    return LaunchOrder(launch=len(run.launches), round=number, purpose=purpose, cells=(cell,))
