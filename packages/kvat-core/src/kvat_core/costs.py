"""Pure: what a launch is going to take, by what the launches before it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from kvat_core.run import Run
from kvat_core.schema import Cell, Purpose


class Costs:
    """Seconds that launches took in a run: loading by load, and the rest by cell; trials of lengths apart.

    Args:
        run: the journal so far.
        load_keys: key of the load each cell needs.
    """

    def __init__(self, run: Run, load_keys: Mapping[Cell, str]) -> None:
        self._load_keys = load_keys
        wall_s = {end.launch: end.wall_s for end in run.ended}
        load_s = {one.launch: one.start_s + one.load_s for one in run.loaded}
        self._loads: dict[str, list[float]] = {}
        self._cells: dict[Cell, list[float]] = {}
        for order in run.launches:
            if order.purpose != "context" and order.launch in wall_s and order.launch in load_s:
                self._loads.setdefault(load_keys[order.cells[0]], []).append(load_s[order.launch])
                each_s = (wall_s[order.launch] - load_s[order.launch]) / len(order.cells)
                for cell in order.cells:
                    self._cells.setdefault(cell, []).append(each_s)

    def seconds(self, groups: Sequence[Sequence[Cell]]) -> float:
        """What launches of these cells will take; 0 for what nothing like it has been seen of."""
        return sum(self.load_s(self._load_keys[cells[0]]) + sum(map(self.cell_s, cells)) for cells in groups)

    def load_s(self, load_key: str) -> float:
        """Seconds until the model is loaded."""
        return _like(self._loads, load_key)

    def cell_s(self, cell: Cell) -> float:
        """Seconds for one cell in a launch, without loading."""
        return _like(self._cells, cell)


def spent_s(run: Run) -> float:
    """Wall time of the launches that have ended since the run was started or resumed."""
    return sum(end.wall_s for end in run.ended if end.launch >= run.resumed_at)


LOADS: dict[Purpose, int] = {"fidelity": 3, "canary": 2}
"""Times that a launch loads the model, where that is more than once: for candidate, reference and full precision, or as
many of these as are not known yet; for a request alone and for several."""


def loads(purpose: Purpose) -> int:
    """Times that a launch for a purpose loads the model."""
    return LOADS.get(purpose, 1)


def spent_launches(run: Run) -> int:
    """Loads of the model since the run was started or resumed."""
    return sum(loads(order.purpose) for order in run.launches if order.launch >= run.resumed_at)


_Key = TypeVar("_Key", str, Cell)


def _like(seen: Mapping[_Key, Sequence[float]], key: _Key) -> float:
    if key in seen:
        return fmean(seen[key])
    every = [value for values in seen.values() for value in values]
    return fmean(every) if every else 0.0
