"""What a new prompt length costs once code is compiled: one call, after everything that is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Plan, Profile, TuneRequest, TuneResult, tune
from kvat_core.errors import Interrupted
from kvat_core.journal import read_journal
from kvat_core.measure.deadlines import Deadlines, Limits
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.run import Run
from kvat_core.schema import Conditions, Failure, FailureKind, Objective, Scenario

PHASE = "another length"
ONE = Scenario(prompt_tokens=8, output_tokens=3)
OTHER = Scenario(prompt_tokens=12, output_tokens=3)
PROFILE = Profile(
    name="small", scenarios=(ONE,), objective=Objective(ttft=0.5, decode=0.5), warmup=1, launches=3, samples=2
)
COMPILED = "cache=static graph=on"
COMPILE_S = 123.0

Before = Callable[[str], None]
"""Told the phase of each request; may raise."""


def calm(pid: int | None) -> Callable[[], Conditions]:
    return lambda: Conditions(window_s=0.0)


class Tune:
    """A tune of the fake engine with what its workers were asked, one list per worker."""

    def __init__(self, folder: Path, worker: Any) -> None:
        self._out = folder / "out"
        self._worker = worker
        self.asked: list[list[tuple[str, dict[str, Any], Limits]]] = []

    def run(self, before: Before = lambda phase: None, **request: Any) -> TuneResult:
        asked = self.asked

        class Recording(self._worker):  # type: ignore[name-defined,misc]
            def __init__(self, environment: Mapping[str, str]) -> None:
                super().__init__(environment)
                asked.append([])

            def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
                asked[-1].append((phase, arguments, limits))
                before(phase)
                return super().call(operation, arguments, phase, limits)

        pinned = {"kernel": "auto"}
        excluded = (("cache", "offloaded"),)
        fields = {"model": "fake:tiny", "profile": PROFILE, "space": "default", "pinned": pinned, "excluded": excluded}
        made = TuneRequest(out=self._out, **{**fields, **request})
        return tune(made, open_worker=Recording, watch=calm, deadlines=Deadlines(compile_s=COMPILE_S))

    @property
    def journal(self) -> Run:
        return Run.from_events(read_journal(self._out / "journal.jsonl"))

    @property
    def calls(self) -> list[tuple[str, dict[str, Any], Limits]]:
        """Those of another length."""
        return [call for worker in self.asked for call in worker if call[0] == PHASE]


@pytest.fixture
def fake(tmp_path: Path, in_process_worker: Any) -> Tune:
    return Tune(tmp_path, in_process_worker)


def failing(kind: FailureKind, *, alive: bool) -> Before:
    def fail(phase: str) -> None:
        if phase == PHASE:
            raise WorkerFailed(Failure(kind=kind, phase=PHASE, reason="sabotage"), alive=alive)

    return fail


def compiled(plan: Plan) -> Any:
    return next(candidate for candidate in plan.candidates if candidate.label == COMPILED)


def test_it_is_one_call_per_cell_and_the_last_of_its_process(fake: Tune) -> None:
    plan = fake.run().plan
    (worker,) = [worker for worker in fake.asked if any(phase == PHASE for phase, *_ in worker)]
    phases = [phase for phase, *_ in worker]
    assert phases[phases.index("sample") :] == ["sample", "sample", "resources", PHASE, "cleanup"]
    launches = [worker for worker in fake.asked if any(phase == "compile" for phase, *_ in worker)]
    assert len(launches) > 1, "later launches have no such call, or this test shows nothing"
    (event,) = fake.journal.other_lengths.values()
    assert event.cell.candidate == compiled(plan).id
    assert event.launch == fake.journal.first_calls[0].launch
    assert fake.journal.first_calls[0].cold


def test_only_the_prompt_is_another_one_and_only_what_compiles_is_asked(fake: Tune) -> None:
    fake.run()
    (event,) = fake.journal.other_lengths.values()
    ((_, arguments, limits),) = fake.calls
    assert arguments["prompt"]["tokens"] == [event.prompt_tokens] == [ONE.prompt_tokens - 1]
    assert arguments["max_new_tokens"] == ONE.output_tokens
    assert limits == Limits(COMPILE_S)
    assert (event.compilations, event.failure) == (1, None)
    assert event.duration_s is not None


def test_the_plan_tells_what_it_costs(fake: Tune) -> None:
    plan = fake.run().plan
    (event,) = fake.journal.other_lengths.values()
    cost = compiled(plan).scenarios[0].compile_cost
    assert cost.another_length_graphs == 1
    # Calls of the scripted engine take as long whether they compile or not.
    assert cost.another_length_s is not None
    assert 0 <= cost.another_length_s < event.duration_s


def test_in_a_shared_process_it_comes_after_the_samples_of_all(fake: Tune) -> None:
    fake.run(profile=PROFILE.model_copy(update={"scenarios": (ONE, OTHER)}))
    (worker,) = [worker for worker in fake.asked if any(phase == PHASE for phase, *_ in worker)]
    phases = [phase for phase, *_ in worker]
    # Once more with the usual length: what was compiled for it may be gone with the cell between.
    last = ["sample", "resources", "prepare", PHASE, PHASE, "cleanup"]
    assert phases[-len(last) :] == last
    (event,) = fake.journal.other_lengths.values()
    scenario = Scenario.of_key(event.cell.scenario)
    asked = [arguments["prompt"]["tokens"] for phase, arguments, _ in worker if phase == PHASE]
    assert asked == [[scenario.prompt_tokens], [scenario.prompt_tokens - 1]]
    assert event.compilations == 1


@pytest.mark.parametrize(("kind", "alive"), [("timeout", False), ("crash", False), ("oom_device", True)])
def test_its_failure_costs_no_figure_and_is_told(fake: Tune, kind: FailureKind, alive: bool) -> None:
    plan = fake.run(failing(kind, alive=alive)).plan
    found = compiled(plan)
    assert (found.state, found.failure, found.reason) == ("ok", None, None)
    (result,) = found.scenarios
    assert result.e2e_s.n >= PROFILE.launches
    assert result.compile_cost.first_call_s > 0
    assert (result.compile_cost.another_length_s, result.compile_cost.another_length_graphs) == (None, None)
    why = f"what a new prompt length costs is not known (another length: {kind}, sabotage): {COMPILED} at {ONE.key}"
    assert why in plan.notes
    assert len(fake.calls) == 1, "one try is enough"
    assert fake.journal.failed == []
    assert [order.failure for order in fake.journal.ended if order.failure] == []
    (worker,) = [[phase for phase, *_ in one] for one in fake.asked if PHASE in [phase for phase, *_ in one]]
    assert worker[-1] == ("cleanup" if alive else PHASE)


def test_a_device_that_breaks_in_it_is_checked(fake: Tune) -> None:
    fake.run(failing("device_error", alive=True))
    assert [one.ok for one in fake.journal.health] == [True]


def test_a_resumed_run_makes_it_once(fake: Tune) -> None:
    stopped: list[str] = []

    def stop_in_it(phase: str) -> None:
        if phase == PHASE and not stopped:
            stopped.append(PHASE)
            raise Interrupted("interrupted")

    def stop_after_it(phase: str) -> None:
        if phase == "compile" and fake.journal.other_lengths and len(stopped) == 1:
            stopped.append(phase)
            raise Interrupted("interrupted")

    for step in (stop_in_it, stop_after_it):
        with suppress(Interrupted):
            fake.run(step, resume=bool(stopped))
    assert len(stopped) == 2
    fake.run(resume=True)
    assert fake.journal.end is not None
    assert sum(call.cold for call in fake.journal.first_calls) == 3, "each start of the run compiles anew"
    assert len(fake.calls) == 2
    assert len(fake.journal.other_lengths) == 1


def test_a_prompt_of_one_token_has_no_shorter_one(fake: Tune) -> None:
    shortest = Scenario(prompt_tokens=1, output_tokens=3)
    plan = fake.run(profile=PROFILE.model_copy(update={"scenarios": (shortest,)})).plan
    assert fake.calls == []
    assert compiled(plan).scenarios[0].compile_cost.another_length_s is None
