"""What all benchmarks share: running `kvat`, bounds, and a result that names its machine, versions and command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from kvat_core import outputs
from kvat_core.noise import standing_findings
from kvat_core.schema import Machine

DISTRIBUTIONS = (
    *("kvat-core", "kvat-engine-transformers", "kvat-report", "kvat-cli"),
    *("torch", "transformers", "numpy", "scipy", "pydantic", "typer"),
)
NOT_MEASURED = 2
"""Exit code where no figure came about; 1 is a broken bound."""


def option_parser(description: str | None) -> ArgumentParser:
    """A parser with the option that all benchmarks have."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    return parser


def add_random_trials(parser: ArgumentParser) -> None:
    """The options of a benchmark that tries random faults, several at once, since it measures no time."""
    parser.add_argument("--jobs", type=at_least_one, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def at_least_one(text: str) -> int:
    """Type of an option that counts runs."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError("must be at least 1")
    return number


@dataclass(frozen=True)
class Bound:
    """A value that has to stay on one side of a limit."""

    name: str
    value: float
    relation: Literal["<=", ">="]
    limit: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit


class Record:
    """A benchmark from its start to its result."""

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        # Before the benchmark itself makes the machine busy.
        self._noise = standing_findings()

    def close(self, where: Machine, bounds: Sequence[Bound], values: dict[str, Any]) -> int:
        """Write and print the result.

        Args:
            where: the machine that the values belong to.
            bounds: what must hold.
            values: raw values, JSON, with units in their keys.

        Returns:
            The exit code: 0, or 1 when a bound is broken.
        """
        result = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": _command(self._options),
            "date": self._date,
            "machine": where.model_dump(mode="json"),
            "noise": self._noise,
            "versions": {name: version(name) for name in DISTRIBUTIONS},
            "bounds": [{**vars(bound), "holds": bound.holds} for bound in bounds],
            "values": values,
        }
        if self._options.out is not None:
            _write(self._options.out, json.dumps(result, indent=1) + "\n")
        for finding in self._noise:
            print(f"noise at the start: {finding}")
        for bound in bounds:
            state = "holds " if bound.holds else "BROKEN"
            print(f"{state}  {bound.name}: {bound.value:.4g} {bound.relation} {bound.limit}")
        return 0 if all(bound.holds for bound in bounds) else 1


def kvat_command(*arguments: str) -> list[str]:
    """The command line of `kvat` in this environment."""
    return [sys.executable, "-m", "kvat_cli", *arguments]


def tune(out: Path, *arguments: str) -> float:
    """Run `kvat tune` into a directory and return its wall seconds; without a plan the benchmark ends."""
    started = time.perf_counter()
    run(kvat_command("tune", *arguments, "--quiet", "--out", str(out)))
    wall_s = time.perf_counter() - started
    print(f"kvat tune {shlex.join(arguments)}: {wall_s:.1f} s", flush=True)
    return wall_s


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program; if it fails the benchmark ends."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"exit code {done.returncode} of {shlex.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return done


def _command(options: Namespace) -> str:
    """The command with all its options, of local paths only the last part."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for name, value in vars(options).items():
        if value is not None:
            shown = map(_shown, value) if isinstance(value, list) else [_shown(value)]
            words += [f"--{name.replace('_', '-')}", *shown]
    return shlex.join(words)


def _shown(value: Any) -> str:
    return value.name if isinstance(value, Path) else str(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs.write_files(path.parent, {path.name: text})
