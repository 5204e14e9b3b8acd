"""What does `kill -9`, at any moment, cost a run?

    python benchmarks/kill_nine.py [--kills 200] [--jobs 2] [--seed 0] [--out FILE]

Runs `kvat tune` again and again and kills it at random moments: the command itself, up to three
times in a run, after which it is resumed; or its worker, after which the run goes on by itself.
Every record that was whole in the journal right before a kill has to be there ever after, no
worker may be left, and the plan has to be that of a run that nobody killed. After a worker was
killed the error rate of a winner may differ, the peak memory of a candidate may be unknown, if
it was theirs, and a note may tell of the kill. Where the machine was so busy that calls were
rejected, only winner, verdict and states are compared, and that is counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
from _record import Bound, Record, add_random_trials, at_least_one, kvat_command, option_parser, tune

from kvat_core import Plan, read_plan
from kvat_core.errors import UsageError
from kvat_core.journal import read_journal
from kvat_core.machine import read_machine
from kvat_core.measure.child import MARK
from kvat_core.outputs import JOURNAL, PLAN
from kvat_core.run import Run

ARGUMENTS = ("--engine", "fake", "--model", "fake:tiny", "--profile", "ci-micro")
NAME = "KVAT_BENCHMARK_RUN"
"""Variable by which the processes of one run are told from all others."""
MAX_KILLS = 3
"""Of one run."""
GONE_S = 10.0
"""In which a worker has to be gone after its parent was killed."""
LIMIT_S = 120.0
"""In which a run has to end."""
KILLED = "crash, ended by SIGKILL"
"""What a note says of a worker that was killed after its work, or before its peak was read."""
PEAKS = ("peak_device_bytes", "peak_host_bytes", "ready_host_bytes", "kv_cache_bytes", "kv_cache_predicted_bytes")

Target = Literal["command", "worker"]
Process = subprocess.Popen[bytes]


class Violation(Exception):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Kill:
    """One that has struck."""

    target: Target
    after_s: float
    records: int
    """In the journal right before."""


@dataclass
class Tuned:
    """A run from its start to its plan, with all that befell it."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    workers_gone_s: list[float] = field(default_factory=list)
    started_anew: int = 0
    """Because it was killed before there was anything to resume."""
    disturbed: bool = False
    violation: str | None = None


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--kills", type=at_least_one, default=200, metavar="N")
    add_random_trials(parser)
    options = parser.parse_args()
    record = Record(options)
    started = time.perf_counter()
    with TemporaryDirectory() as parent:
        whole_s = tune(Path(parent) / "whole", *ARGUMENTS)
        plan = read_plan(Path(parent) / "whole" / PLAN)
        with ThreadPoolExecutor(options.jobs) as pool:
            running = [
                pool.submit(Killer(Path(parent), plan, whole_s, options.seed, number).run, targets)
                for number, targets in enumerate(deal(options.kills, options.seed))
            ]
            runs = [one.result() for one in running]
    kills = [kill for run in runs for kill in run.kills]
    violations = [run for run in runs if run.violation is not None]
    for run in violations:
        print(f"run {run.number}, {run.kills}: {run.violation}")
    gone_s = [seconds for run in runs for seconds in run.workers_gone_s]
    values = {
        "runs": len(runs),
        "kills": dict(Counter(kill.target for kill in kills)),
        "kills_before_the_first_record": sum(kill.records == 0 for kill in kills),
        "runs_started_anew": sum(run.started_anew > 0 for run in runs),
        "runs_in_which_calls_were_rejected": sum(run.disturbed for run in runs),
        "worker_outlives_its_parent_max_s": max(gone_s, default=None),
        "uninterrupted_run_s": whole_s,
        "each": [{**vars(run), "kills": [vars(kill) for kill in run.kills]} for run in runs],
        "wall_s": time.perf_counter() - started,
    }
    print(json.dumps({name: value for name, value in values.items() if name != "each"}, indent=1))
    bounds = [
        Bound("kills", len(kills), ">=", options.kills),
        Bound(f"runs of {len(runs)} in which a promise was broken", len(violations), "<=", 0),
    ]
    return record.close(read_machine("cpu", None), bounds, values)


def deal(kills: int, seed: int) -> Iterator[tuple[Target, ...]]:
    """The kills of each run: after a worker's the run goes on by itself, so that one is the last."""
    chance = random.Random(seed)
    while kills > 0:
        count = min(kills, chance.randint(1, MAX_KILLS))
        before: list[Target] = ["command"] * (count - 1)
        last: Target = chance.choice(("command", "worker"))
        yield (*before, last)
        kills -= count


