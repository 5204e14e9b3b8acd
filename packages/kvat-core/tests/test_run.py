"""A run remembers what it has worked out only as long as that is true."""

from __future__ import annotations

from collections.abc import Callable

from kvat_core.run import Run
from kvat_core.schema import Cell, Event, Failed, Failure, LaunchOrder, Measured, Resources

MakeRun = Callable[..., Run]
SCENARIO = "8+3x1"


def cell(name: str) -> Cell:
    return Cell(candidate=name, scenario=SCENARIO)


def view(run: Run) -> object:
    """Everything that a run derives from its records."""
    names = [entry.candidate.id for entry in run.candidates]
    return (
        [run.live, run.failures, run.forgiven, run.suspects, run.own_memory, run.memory_tried],
        [(run.original(cell(name)), run.alias_of(name), run.samples_of(cell(name))) for name in names],
        [(run.complete_rounds(cell(name)), run.rejected_share(name)) for name in names],
    )


def records(run: Run) -> list[Event]:
    """Those of a run with an alias, a crash that is forgiven, one that is not, and a peak."""
    crash = Failure(kind="crash", phase="sample", reason="ended by SIGSEGV")
    memory = LaunchOrder(launch=5, round=2, purpose="memory", cells=(cell("today"),))
    return [
        *run.candidates,
        *run.proofs,
        *run.samples,
        Failed(launch=0, cell=cell("other"), failure=crash),
        Failed(launch=1, cell=cell("other"), failure=crash),
        run.proofs[-1].model_copy(update={"applied": run.proofs[0].applied}),
        memory,
        Failed(launch=5, cell=cell("today"), failure=crash),
        Measured(launch=5, cells=memory.cells, resources=Resources(processes=("worker",), peak_host_bytes=300)),
    ]


def test_asking_in_between_changes_nothing(make_run: MakeRun) -> None:
    finished = make_run({"today": [1.0, 1.1], "other": [0.5, 0.25], "third": [0.7, 0.7]})
    asked = Run(finished.header)
    events = records(finished)
    for number, event in enumerate(events, start=1):
        asked.add(event)
        assert view(asked) == view(Run.from_events([finished.header, *events[:number]]))
    assert asked.alias_of("third") == "today"
    assert list(asked.failures) == ["other"]


def test_another_question_is_answered_from_the_same_records(make_run: MakeRun) -> None:
    run = make_run({"today": [1.0, 1.1], "other": [0.5, 0.25]})
    before = view(run)
    more = run.asked(run.header.profile.model_copy(update={"samples": 9}), incumbent="other")
    assert (run.incumbent, more.incumbent) == ("today", "other")
    assert more.complete_rounds(cell("today")) == set()
    assert view(run) == before
    assert run.complete_rounds(cell("today")) == {0, 1}
