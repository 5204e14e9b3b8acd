"""Whatever happens to a journal, is a run resumed to the same plan or refused?

    python benchmarks/journal_faults.py [--every 1] [--jobs 2] [--seed 0] [--out FILE]

Takes the journal of a small complete run. For every offset in it, one copy is cut there and in
another one the byte there is changed to a random other one; then both are resumed. Right is the
plan of the complete run, or a refusal in one line that leaves the journal as it was. Anything
else is a violation. With --every N only one offset in N is tried.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal

from _record import Bound, Record, add_random_trials, at_least_one, option_parser
from pydantic import JsonValue
from typing_extensions import Self

from kvat_core import Profile, TuneRequest, TuneResult, tune
from kvat_core.errors import JournalDamaged, KvatError
from kvat_core.machine import read_machine
from kvat_core.measure.conditions import End
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.messages import Operation, Reply, Request
from kvat_core.measure.supervisor import value_or_raise
from kvat_core.measure.worker import Worker
from kvat_core.outputs import JOURNAL
from kvat_core.schema import Conditions, Objective, Scenario

PROFILE = Profile(
    name="faults",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3),),
    objective=Objective(ttft=0.5, decode=0.5),
    launches=2,
    samples=1,
)
REQUEST: dict[str, Any] = {
    # One of the four candidates fails, so that this kind of record is there, too.
    "model": "fake:oom",
    "profile": PROFILE,
    "excluded": (("kernel", "flash"), ("cache", "paged")),
}
SHOWN = 20
"""Violations that a result describes; all are counted."""

Fault = Literal["cut", "flip"]


@dataclass(frozen=True)
class Case:
    """A fault at an offset, and the journal that it makes."""

    fault: Fault
    offset: int
    journal: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    fault: Fault
    offset: int
    kind: str
    """"same plan", "refused: <type>", or "violation: <what>"."""


class InProcessWorker:
    """The worker's own code in this process, because a process per launch would take hours."""

    pid = None

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._worker = Worker()

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, limits: Limits) -> JsonValue:
        reply = self._worker.handle(Request(operation=operation, arguments=arguments))
        return value_or_raise(Reply.model_validate_json(reply.model_dump_json()), phase)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--every", type=at_least_one, default=1, metavar="N")
    add_random_trials(parser)
    options = parser.parse_args()
    record = Record(options)
    started = time.perf_counter()
    with TemporaryDirectory() as parent:
        whole = Path(parent) / "whole"
        plan = decided(run(whole))
        journal = (whole / JOURNAL).read_bytes()
        with ProcessPoolExecutor(options.jobs) as pool:
            check_one = partial(check, Path(parent), plan)
            outcomes = [*pool.map(check_one, cases(journal, options.every, options.seed), chunksize=16)]
    counts = Counter((outcome.fault, outcome.kind) for outcome in outcomes)
    for (fault, kind), count in sorted(counts.items()):
        print(f"{count:6} × {fault}: {kind}")
    violations = [outcome for outcome in outcomes if outcome.kind.startswith("violation")]
    values = {
        "journal_bytes": len(journal),
        "records": journal.count(b"\n"),
        "cases": len(outcomes),
        "outcomes": tally(outcomes),
        "violations": [vars(violation) for violation in violations[:SHOWN]],
        "wall_s": time.perf_counter() - started,
    }
    bounds = [Bound(f"violations in {len(outcomes)} cases", len(violations), "<=", 0)]
    return record.close(read_machine("cpu", None), bounds, values)


def cases(journal: bytes, every: int, seed: int) -> Iterator[Case]:
    """A cut before, and a change of, one byte in `every`; and no fault at all."""
    chance = random.Random(seed)
    for offset in range(0, len(journal), every):
        other = chance.choice([byte for byte in range(256) if byte != journal[offset]])
        yield Case("cut", offset, journal[:offset])
        yield Case("flip", offset, journal[:offset] + bytes([other]) + journal[offset + 1 :])
    yield Case("cut", len(journal), journal)


def check(parent: Path, plan: dict[str, Any], case: Case) -> Outcome:
    """Resume a case in a directory of its own."""
    with TemporaryDirectory(dir=parent) as directory:
        out = Path(directory) / "out"
        out.mkdir()
        (out / JOURNAL).write_bytes(case.journal)
        return Outcome(case.fault, case.offset, resumed(out, plan, case))


def resumed(out: Path, plan: dict[str, Any], case: Case) -> str:
    """What becomes of the run in `out`."""
    try:
        result = run(out, resume=True)
    except KvatError as error:
        return refusal(out, case, error)
    except Exception as error:  # which is what this looks for
        return f"violation: {type(error).__name__}: {error}"
    if decided(result) != plan:
        return "violation: another plan"
    if lost(out, case.journal):
        return "violation: a record was lost"
    return "same plan"


def refusal(out: Path, case: Case, error: KvatError) -> str:
    """Whether it is a clear one: a line of text that names a damaged line, and nothing else has happened."""
    if "\n" in str(error):
        return "violation: a refusal of several lines"
    number = case.journal[: case.offset].count(b"\n") + 1
    if isinstance(error, JournalDamaged) and f"line {number} is damaged" not in str(error):
        return "violation: refused with another line"
    if {path.name: path.read_bytes() for path in out.iterdir()} != {JOURNAL: case.journal}:
        return "violation: refused, but changed"
    return f"refused: {type(error).__name__}"


def lost(out: Path, journal: bytes) -> bool:
    """Whether the whole lines are not where they were, or what followed them is nowhere."""
    whole = journal.rfind(b"\n") + 1
    torn = out / f"{JOURNAL}.torn"
    kept = torn.read_bytes() if torn.exists() else b""
    return not (out / JOURNAL).read_bytes().startswith(journal[:whole]) or kept != journal[whole:]


def run(out: Path, **changes: Any) -> TuneResult:
    """Tune by the public door."""
    return tune(TuneRequest(out=out, **REQUEST, **changes), open_worker=InProcessWorker, watch=calm)


def calm(pid: int | None) -> End:
    """A machine that disturbs nothing."""
    return lambda: Conditions(window_s=0.0)


def decided(result: TuneResult) -> dict[str, Any]:
    """The plan without its evidence."""
    found: dict[str, Any] = json.loads(result.plan.model_dump_json(exclude={"journal", "created"}))
    return found


def tally(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """Counts by fault and kind."""
    counts: dict[str, Counter[str]] = {"cut": Counter(), "flip": Counter()}
    for outcome in outcomes:
        counts[outcome.fault][outcome.kind] += 1
    return {fault: dict(sorted(kinds.items())) for fault, kinds in counts.items()}


if __name__ == "__main__":
    sys.exit(main())
