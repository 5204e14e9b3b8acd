"""How long do the commands take that measure nothing?

    python benchmarks/startup.py [--runs 15] [--out FILE]

Runs the commands in turns, one round after the other, and takes the median of each. Another
round, without a clock, looks which modules they import.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from _record import Bound, Record, at_least_one, kvat_command, option_parser, run, tune

from kvat_core.machine import read_machine
from kvat_core.outputs import PLAN

MAX_MEDIAN_S = 0.4
UNWANTED = ("torch", "transformers")


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=at_least_one, default=15, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    with TemporaryDirectory() as parent:
        out = Path(parent) / "out"
        tune(out, "--engine", "transformers", "--model", "builtin:llama", "--profile", "ci-micro")
        commands = named_commands(out / PLAN)
        unwanted = {name: unwanted_imports(arguments) for name, arguments in commands.items()}  # and warms up
        rounds = [{name: seconds(arguments) for name, arguments in commands.items()} for _ in range(options.runs)]
    medians_s = {name: median(one[name] for one in rounds) for name in commands}
    for name, median_s in medians_s.items():
        imported = f"; imports {', '.join(unwanted[name])}" if unwanted[name] else ""
        print(f"{name}: median {median_s:.3f} s{imported}")
    bounds = [
        *(Bound(f"seconds of {name}", median_s, "<=", MAX_MEDIAN_S) for name, median_s in medians_s.items()),
        Bound("commands that import torch or transformers", sum(map(bool, unwanted.values())), "<=", 0),
    ]
    values = {"rounds_s": rounds, "medians_s": medians_s, "unwanted_imports": unwanted}
    return record.close(read_machine("cpu", None), bounds, values)


def named_commands(plan: Path) -> dict[str, tuple[str, ...]]:
    """Arguments of each command by the name to show."""
    return {
        "kvat --help": ("--help",),
        "kvat apply --help": ("apply", "--help"),
        "kvat apply --plan PLAN --print-snippet": ("apply", "--plan", str(plan), "--print-snippet"),
        "kvat profiles": ("profiles",),
    }


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall seconds of one run, from spawning to its end."""
    command = kvat_command(*arguments)
    started = time.perf_counter()
    run(command)
    return time.perf_counter() - started


def unwanted_imports(arguments: tuple[str, ...]) -> list[str]:
    """Which of the unwanted packages the command imports."""
    python, *rest = kvat_command(*arguments)
    lines = run([python, "-X", "importtime", *rest]).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "kvat_cli" in imported, "the list of imports is read wrongly"
    return [name for name in UNWANTED if name in imported]


if __name__ == "__main__":
    sys.exit(main())
