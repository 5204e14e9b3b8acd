"""Runs made of numbers, workers without processes, and a command that can be stopped at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from pydantic import JsonValue
from typing_extensions import Self

from kvat_core import Profile, Progress, TuneRequest, TuneResult, tune
from kvat_core.errors import Interrupted
from kvat_core.journal import read_journal
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.interrupt import Stop
from kvat_core.measure.messages import Operation, Reply, Request
from kvat_core.measure.supervisor import value_or_raise
from kvat_core.measure.worker import Worker
from kvat_core.run import Run
from kvat_core.schema import (
    Applied,
    Candidate,
    CandidateEntry,
    Cell,
    Conditions,
    Event,
    Failed,
    Failure,
    Header,
    LaunchEnd,
    LaunchOrder,
    Machine,
    Measured,
    ModelRef,
    ModelShape,
    Objective,
    Proof,
    RequestTiming,
    Resources,
    Sample,
    Scenario,
    Target,
)


@pytest.fixture(autouse=True, scope="session")
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of prompts take a key of the tests' own, ceilings a cache of theirs; no home folder is written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class InProcessWorker:
    """The worker's own code in this process; JSON crosses as it does over the pipe."""

    pid = None

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._worker = Worker()

    def call(self, operation: Operation, arguments: dict[str, JsonValue], phase: str, limits: Limits) -> JsonValue:
        crossed = Request.model_validate_json(Request(operation=operation, arguments=arguments).model_dump_json())
        reply = Reply.model_validate(json.loads(self._worker.handle(crossed).model_dump_json()))
        return value_or_raise(reply, phase)

    def __enter__(self) -> Self:
        self._before = dict(os.environ)
        os.environ.update(self._environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ.clear()
        os.environ.update(self._before)


SCENARIO = Scenario(prompt_tokens=8, output_tokens=3)


def header(**changes: object) -> Header:
    machine = {
        "fingerprint": "f",
        "device": "cpu",
        "cpu": "c",
        "cores": 2,
        "memory_bytes": 1000,
        "os": "o",
        "python": "3",
    }
    fields: dict[str, object] = {
        "kvat": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "engine": "fake",
        "versions": {},
        "target": Target(model=ModelRef(id="fake:tiny"), device="cpu"),
        "shape": ModelShape(architecture="fake", layers=1, attention=("full",)),
        "machine": Machine.model_validate(machine),
        "profile": Profile(
            name="test", scenarios=(SCENARIO,), objective=Objective(ttft=0.5, decode=0.5), launches=3, samples=1
        ),
        "space": "safe",
        "pinned": {},
        "excluded": (),
        "seed": 0,
        "probe_s": 0.0,
        "instrument": (),
    }
    return Header.model_validate({**fields, **changes})


def sample(candidate: str, block: int, pace: float, *, launch: int = 0, index: int = 0) -> Sample:
    """A call of `pace` seconds to the first token and as much for each further one."""
    request = RequestTiming(prompt_tokens=8, output_tokens=3, ttft_s=pace, e2e_s=3 * pace, token_gaps_s=(pace, pace))
    return Sample(
        clock="host",
        duration_s=3 * pace,
        requests=(request,),
        launch=launch,
        round=block,
        candidate=candidate,
        scenario=SCENARIO.key,
        index=index,
    )


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run() -> MakeRun:
    """A run from paces: candidate name → seconds per block. The first candidate is the incumbent.

    Peaks are of processes of their own; where they are unreadable, there was not enough memory to read them.
    """

    def make(
        paces: Mapping[str, Sequence[float]],
        *,
        lossy: Sequence[str] = (),
        compiles: Sequence[str] = (),
        same: Sequence[tuple[str, str]] = (),
        peaks: Mapping[str, int] | None = None,
        unreadable: Sequence[str] = (),
        **changes: object,
    ) -> Run:
        run = Run(header(**changes))
        for rank, name in enumerate(paces):
            candidate = Candidate(
                id=name,
                label=name,
                settings={"knob": name},
                lossy=name in lossy,
                compiles=name in compiles,
                complexity=rank,
            )
            run.add(CandidateEntry(candidate=candidate, incumbent=rank == 0))
        twin = dict(same)
        for name, values in paces.items():
            cell = Cell(candidate=name, scenario=SCENARIO.key)
            run.add(Proof(launch=0, cell=cell, applied=Applied(values={"runs": twin.get(name, name)})))
            for block, pace in enumerate(values):
                run.add(sample(name, block, pace))
        for number, (name, peak) in enumerate((peaks or {}).items()):
            cell = Cell(candidate=name, scenario=SCENARIO.key)
            run.add(LaunchOrder(launch=number, round=9, purpose="memory", cells=(cell,)))
            resources = Resources(processes=("worker",), peak_host_bytes=peak)
            run.add(Measured(launch=number, cells=(cell,), resources=resources))
        for number, name in enumerate(unreadable, 100):
            cell = Cell(candidate=name, scenario=SCENARIO.key)
            run.add(LaunchOrder(launch=number, round=9, purpose="memory", cells=(cell,)))
            failure = Failure(kind="oom_host", phase="memory", reason="no room")
            run.add(Failed(launch=number, cell=cell, failure=failure))
            run.add(LaunchEnd(launch=number, wall_s=1.0, generate_s=0.0))
        return run

    return make


@pytest.fixture
def in_process_worker() -> type[InProcessWorker]:
    """A worker without a process, to derive from."""
    return InProcessWorker


SMALL = Profile(
    name="small",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3),),
    objective=Objective(ttft=0.5, decode=0.5),
    launches=2,
    samples=2,
)


