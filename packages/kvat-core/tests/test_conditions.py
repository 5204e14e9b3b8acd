"""A call is rejected for what somebody else recorded, and never for being slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core import TuneRequest, tune
from kvat_core.errors import NotDecided
from kvat_core.measure.conditions import SystemWatch, causes
from kvat_core.planner import make_plan
from kvat_core.probes import host
from kvat_core.run import Run
from kvat_core.schema import (
    AnotherLength,
    Cell,
    CompileCost,
    Conditions,
    FirstCall,
    GpuConditions,
    JournalRef,
    Sample,
)

MakeRun = Callable[..., Run]
REF = JournalRef(file="journal.jsonl", sha256="0", samples=0)
CALM = Conditions(
    window_s=1.0,
    load_average=9.0,
    steal_share=0.01,
    waiting_share=0.01,
    cpu_pressure=0.9,
    memory_pressure=0.01,
    io_pressure=0.9,
    major_faults=1,
    gpu=GpuConditions(clock_mhz=1500, temperature_c=90, throttle_reasons=("power cap",), foreign_processes=0),
)


def gpu(**changes: Any) -> dict[str, GpuConditions]:
    assert CALM.gpu is not None
    return {"gpu": CALM.gpu.model_copy(update=changes)}


def test_what_is_only_recorded_rejects_nothing() -> None:
    assert causes(CALM, 1600) == ()
    assert causes(Conditions(window_s=1.0), None) == ()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"steal_share": 0.06}, "its host took CPU time away (6% of the machine's)"),
        ({"waiting_share": 0.34}, "the worker waited for a free core (34% of its time)"),
        ({"memory_pressure": 0.5}, "memory was short (50% of the time)"),
        ({"major_faults": 11}, "pages of the worker came from a disk (11)"),
        (gpu(throttle_reasons=("hardware slowdown",)), "the card reports hardware slowdown"),
        (gpu(foreign_processes=2), "other processes held a context on the card (2)"),
        (gpu(clock_mhz=1100), "the card ran slower than before (1100 of 1600 MHz)"),
    ],
)
def test_each_cause_is_named_with_its_figure(changes: dict[str, Any], cause: str) -> None:
    assert causes(CALM.model_copy(update=changes), 1600) == (cause,)


def test_calls_too_short_for_the_kernel_s_clock_are_not_judged() -> None:
    assert causes(CALM.model_copy(update={"window_s": 0.01, "waiting_share": 0.9}), 1600) == ()


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="the system does not tell who waits for a core")
def test_a_process_that_has_to_wait_for_its_core_is_seen() -> None:
    pin = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\nwhile True: pass"
    both = [subprocess.Popen([sys.executable, "-c", pin]) for _ in range(2)]
    try:
        time.sleep(0.3)
        end = SystemWatch(None)(both[0].pid)
        time.sleep(1.0)
        conditions = end()
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert conditions.waiting_share is not None
    assert conditions.waiting_share > 0.2
    assert any("waited for a free core" in cause for cause in causes(conditions, None))


def test_of_a_process_that_is_gone_nothing_is_told() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    counters = host.read_counters(gone.pid)
    assert (counters.running_ns, counters.waiting_ns, counters.major_faults) == (None, None, None)


def disturbed(every: int) -> Callable[[int | None], Callable[[], Conditions]]:
    """A watch that sees somebody else at every n-th call."""
    calls = 0

    def watch(pid: int | None) -> Callable[[], Conditions]:
        nonlocal calls
        calls += 1
        share = 0.5 if calls % every == 0 else 0.0
        return lambda: Conditions(window_s=1.0, waiting_share=share)

    return watch


def test_a_rejected_call_is_repeated_recorded_and_not_used(tmp_path: Path, in_process_worker: Any) -> None:
    request = TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro")
    quiet = tune(request, open_worker=in_process_worker, watch=lambda pid: lambda: Conditions(window_s=1.0)).plan
    noisy_request = TuneRequest(out=tmp_path / "noisy", model="fake:tiny", profile="ci-micro")
    noisy = tune(noisy_request, open_worker=in_process_worker, watch=disturbed(7)).plan
    assert noisy.journal.samples > quiet.journal.samples
    assert noisy.winner == quiet.winner
    measured = [candidate for candidate in noisy.candidates if candidate.state == "ok" and candidate.scenarios]
    assert all(0 < candidate.rejected_share <= 0.2 for candidate in measured)
    assert not any(candidate.unstable for candidate in noisy.candidates)
    assert all(scenario.ttft_s.n >= 3 for candidate in measured for scenario in candidate.scenarios)


def test_where_everything_is_disturbed_there_is_a_plan_that_says_so(tmp_path: Path, in_process_worker: Any) -> None:
    request = TuneRequest(out=tmp_path / "out", model="fake:tiny", profile="ci-micro")
    plan = tune(request, open_worker=in_process_worker, watch=disturbed(1)).plan
    assert plan.winner.label == "cache=static"
    assert plan.confidence.level == "low"
    assert all(candidate.unstable for candidate in plan.candidates if candidate.scenarios)
    (note,) = [note for note in plan.notes if "rejected" in note]
    assert "the worker waited for a free core: stop other work, or use fewer --threads" in note


def with_index(sample: Sample, index: int, *, compilations: int = 0) -> Sample:
    distrust = ("graphs were compiled (1)",) if compilations else ()
    return sample.model_copy(update={"index": index, "compilations": compilations, "distrust": distrust})


def test_a_call_that_compiled_is_void_and_the_next_one_counts(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0]})
    (sample,) = run.samples
    again = Run(run.header)
    for entry in run.candidates:
        again.add(entry)
    slow = sample.model_copy(update={"requests": (sample.requests[0].model_copy(update={"ttft_s": 2.0}),)})
    again.add(with_index(slow, 0, compilations=1))
    cell = Cell(candidate="today", scenario=sample.scenario)
    assert again.samples_of(cell) == {}
    assert again.complete_rounds(cell) == set()
    again.add(with_index(sample, 1))
    assert again.samples_of(cell) == {0: [with_index(sample, 1)]}


def test_what_compiling_costs_is_kept_apart_cold_and_cached(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.0, 1.0], "compiled": [0.5, 0.5, 0.5]}, compiles=["compiled"])
    cell = Cell(candidate="compiled", scenario=run.samples[0].scenario)
    for launch, (duration_s, cold) in enumerate([(20.0, True), (4.0, False), (6.0, False)]):
        run.add(FirstCall(launch=launch, cell=cell, duration_s=duration_s, compilations=1, cold=cold))
    plan = make_plan(run, REF)
    # A call takes three paces: 1.5 s instead of 3.0 s.
    expected = CompileCost(first_call_s=20.0, cached_first_call_s=5.0, compile_s=18.5, break_even_requests=13)
    assert plan.candidate("compiled").scenarios[0].compile_cost == expected
    assert plan.candidate("today").scenarios[0].compile_cost is None
    (note,) = [note for note in plan.notes if "compiles code" in note]
    assert note.endswith("takes 20.0 s (5.0 s with a filled cache), won back after 13 requests")


@pytest.mark.parametrize(
    ("duration_s", "graphs", "on_top_s", "words"),
    [
        (12.5, 2, 11.0, "; a new prompt length takes 11.0 s more"),
        (1.49, 1, 0.0, "; a new prompt length takes 0.0 s more"),
        (1.75, 0, 0.25, "; a new prompt length compiles nothing"),
    ],
)
def test_what_a_new_prompt_length_costs_is_on_top_of_a_call_at_full_speed(
    make_run: MakeRun, duration_s: float, graphs: int, on_top_s: float, words: str
) -> None:
    run = make_run({"today": [1.0, 1.0, 1.0], "compiled": [0.5, 0.5, 0.5]}, compiles=["compiled"])
    cell = Cell(candidate="compiled", scenario=run.samples[0].scenario)
    run.add(FirstCall(launch=0, cell=cell, duration_s=20.0, compilations=1, cold=True))
    run.add(AnotherLength(launch=0, cell=cell, prompt_tokens=7, duration_s=duration_s, compilations=graphs))
    plan = make_plan(run, REF)
    cost = plan.candidate("compiled").scenarios[0].compile_cost
    assert cost is not None
    assert cost.another_length_s == pytest.approx(on_top_s)
    assert cost.another_length_graphs == graphs
    (note,) = [note for note in plan.notes if "compiles code" in note]
    assert note.endswith(f"won back after 13 requests{words}")


def test_what_is_slower_than_today_never_wins_its_compilation_back(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.0], "compiled": [1.5, 1.5]}, compiles=["compiled"])
    cell = Cell(candidate="compiled", scenario=run.samples[0].scenario)
    run.add(FirstCall(launch=0, cell=cell, duration_s=20.0, compilations=1, cold=True))
    cost = make_plan(run, REF).candidate("compiled").scenarios[0].compile_cost
    assert cost is not None
    assert (cost.break_even_requests, cost.cached_first_call_s) == (None, None)


def test_energy_is_counted_per_token(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0]})
    (sample,) = run.samples
    again = Run(run.header)
    for entry in run.candidates:
        again.add(entry)
    seen = Conditions(window_s=1.0, gpu=GpuConditions(energy_j=6.0))
    again.add(sample.model_copy(update={"conditions": seen}))
    # Three tokens come out.
    assert make_plan(again, REF).candidate("today").scenarios[0].energy_per_token_j == 2.0
    assert make_plan(run, REF).candidate("today").scenarios[0].energy_per_token_j is None


def test_a_launch_that_was_cut_short_is_in_no_figure(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0], "other": [2.0]})
    (sample, _) = run.samples
    late = sample.model_copy(update={"round": 1, "launch": 9, "index": 0, "duration_s": 90.0})
    two = run.header.profile.model_copy(update={"samples": 2})
    again = Run(run.header.model_copy(update={"profile": two}))
    for entry in run.candidates:
        again.add(entry)
    for index in range(2):
        again.add(with_index(sample, index))
    again.add(late)
    cell = Cell(candidate="today", scenario=sample.scenario)
    assert list(again.samples_of(cell)) == [0]
    assert len(again.calls_of(cell)) == 3
    (result,) = make_plan(again, REF).candidate("today").scenarios
    assert result.e2e_s.n == 1


def test_a_cell_whose_calls_all_compiled_has_no_complete_round(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0], "compiled": []})
    sample = run.samples[0].model_copy(update={"candidate": "compiled"})
    for index in range(2):
        run.add(with_index(sample, index, compilations=1))
    assert run.complete_rounds(Cell(candidate="compiled", scenario=sample.scenario)) == set()
    assert make_plan(run, REF).candidate("compiled").state == "not_reached"


def test_before_what_runs_today_is_measured_nothing_is_recommended(make_run: MakeRun) -> None:
    with pytest.raises(NotDecided, match="what runs today has not been measured in full yet"):
        make_plan(make_run({"today": [], "other": [0.5]}), REF)
