"""Failures in a row: the machine is asked before more candidates are blamed; a crash is forgiven once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Plan, TuneRequest, TuneResult, tune
from kvat_core.errors import Paused, UsageError
from kvat_core.journal import read_journal
from kvat_core.measure.supervisor import WorkerFailed
from kvat_core.run import Run
from kvat_core.schema import Conditions, Failure, FailureKind, Stopped

Sabotage = Callable[["Saboteur", str, dict[str, Any]], None]


def calm(pid: int | None) -> Callable[[], Conditions]:
    return lambda: Conditions(window_s=1.0)


class Saboteur:
    """What a worker under sabotage knows of itself."""

    number: int
    kernel: str
    cache: str


@pytest.fixture
def tuned(tmp_path: Path, in_process_worker: Any) -> Callable[..., TuneResult]:
    """A tune of the fake engine whose workers are sabotaged before each request."""

    def run(sabotage: Sabotage, **request: Any) -> TuneResult:
        workers: list[Any] = []

        class Sabotaged(in_process_worker):
            def __init__(self, environment: Mapping[str, str]) -> None:
                super().__init__(environment)
                workers.append(self)
                self.number = len(workers)
                self.kernel = self.cache = ""

            def call(self, operation: Any, arguments: Any, phase: str, limits: Any) -> Any:
                if operation == "prepare":
                    self.kernel, self.cache = arguments["setup"]["kernel"], arguments["arguments"]["cache"]
                sabotage(self, phase, arguments)
                return super().call(operation, arguments, phase, limits)

        made = TuneRequest(**{"out": tmp_path / "out", "model": "fake:tiny", "profile": "ci-micro", **request})
        return tune(made, open_worker=Sabotaged, watch=calm)

    return run


def end(kind: FailureKind, phase: str) -> WorkerFailed:
    return WorkerFailed(Failure(kind=kind, phase=phase, reason="sabotage"), alive=False)


def states(plan: Plan) -> dict[str, str]:
    return {candidate.label: candidate.state for candidate in plan.candidates if candidate.state != "excluded"}


def journal(tmp_path: Path) -> Run:
    return Run.from_events(read_journal(tmp_path / "out" / "journal.jsonl"))


def test_a_crash_that_does_not_come_back_costs_nothing(tuned: Any, tmp_path: Path) -> None:
    crashes: list[str] = []

    def once(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "warm-up" and worker.kernel == "eager" and not crashes:
            crashes.append(worker.cache)
            raise end("crash", phase)

    plan = tuned(once).plan
    assert crashes
    assert set(states(plan).values()) == {"ok"}
    assert len(journal(tmp_path).failed) == 1


def test_a_crash_that_comes_back_is_a_failure_and_costs_nobody_else(tuned: Any) -> None:
    def always(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "sample" and (worker.kernel, worker.cache) == ("eager", "static"):
            raise end("crash", phase)

    plan = tuned(always).plan
    assert [label for label, state in states(plan).items() if state == "failed"] == ["cache=static kernel=eager"]
    assert all(candidate.score.n >= 3 for candidate in plan.candidates if candidate.score)


def test_who_crashed_has_the_next_process_for_itself(tuned: Any, tmp_path: Path) -> None:
    def always(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "sample" and worker.kernel == "eager":
            raise end("crash", phase)

    tuned(always)
    run = journal(tmp_path)
    second = {failed.cell.candidate: failed.launch for failed in run.failed}
    for order in run.launches:
        if order.launch in second.values():
            assert len({cell.candidate for cell in order.cells}) == 1


def test_running_out_of_memory_is_a_result_and_not_tried_again(tuned: Any, tmp_path: Path) -> None:
    def always(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "warm-up" and (worker.kernel, worker.cache) == ("eager", "static"):
            raise end("oom_host", phase)

    tuned(always)
    assert len(journal(tmp_path).failed) == 1


def test_a_load_that_fails_once_it_had_succeeded_is_tried_again(tuned: Any) -> None:
    def in_the_second_round(worker: Saboteur, phase: str, _: Any) -> None:
        # The first worker probes, the second one measures the first round.
        if phase == "load" and worker.number == 3:
            raise end("timeout", phase)

    assert set(states(tuned(in_the_second_round).plan).values()) == {"ok"}


def test_three_launches_that_fail_in_a_row_have_the_machine_checked(tuned: Any, tmp_path: Path) -> None:
    def eager_and_static(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "warm-up" and (worker.kernel == "eager" or worker.cache == "static"):
            raise end("timeout", phase)

    plan = tuned(eager_and_static).plan
    run = journal(tmp_path)
    assert all(health.ok for health in run.health)
    assert plan.winner.label == "default"


def test_a_machine_that_fails_its_check_pauses_the_run(tuned: Any, tmp_path: Path) -> None:
    def after_the_first_round(worker: Saboteur, phase: str, _: Any) -> None:
        if worker.number <= 2:
            return
        if phase == "health":
            raise UsageError("the device has fallen off the bus")
        if phase == "warm-up":
            raise end("device_error", phase)

    result = tuned(after_the_first_round)
    assert isinstance(result.stopped, Paused)
    assert "the device has fallen off the bus" in str(result.stopped)
    assert "--resume" in str(result.stopped)
    assert result.plan.partial
    assert [health.ok for health in journal(tmp_path).health] == [False]
    assert isinstance(journal(tmp_path).stopped, Stopped)


def test_a_paused_run_goes_on_when_the_machine_is_mended(tuned: Any, tmp_path: Path) -> None:
    broken = True

    def while_broken(worker: Saboteur, phase: str, _: Any) -> None:
        if broken and worker.number > 2 and phase in ("health", "load"):
            raise end("error", phase)

    with_pause = tuned(while_broken, out=tmp_path / "paused")
    assert with_pause.plan.partial
    broken = False
    resumed = tuned(while_broken, out=tmp_path / "paused", resume=True).plan
    whole = tuned(while_broken, out=tmp_path / "whole").plan
    assert not resumed.partial
    assert resumed.winner == whole.winner
    assert [candidate.score for candidate in resumed.candidates] == [candidate.score for candidate in whole.candidates]


def test_a_worker_that_cannot_be_killed_pauses_the_run_at_once(tuned: Any) -> None:
    def stuck(worker: Saboteur, phase: str, _: Any) -> None:
        if worker.number == 3:
            raise end("unkillable", phase)

    result = tuned(stuck)
    assert isinstance(result.stopped, Paused)
    assert "cannot be killed and may hold cpu" in str(result.stopped)


def test_a_run_pauses_when_no_more_process_can_be_started(tmp_path: Path, in_process_worker: Any) -> None:
    opened: list[Any] = []

    def open_worker(environment: Mapping[str, str]) -> Any:
        assert len(opened) < 20, "it tries for ever"
        opened.append(environment)
        if len(opened) > 3:
            raise end("error", "start")
        return in_process_worker(environment)

    request = TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro")
    stopped = tune(request, open_worker=open_worker, watch=calm).stopped
    assert isinstance(stopped, Paused)
    assert "error: sabotage" in str(stopped)
    resumed = TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro", resume=True)
    plan = tune(resumed, open_worker=in_process_worker, watch=calm).plan
    assert not plan.partial
    assert not [one for one in plan.candidates if one.failure]


def test_a_pause_before_any_figure_says_that_nothing_can_be_decided(tuned: Any, tmp_path: Path) -> None:
    def never(worker: Saboteur, phase: str, _: Any) -> None:
        if phase in ("warm-up", "health"):
            raise end("device_error", phase)

    with pytest.raises(Paused, match="nothing can be decided yet"):
        tuned(never)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"journal.jsonl"}


def test_the_candidate_on_which_a_machine_broke_is_not_to_blame(tuned: Any, tmp_path: Path) -> None:
    broken = True

    def breaks_in_the_first_round(worker: Saboteur, phase: str, _: Any) -> None:
        # After the incumbent has its samples, and in the same process.
        if broken and (phase == "health" or (phase == "warm-up" and worker.kernel == "eager")):
            raise end("device_error", phase)

    with_pause = tuned(breaks_in_the_first_round, out=tmp_path / "paused")
    assert isinstance(with_pause.stopped, Paused)
    assert "failed" not in states(with_pause.plan).values()
    broken = False
    assert set(states(tuned(breaks_in_the_first_round, out=tmp_path / "paused", resume=True).plan).values()) == {"ok"}


def test_running_out_of_memory_is_no_fault_of_a_machine_that_breaks_later(tuned: Any, tmp_path: Path) -> None:
    broken = True

    def sabotage(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "warm-up" and (worker.kernel, worker.cache) == ("eager", "static"):
            raise end("oom_device", phase)
        if broken and worker.number > 3 and phase in ("warm-up", "health"):
            raise end("device_error", phase)

    tuned(sabotage, out=tmp_path / "paused")
    broken = False
    plan = tuned(sabotage, out=tmp_path / "paused", resume=True).plan
    assert [label for label, state in states(plan).items() if state == "failed"] == ["cache=static kernel=eager"]


def test_a_peak_that_a_broken_machine_cost_is_read_after_all(tuned: Any, tmp_path: Path) -> None:
    broken = True

    def sabotage(worker: Saboteur, phase: str, _: Any) -> None:
        if broken and phase in ("memory", "health"):
            raise end("device_error", phase)

    paused = tuned(sabotage, out=tmp_path / "paused").plan
    assert all(scenario.peak_host_bytes is None for one in paused.candidates for scenario in one.scenarios)
    broken = False
    plan = tuned(sabotage, out=tmp_path / "paused", resume=True).plan
    assert plan.candidate(plan.winner.id).scenarios[0].peak_host_bytes is not None


def test_after_one_kill_while_loading_candidates_go_on_sharing_their_process(tuned: Any, tmp_path: Path) -> None:
    def once(worker: Saboteur, phase: str, _: Any) -> None:
        if worker.number == 2 and phase == "load":
            raise end("crash", phase)

    assert set(states(tuned(once).plan).values()) == {"ok"}
    timing = [order for order in journal(tmp_path).launches if order.purpose == "timing"]
    assert len(timing) == 1 + 3


def test_a_worker_that_dies_when_asked_for_its_peak_is_told_and_costs_no_figure(tuned: Any, tmp_path: Path) -> None:
    def eager(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "resources" and worker.kernel == "eager" and worker.cache == "static":
            raise end("crash", phase)

    plan = tuned(eager).plan
    run = journal(tmp_path)
    assert set(states(plan).values()) == {"ok"}
    assert all(candidate.score.n >= 3 for candidate in plan.candidates if candidate.score)
    assert {(failed.failure.kind, failed.failure.phase) for failed in run.failed} == {("crash", "resources")}
    assert len(run.failed) == 3
    assert plan.metrics.error_rate == 0
    assert any("cache=static kernel=eager" in note and "resources: crash" in note for note in plan.notes)


def test_a_worker_that_dies_while_it_cleans_up_is_told_and_costs_nothing(tuned: Any, tmp_path: Path) -> None:
    def always(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "cleanup":
            raise end("crash", phase)

    plan = tuned(always).plan
    run = journal(tmp_path)
    assert set(states(plan).values()) == {"ok"}
    assert not run.failed
    assert {(one.failure.kind, one.failure.phase) for one in run.ended if one.failure} == {("crash", "cleanup")}
    assert any("after its work (cleanup: crash, sabotage)" in note and "launch 0" in note for note in plan.notes)


@pytest.mark.parametrize("phase", ["cleanup", "resources"])
def test_a_device_that_breaks_after_the_work_is_checked(tuned: Any, tmp_path: Path, phase: str) -> None:
    def sabotage(worker: Saboteur, now: str, _: Any) -> None:
        if worker.number == 2 and now == phase:
            raise end("device_error", now)

    tuned(sabotage)
    assert journal(tmp_path).health[0].ok


def test_a_peak_that_could_not_be_read_once_is_read_in_another_process(tuned: Any, tmp_path: Path) -> None:
    trials: list[int] = []

    def once(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "memory" and not trials:
            trials.append(worker.number)
            raise end("crash", phase)

    plan = tuned(once).plan
    assert trials
    assert plan.candidate(plan.incumbent.id).scenarios[0].peak_host_bytes is not None
    assert not any("peak" in note for note in plan.notes)


@pytest.mark.parametrize(("kind", "trials"), [("timeout", 2), ("oom_host", 1)])
def test_a_peak_that_cannot_be_read_is_told_and_not_tried_for_ever(
    tuned: Any, tmp_path: Path, kind: FailureKind, trials: int
) -> None:
    def always(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "memory" and (worker.kernel, worker.cache) == ("auto", "dynamic"):
            raise end(kind, phase)

    plan = tuned(always).plan
    assert len(journal(tmp_path).failed) == trials
    assert plan.candidate(plan.incumbent.id).scenarios[0].peak_host_bytes is None
    assert any(f"peak memory could not be read (memory: {kind}, sabotage): default" in note for note in plan.notes)


def test_nonsense_in_a_timed_launch_costs_the_second_process_for_memory_nothing(tuned: Any, tmp_path: Path) -> None:
    trials: list[int] = []

    def sabotage(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "resources" and worker.number == 2 and worker.cache == "dynamic":
            raise WorkerFailed(Failure(kind="invalid_output", phase=phase, reason="sabotage"), alive=True)
        if phase == "memory" and not trials:
            trials.append(worker.number)
            raise end("crash", phase)

    plan = tuned(sabotage).plan
    assert plan.candidate(plan.incumbent.id).scenarios[0].peak_host_bytes is not None


def test_a_device_that_breaks_while_a_peak_is_read_ends_the_launch_and_nobody_else(tuned: Any, tmp_path: Path) -> None:
    def sabotage(worker: Any, phase: str, _: Any) -> None:
        if phase == "resources" and worker.number == 2:
            worker.broken = True
        # A broken device answers, and from then on breaks whatever is asked of it.
        if getattr(worker, "broken", False):
            raise WorkerFailed(Failure(kind="device_error", phase=phase, reason="sabotage"), alive=True)

    plan = tuned(sabotage).plan
    assert set(states(plan).values()) == {"ok"}
    assert [failed.failure.phase for failed in journal(tmp_path).failed] == ["resources"]


def test_unreadable_peaks_excuse_no_failure_before_a_machine_broke(tuned: Any, tmp_path: Path) -> None:
    broken = True
    overdue: list[int] = []

    def sabotage(worker: Saboteur, phase: str, _: Any) -> None:
        if phase == "resources":
            raise WorkerFailed(Failure(kind="error", phase=phase, reason="sabotage"), alive=True)
        if phase == "warm-up" and (worker.kernel, worker.cache) == ("eager", "static") and not overdue:
            overdue.append(worker.number)
            raise end("timeout", phase)
        if broken and worker.number > 4 and phase in ("warm-up", "health"):
            raise end("device_error", phase)

    paused = tuned(sabotage, out=tmp_path / "paused")
    assert isinstance(paused.stopped, Paused)
    broken = False
    plan = tuned(sabotage, out=tmp_path / "paused", resume=True).plan
    assert [label for label, state in states(plan).items() if state == "failed"] == ["cache=static kernel=eager"]


def test_a_worker_that_is_left_at_its_end_pauses_the_run(tuned: Any) -> None:
    def stuck(worker: Saboteur, phase: str, _: Any) -> None:
        if worker.number == 3 and phase == "cleanup":
            raise end("unkillable", phase)

    result = tuned(stuck)
    assert isinstance(result.stopped, Paused)
    assert "failed" not in states(result.plan).values()
