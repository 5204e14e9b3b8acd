"""Recorded tables: journals of grids, each candidate measured in several blocks, and worlds resampled from them."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from worlds import Call, Launch, Shown, World

from kvat_core import metrics, scoring
from kvat_core.costs import Costs
from kvat_core.journal import read_journal
from kvat_core.run import Run
from kvat_core.schema import Cell

TABLES = Path(__file__).parent / "tables"


def write_table(journal: Path, table: Path) -> None:
    """Make a table of the journal of a complete grid with one scenario; aliases and what failed are left out."""
    run = Run.from_events(read_journal(journal))
    (scenario,) = run.scenarios
    names = [name for name in run.live if run.alias_of(name) is None]
    cells = {name: Cell(candidate=name, scenario=scenario) for name in names}
    shared = _loads(run)
    costs = Costs(run, {cell: shared[cell.candidate] for order in run.launches for cell in order.cells})
    rows = {}
    for name in names:
        blocks = {number: run.samples_of(cells[name])[number] for number in scoring.complete_rounds(run, name)}
        rows[name] = {
            "settings": run.entry(name).candidate.settings,
            "complexity": run.entry(name).candidate.complexity,
            "load": shared[name],
            "cell_s": round(costs.cell_s(cells[name]), 3),
            "call_s": round(median(one.duration_s for calls in blocks.values() for one in calls), 4),
            "calls": [[[metrics.ttft_s(one), metrics.decode_tps(one)] for one in calls] for calls in blocks.values()],
        }
    table.write_text(
        json.dumps(
            {
                "what": f"{run.header.target.model.id}, space {run.header.space}, {scenario}",
                "machine": run.header.machine.model_dump(mode="json"),
                "versions": run.header.versions,
                "incumbent": run.incumbent,
                "load_s": {load: round(costs.load_s(load), 3) for load in sorted(set(shared.values()))},
                "candidates": rows,
            },
            indent=None,
            separators=(",", ":"),
        )
        + "\n"
    )


def _loads(run: Run) -> dict[str, str]:
    """Candidate → name of the load it needs: those that ever shared a launch need the same."""
    named: dict[str, str] = {}
    for order in run.launches:
        if order.purpose != "memory":
            known = next((named[cell.candidate] for cell in order.cells if cell.candidate in named), None)
            for cell in order.cells:
                named[cell.candidate] = known or f"load{order.launch}"
    return named


@dataclass
class Table:
    """A recorded table, taken apart: level of each candidate, of each block, and what is left of each launch."""

    name: str
    data: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows: dict[str, Any] = self.data["candidates"]
        self.blocks = min(len(row["calls"]) for row in self.rows.values())
        logs = {
            name: [median(_score(call) for call in calls) for calls in row["calls"][: self.blocks]]
            for name, row in self.rows.items()
        }
        self.truth = {name: fmean(values) for name, values in logs.items()}
        self.effects = [
            fmean(values[block] - self.truth[name] for name, values in logs.items()) for block in range(self.blocks)
        ]


def _score(call: list[float]) -> float:
    ttft_s, decode_tps = call
    return 0.5 * math.log(decode_tps) - 0.5 * math.log(ttft_s)


class Recorded(World):
    """A world resampled from a table.

    A launch shows its candidates' levels, the effect of some recorded block, the same for all launches of a block, and
    what was left over in some recorded block, the same for all candidates of a launch: so noise that candidates of a
    launch share stays shared.
    """

    def __init__(self, table: Table, seed: int) -> None:
        self._table = table
        self._seed = seed
        self._source = random.Random(f"recorded/{table.name}/{seed}")
        self.incumbent = table.data["incumbent"]
        self.truth = table.truth
        self.load_keys = {name: row["load"] for name, row in table.rows.items()}
        self.settings = {name: row["settings"] for name, row in table.rows.items()}
        self.failing: frozenset[str] = frozenset()

    def launch(self, block: int, candidates: list[str], samples: int) -> Launch:
        """See `World.launch`."""
        table = self._table
        effect = table.effects[random.Random(f"{self._seed}/{block}").randrange(table.blocks)]
        seen = self._source.randrange(table.blocks)
        shift = effect - table.effects[seen]
        shown, rest_s = [], 0.0
        for name in candidates:
            row = table.rows[name]
            calls = row["calls"][seen]
            drawn = [calls[index % len(calls)] for index in range(self._source.randrange(3), 99)][:samples]
            shown.append(Shown(name, tuple(Call(ttft / math.exp(shift), tps * math.exp(shift)) for ttft, tps in drawn)))
            rest_s += row["cell_s"] + (samples - len(calls)) * row["call_s"]
        return Launch(tuple(shown), table.data["load_s"][self.load_keys[candidates[0]]], rest_s)

    def memory_s(self, candidate: str) -> float:
        """See `World.memory_s`: a load, and what is not a timed call."""
        row = self._table.rows[candidate]
        load_s: float = self._table.data["load_s"][row["load"]]
        return load_s + max(row["call_s"], row["cell_s"] - len(row["calls"][0]) * row["call_s"])


def read_table(name: str) -> Table:
    """A table of `tables/`."""
    return Table(name, json.loads((TABLES / f"{name}.json").read_text()))


def main() -> None:
    """Make a table of a journal: `python benchmarks/replay/recorded.py JOURNAL NAME`."""
    journal, name = sys.argv[1:]
    TABLES.mkdir(exist_ok=True)
    write_table(Path(journal), TABLES / f"{name}.json")


if __name__ == "__main__":
    main()
