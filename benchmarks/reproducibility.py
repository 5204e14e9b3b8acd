"""Do two runs of the same command choose the same? And is most of their time spent on the model?

    python benchmarks/reproducibility.py [--pairs 10] [--out FILE]

Two runs agree when their winners are the same, or when each names the other's winner, or an alias
of it, among its equivalents. Shares are parts of the wall time of the whole command.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from _record import Bound, Record, at_least_one, option_parser, tune

from kvat_core import Plan, read_plan
from kvat_core.journal import read_journal
from kvat_core.outputs import JOURNAL, PLAN
from kvat_core.run import Run

COMMAND = ("--engine", "transformers", "--model", "builtin:llama", "--profile", "ci-micro")
MIN_AGREEING = 0.9
MIN_SHARE = 0.70


@dataclass(frozen=True)
class Times:
    """Where a run spent its time."""

    wall_s: float
    """The whole command."""
    run_s: float
    """By the journal's last record."""
    importing_s: float
    """The probing child, and spawning workers until their libraries are imported."""
    loading_s: float
    """`load_model` alone."""
    generating_s: float

    @property
    def share(self) -> float:
        """Importing, loading and generating, relative to the whole command."""
        return (self.importing_s + self.loading_s + self.generating_s) / self.wall_s


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--pairs", type=at_least_one, default=10, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    plans, times = zip(*[run_once() for _ in range(2 * options.pairs)], strict=True)
    agreeing = [agreement(*pair) for pair in zip(plans[::2], plans[1::2], strict=True)]
    summary = {way: sum(pair[way] for pair in agreeing) for way in agreeing[0]}
    print(f"{options.pairs} pairs: " + ", ".join(f"{way.replace('_', ' ')} {count}" for way, count in summary.items()))
    print(f"wall seconds: median {median(one.wall_s for one in times):.1f}, max {max(one.wall_s for one in times):.1f}")
    bounds = [
        Bound("share of pairs that agree", summary["agree"] / options.pairs, ">=", MIN_AGREEING),
        Bound("median share of importing, loading, generating", median(t.share for t in times), ">=", MIN_SHARE),
    ]
    runs = [{**outcome(plan), **asdict(spent), "share": spent.share} for plan, spent in zip(plans, times, strict=True)]
    return record.close(plans[0].machine, bounds, {"tune": COMMAND, "runs": runs, "pairs": agreeing})


def run_once() -> tuple[Plan, Times]:
    """One run of the command, and nothing of it left on disk."""
    with TemporaryDirectory() as parent:
        out = Path(parent) / "out"
        wall_s = tune(out, *COMMAND)
        run = Run.from_events(read_journal(out / JOURNAL))
        return read_plan(out / PLAN), read_times(run, wall_s)


def read_times(run: Run, wall_s: float) -> Times:
    """What the journal tells of the time."""
    assert run.end is not None, "kvat tune has returned"
    return Times(
        wall_s=wall_s,
        run_s=run.end.wall_s,
        importing_s=run.header.probe_s + sum(loaded.start_s for loaded in run.loaded),
        loading_s=sum(loaded.load_s for loaded in run.loaded),
        generating_s=sum(ended.generate_s for ended in run.ended),
    )


def agreement(first: Plan, second: Plan) -> dict[str, bool]:
    """In which ways two plans say the same."""
    same = first.winner.id == second.winner.id
    both_named = first.winner.id in as_good(second) and second.winner.id in as_good(first)
    return {"agree": same or both_named, "same_winner": same}


def as_good(plan: Plan) -> set[str]:
    """The winner, its equivalents and the aliases of each."""
    ids = {plan.winner.id, *plan.equivalents}
    families = [{candidate.id, *candidate.aliases} for candidate in plan.candidates]
    return ids.union(*(family for family in families if family & ids))


def outcome(plan: Plan) -> dict[str, object]:
    """What a run decided."""
    return {
        "winner": plan.winner.model_dump(exclude={"settings"}),
        "verdict": plan.verdict,
        "equivalents": plan.equivalents,
        "as_good": sorted(as_good(plan)),
        "score": plan.ratio and plan.ratio.score.model_dump(),
        "confidence": plan.confidence.model_dump(),
        "labels": {candidate.id: candidate.label for candidate in plan.candidates if candidate.state == "ok"},
    }


if __name__ == "__main__":
    sys.exit(main())