class Killer:
    """Carries out one run.

    Args:
        parent: directory for all runs.
        plan: that of a run that nobody killed.
        whole_s: what that took.
        seed: of all runs.
        number: of this run.
    """

    def __init__(self, parent: Path, plan: Plan, whole_s: float, seed: int, number: int) -> None:
        self._plan = plan
        self._whole_s = whole_s
        self._chance = random.Random(f"{seed}/{number}")
        self._directory = parent / str(number)
        self._out = self._directory / "out"
        self._journal = self._out / JOURNAL
        self._errors = self._directory / "errors"
        self._name = secrets.token_hex(8)
        self._tuned = Tuned(number)
        self._kept = b""
        """Records that have been seen whole."""

    def run(self, targets: Sequence[Target]) -> Tuned:
        """Tune, be killed, and go on until there is a plan."""
        (self._directory / "tmp").mkdir(parents=True)
        try:
            for target in targets:
                self._until_killed(target)
            self._finish()
            self._compare()
        except Violation as violation:
            self._tuned.violation = str(violation)
        return self._tuned

    def _until_killed(self, target: Target) -> None:
        """Start or resume until a kill has struck; a run that is faster than it is resumed once more."""
        within_s = self._whole_s
        while not self._strikes(target, self._start(), self._chance.uniform(0, within_s)):
            within_s *= 0.7
        self._is_kept()

    def _strikes(self, target: Target, process: Process, after_s: float) -> bool:
        """Kill after some seconds; whether there was anything to kill."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        victim = next(self._victims(target, process), None)
        if victim is None:
            self._ended_well(process)
            return False
        self._kept = whole_lines(self._journal)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        self._tuned.kills.append(Kill(target, after_s, self._kept.count(b"\n")))
        if target == "command":
            process.wait()
            self._no_worker_is_left()
        else:
            self._survived(process)
        return True

    def _victims(self, target: Target, process: Process) -> Iterator[psutil.Process]:
        """The command, or its workers one after the other, until it has ended."""
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                command = psutil.Process(process.pid)
                found = [command] if target == "command" else command.children()
                yield from (one for one in found if one.status() != psutil.STATUS_ZOMBIE)
            time.sleep(0.001)

    def _survived(self, process: Process) -> None:
        """A command whose worker was killed goes on; only while it looks at the machine it says that it cannot."""
        code, errors = self._end(process)
        if code == UsageError.exit_code and "cannot look at this machine and model" in errors:
            if whole_lines(self._journal) != self._kept:
                raise Violation("refused, but the journal was changed")
        elif code != 0:
            raise Violation(f"exit code {code} after its worker was killed: {errors}")

    def _finish(self) -> None:
        """Go on until the end, or write the plan of a finished run once more."""
        self._ended_well(self._start())
        self._is_kept()

    def _start(self) -> Process:
        """The command, resuming what is there."""
        if not self._out.exists() or not any(self._out.iterdir()):
            return self._spawn()
        if whole_lines(self._journal):
            return self._spawn("--resume")
        # Killed before the first record: the command says that there is nothing to resume.
        code, errors = self._end(self._spawn("--resume"))
        if code != UsageError.exit_code or errors.count("\n") != 1:
            raise Violation(f"exit code {code} without a journal: {errors}")
        self._tuned.started_anew += 1
        return self._spawn("--force")

    def _spawn(self, *options: str) -> Process:
        environment = {**os.environ, NAME: self._name, "TMPDIR": str(self._directory / "tmp")}
        command = kvat_command("tune", *ARGUMENTS, "--quiet", "--out", str(self._out), *options)
        with self._errors.open("w") as errors:
            return subprocess.Popen(command, stderr=errors, env=environment)

    def _ended_well(self, process: Process) -> None:
        code, errors = self._end(process)
        if code != 0:
            raise Violation(f"exit code {code}: {errors}")

    def _end(self, process: Process) -> tuple[int, str]:
        """Exit code and standard error of a command that may take its time."""
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Violation(f"it does not end in {LIMIT_S:g} s") from None
        self._no_worker_is_left()
        return code, self._errors.read_text()

    def _is_kept(self) -> None:
        if not whole_lines(self._journal).startswith(self._kept):
            raise Violation("a record was lost")

    def _no_worker_is_left(self) -> None:
        started = time.perf_counter()
        while left := workers(self._name):
            if time.perf_counter() - started > GONE_S:
                raise Violation(f"{len(left)} workers are left")
            time.sleep(0.005)
        self._tuned.workers_gone_s.append(time.perf_counter() - started)

    def _compare(self) -> None:
        """The plan has to be that of a run that nobody killed."""
        run = Run.from_events(read_journal(self._journal))
        self._tuned.disturbed = any(sample.distrust for sample in run.samples)
        was_killed = any(kill.target == "worker" for kill in self._tuned.kills)
        mine, right = (comparable(read_plan(self._out / PLAN)), comparable(self._plan))
        if was_killed:
            mine["metrics"]["error_rate"] = right["metrics"]["error_rate"] = None
            fill_in_unknown_peaks(mine, right)
            mine["notes"] = [note for note in mine["notes"] if KILLED not in note]
        if self._tuned.disturbed:
            mine, right = outline(mine), outline(right)
        if differing := [name for name in right if mine[name] != right[name]]:
            raise Violation(f"another plan: {', '.join(differing)}")


def whole_lines(path: Path) -> bytes:
    """What a file has up to its last line end."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def workers(name: str) -> list[int]:
    """Ids of the living workers of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            ours = f"{NAME}={name}".encode() in variables
            if ours and any(variable.startswith(f"{MARK}=".encode()) for variable in variables):
                found.append(int(process.name))
    return found


def comparable(plan: Plan) -> dict[str, Any]:
    """The plan without its evidence."""
    found: dict[str, Any] = json.loads(plan.model_dump_json(exclude={"journal", "created"}))
    return found


def outline(plan: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the machine's noise."""
    states = {candidate["label"]: candidate["state"] for candidate in plan["candidates"]}
    return {"winner": plan["winner"], "verdict": plan["verdict"], "states": states}


def fill_in_unknown_peaks(mine: dict[str, Any], right: dict[str, Any]) -> None:
    """Take from the right plan what is not known in mine."""
    for candidate, other in zip(mine["candidates"], right["candidates"], strict=True):
        for scenario, known in zip(candidate["scenarios"], other["scenarios"], strict=True):
            scenario.update({name: known[name] for name in PEAKS if scenario[name] is None})


if __name__ == "__main__":
    sys.exit(main())