def calm(pid: int | None) -> Callable[[], Conditions]:
    """A machine that disturbs nothing."""
    return lambda: Conditions(window_s=0.0)


class Stops(Stop):
    """Asked at a moment of the run: its n-th progress. None = never."""

    def __init__(self, moment: int | None) -> None:
        super().__init__()
        self.moment = moment
        self.seen = 0

    def on_progress(self, progress: Progress) -> None:
        self.seen += 1
        if self.seen == self.moment:
            self.ask()


@dataclasses.dataclass
class Command:
    """The same request, in one directory."""

    request: TuneRequest
    worker: Any

    @property
    def out(self) -> Path:
        return Path(self.request.out or "")

    @property
    def journal(self) -> Path:
        return self.out / "journal.jsonl"

    def run(self, moment: int | None = None, **changes: Any) -> TuneResult:
        """Tune, stopped at a moment."""
        return self.watched(moment, **changes)[0]

    def watched(self, moment: int | None = None, **changes: Any) -> tuple[TuneResult, int]:
        """The same, and how many moments there were."""
        stops = Stops(moment)

        class Stoppable(self.worker):  # type: ignore[name-defined,misc]
            """Looks at the wish to stop where a worker process does."""

            def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
                stops.check()
                return super().call(operation, arguments, phase, limits)

        request = dataclasses.replace(self.request, **changes)
        result = tune(request, stops.on_progress, stop=stops, open_worker=Stoppable, watch=calm)
        return result, stops.seen

    def resume(self, moment: int | None = None, **changes: Any) -> TuneResult:
        return self.run(moment, resume=True, **changes)

    def stop(self, moment: int, **changes: Any) -> None:
        """Tune until a moment, with or without a plan."""
        with suppress(Interrupted):
            self.run(moment, **changes)

    def events(self) -> list[Event]:
        return list(read_journal(self.journal))


MakeCommand = Callable[..., Command]


@pytest.fixture
def command(tmp_path: Path, in_process_worker: Any) -> MakeCommand:
    """A command whose directory has a name of its own."""

    def make(name: str = "out", **request: Any) -> Command:
        fields = {"model": "fake:tiny", "profile": SMALL, **request}
        return Command(TuneRequest(out=tmp_path / name, **fields), in_process_worker)

    return make


@pytest.fixture(name="header")
def _header() -> Callable[..., Header]:
    """A header with some fields of one's own."""
    return header
