"""How long does it take to open a journal, check it and decide again?

    python benchmarks/journal_speed.py [--samples 10000] [--runs 5] [--out FILE]

Writes the journal of a run of 24 candidates in two scenarios, in rounds until there are as many timed calls
as asked for: 32 tokens each, with the time of every token and the conditions of every call. Nothing is
measured for it, the numbers are drawn; all else is as a real run leaves it. Then, in this one process, the
journal is read with every checksum, made a run, and decided, once by reading it and once by continuing it.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from _record import Bound, Record, at_least_one, option_parser
from pydantic import JsonValue

from kvat_core import Scenario
from kvat_core.journal import continue_journal, create_journal, journal_sha256, read_journal
from kvat_core.machine import read_machine
from kvat_core.planner import make_plan
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Candidate,
    CandidateEntry,
    Cell,
    Conditions,
    End,
    Event,
    Header,
    JournalRef,
    LaunchEnd,
    LaunchOrder,
    Loaded,
    Machine,
    Measured,
    ModelRef,
    ModelShape,
    Objective,
    Profile,
    Proof,
    RequestTiming,
    Resources,
    Sample,
    Target,
    digest,
)

MAX_MEDIAN_S = 1.0
CANDIDATES = 24
PER_LOAD = 4
"""Candidates that share a launch."""
SCENARIOS = (Scenario(prompt_tokens=256, output_tokens=32), Scenario(prompt_tokens=1024, output_tokens=32))
SAMPLES = 7
"""Timed calls per launch, candidate and scenario."""
LAYERS = 24
NOISE = 0.02
"""Standard deviation of the logarithm of a drawn time."""
REJECTED = 0.01
"""Share of the calls that something outside has disturbed."""


@dataclass(frozen=True)
class Seconds:
    """Where the time of one opening went."""

    read_s: float
    """Reading and checking every record."""
    run_s: float
    """Making them a run."""
    plan_s: float
    """Deciding, the digest of the file included."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.read_s + self.run_s + self.plan_s


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--samples", type=at_least_one, default=10_000, metavar="N")
    parser.add_argument("--runs", type=at_least_one, default=5, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    machine = read_machine("cpu", None)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "journal.jsonl"
        samples = write_journal(path, machine, options.samples)
        size_bytes = path.stat().st_size
        ways = {"read": read_only, "continue": read_to_go_on}
        seconds = [{way: open_once(path, read) for way, read in ways.items()} for _ in range(options.runs)]
    print(f"{samples} timed calls, {size_bytes / 1e6:.1f} MB")
    for way in ways:
        parts = [asdict(one[way]) for one in seconds]
        print(f"{way}: " + ", ".join(f"{part} {median(one[part] for one in parts):.3f}" for part in parts[0]))
    bounds = [
        Bound(
            f"seconds to {way} and decide, {samples} calls",
            median(one[way].total_s for one in seconds),
            "<=",
            MAX_MEDIAN_S,
        )
        for way in ways
    ]
    runs = [{way: asdict(one) for way, one in each.items()} for each in seconds]
    shape = {"candidates": CANDIDATES, "scenarios": [one.key for one in SCENARIOS], "samples": samples}
    return record.close(machine, bounds, {**shape, "journal_bytes": size_bytes, "runs": runs})


def open_once(path: Path, read: Callable[[Path], list[Event]]) -> Seconds:
    """Open a journal and decide."""
    started = time.perf_counter()
    events = read(path)
    read_s = time.perf_counter()
    run = Run.from_events(events)
    run_s = time.perf_counter()
    plan = make_plan(run, JournalRef(file=path.name, sha256=journal_sha256(path), samples=len(run.samples)))
    plan_s = time.perf_counter()
    assert plan.candidates[0].scenarios, "it has figures"
    return Seconds(read_s=read_s - started, run_s=run_s - read_s, plan_s=plan_s - run_s)


def read_only(path: Path) -> list[Event]:
    """As `kvat plan` and every end of a run."""
    return list(read_journal(path))


def read_to_go_on(path: Path) -> list[Event]:
    """As `kvat tune --resume`."""
    events, journal = continue_journal(path)
    with journal:
        return events


def write_journal(path: Path, machine: Machine, samples: int) -> int:
    """Write a journal with at least so many timed calls, and return how many it has."""
    rounds = math.ceil(samples / (CANDIDATES * len(SCENARIOS) * SAMPLES))
    with create_journal(path) as journal:
        for event in invented_run(machine, rounds):
            journal.append(event)
    return rounds * CANDIDATES * len(SCENARIOS) * SAMPLES


def invented_run(machine: Machine, rounds: int) -> Iterator[Event]:
    """The records of a whole run in their order."""
    rng = random.Random(0)
    yield invented_header(machine, rounds)
    names = [digest(number) for number in range(CANDIDATES)]
    for number, name in enumerate(names):
        settings = {"attention": f"kernel-{number % PER_LOAD}", "cache": f"cache-{number // PER_LOAD}"}
        label = " ".join(f"{knob}={value}" for knob, value in settings.items())
        candidate = Candidate(id=name, label=label, settings=settings, complexity=number)
        yield CandidateEntry(candidate=candidate, incumbent=number == 0)
    loads = [names[start : start + PER_LOAD] for start in range(0, CANDIDATES, PER_LOAD)]
    for launch, (round_number, together) in enumerate(product(range(rounds), loads)):
        yield from invented_launch(rng, launch, round_number, together)
    for more, name in enumerate(names[:2]):
        yield from invented_memory_launch(rng, rounds * len(loads) + more, rounds, name)
    yield End(wall_s=3600.0)


def invented_header(machine: Machine, rounds: int) -> Header:
    """The first record."""
    objective = Objective(ttft=0.5, decode=0.35, memory=0.1, stability=0.05)
    return Header(
        kvat="0.1.0",
        created="2026-01-01T00:00:00Z",
        engine="invented",
        versions={"engine": "1.0"},
        target=Target(model=ModelRef(id="builtin:invented"), device="cpu", threads=1),
        shape=ModelShape(architecture="invented", layers=LAYERS, attention=tuple("full" for _ in range(LAYERS))),
        machine=machine,
        profile=Profile(name="invented", scenarios=SCENARIOS, objective=objective, launches=rounds, samples=SAMPLES),
        space="full",
        pinned={},
        excluded=(),
        seed=0,
        probe_s=3.0,
        instrument=("a clock",),
    )


def invented_launch(rng: random.Random, launch: int, round_number: int, names: list[str]) -> Iterator[Event]:
    """A launch that times some candidates in all scenarios."""
    cells = tuple(Cell(candidate=name, scenario=scenario.key) for name in names for scenario in SCENARIOS)
    yield LaunchOrder(launch=launch, round=round_number, purpose="timing", cells=cells)
    yield Loaded(launch=launch, start_s=rng.uniform(3, 4), load_s=rng.uniform(0.1, 0.2))
    for cell in cells:
        layers: list[JsonValue] = [f"StaticLayer[{cell.scenario}] float32 cpu"] * LAYERS
        yield Proof(launch=launch, cell=cell, applied=Applied(values={"cache": cell.candidate, "layers": layers}))
    for cell, scenario in zip(cells, SCENARIOS * len(names), strict=True):
        for index in range(SAMPLES):
            yield invented_sample(rng, launch, round_number, cell, scenario, index)
        yield Measured(launch=launch, cells=(cell,), resources=invented_resources(rng))
    yield LaunchEnd(launch=launch, wall_s=rng.uniform(10, 12), generate_s=rng.uniform(5, 6))


def invented_memory_launch(rng: random.Random, launch: int, round_number: int, name: str) -> Iterator[Event]:
    """A launch that reads the peak memory of one candidate."""
    cell = Cell(candidate=name, scenario=SCENARIOS[-1].key)
    yield LaunchOrder(launch=launch, round=round_number, purpose="memory", cells=(cell,))
    yield Loaded(launch=launch, start_s=rng.uniform(3, 4), load_s=rng.uniform(0.1, 0.2))
    yield Measured(launch=launch, cells=(cell,), resources=invented_resources(rng))
    yield LaunchEnd(launch=launch, wall_s=rng.uniform(4, 5), generate_s=rng.uniform(0.5, 0.6))


def invented_resources(rng: random.Random) -> Resources:
    """What is read after the calls."""
    ready, cache = rng.randrange(300_000_000, 301_000_000), rng.randrange(1_000_000, 2_000_000)
    return Resources(
        processes=("worker",),
        peak_host_bytes=ready + 10 * cache,
        ready_host_bytes=ready,
        kv_cache_bytes=cache,
        kv_cache_predicted_bytes=cache,
    )


def invented_sample(
    rng: random.Random, launch: int, round_number: int, cell: Cell, scenario: Scenario, index: int
) -> Sample:
    """A timed call; its times have the digits that a clock of nanoseconds leaves."""
    pace_s = 0.001 + 0.00002 * int(cell.candidate[:2], 16)
    gaps_s = [0.02 * scenario.prompt_tokens / 256, *[pace_s] * (scenario.output_tokens - 1)]
    token_s = [round(time_s, 9) for time_s in accumulate(gap_s * rng.lognormvariate(0, NOISE) for gap_s in gaps_s)]
    request = RequestTiming(
        prompt_tokens=scenario.prompt_tokens,
        output_tokens=scenario.output_tokens,
        ttft_s=token_s[0],
        e2e_s=token_s[-1],
        token_gaps_s=tuple(later - earlier for earlier, later in pairwise(token_s)),
    )
    disturbed = rng.random() < REJECTED
    return Sample(
        clock="host",
        duration_s=token_s[-1] + 5e-5,
        requests=(request,),
        launch=launch,
        round=round_number,
        candidate=cell.candidate,
        scenario=cell.scenario,
        index=index,
        conditions=invented_conditions(rng, token_s[-1]),
        distrust=("the worker waited for a free core for 7% of its time",) if disturbed else (),
    )


def invented_conditions(rng: random.Random, duration_s: float) -> Conditions:
    """What the system told of a call."""
    return Conditions(
        window_s=duration_s + rng.uniform(0.0008, 0.0012),
        load_average=round(rng.uniform(0.9, 1.1), 2),
        steal_share=0.0,
        waiting_share=rng.uniform(0, 0.001),
        cpu_pressure=rng.uniform(0, 0.01),
        memory_pressure=0.0,
        io_pressure=rng.uniform(0, 0.001),
        major_faults=0,
    )


if __name__ == "__main__":
    sys.exit(main())
