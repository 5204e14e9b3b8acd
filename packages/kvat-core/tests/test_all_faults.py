"""One tune in which nearly every candidate does its worst, in real child processes."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kvat_core.journal import read_journal
from kvat_core.measure.deadlines import Deadlines
from kvat_core.run import Run
from kvat_core.schema import CandidateResult, Failure, Plan, read_plan

pytestmark = pytest.mark.slow

ENGINE = Path(__file__).parent / "fault_engine" / "kvat_fault_engine.py"
RUN = "KVAT_TEST_RUN"
LIMIT_BYTES = 300 * 2**20
CONTROL_GROUPS = {"memory.limit_in_bytes": Path("/sys/fs/cgroup/memory"), "memory.max": Path("/sys/fs/cgroup")}

DEADLINES = Deadlines(start_s=60, load_s=10, first_token_s=8, gap_s=4, sample_s=30, other_s=10, grace_s=1)
"""Far above what anything takes that does not hang, so that no slow machine mistakes one for the other."""
TUNE = f"""
import sys
from kvat_core import TuneRequest, tune
from kvat_core.measure.deadlines import Deadlines

deadlines = Deadlines.model_validate_json({DEADLINES.model_dump_json()!r})
tune(TuneRequest(out=sys.argv[1], engine="faults", profile="ci-micro"), deadlines=deadlines)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
"""Prints its own peak in KiB; what `getrusage` tells begins with the size of the process that started it."""

KINDS = {
    "segv": ("crash", "warm-up", "ended by SIGSEGV"),
    "abort": ("crash", "warm-up", "ended by SIGABRT"),
    "exit": ("no_output", "warm-up", "exit code 0 and no answer"),
    "hang-before": ("timeout", "first token", f"no first token in {DEADLINES.first_token_s:g} s"),
    "hang-after": ("timeout", "token gap", f"no token for {DEADLINES.gap_s:g} s after 2"),
    "ignore-sigterm": ("timeout", "first token", f"no first token in {DEADLINES.first_token_s:g} s"),
    "grandchild": ("no_output", "warm-up", "exit code 3 and no answer"),
    "flood": ("error", "warm-up", "builtins.RuntimeError"),
    "allocate": ("oom_host", "warm-up", "memory"),
    "nan": ("invalid_output", "warm-up", "negative or not finite"),
    "negative": ("invalid_output", "warm-up", "negative or not finite"),
    "wrong-count": ("invalid_output", "warm-up", "31 output tokens instead of 32"),
    "load": ("error", "load", "builtins.RuntimeError"),
}
OVERDUE_S = {
    "hang-before": DEADLINES.first_token_s,
    "hang-after": DEADLINES.gap_s,
    "ignore-sigterm": DEADLINES.first_token_s + DEADLINES.grace_s,
}
"""What has to be waited for, because nothing tells earlier that something is wrong."""


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    run: Run
    wall_s: float
    parent_bytes: int
    name: str
    """Of this tune, in the environment of all its processes."""

    def result(self, fault: str) -> CandidateResult:
        return next(one for one in self.plan.candidates if one.settings["fault"] == fault)

    def failure(self, fault: str) -> Failure:
        failure = self.result(fault).failure
        assert failure is not None
        return failure


@pytest.fixture(scope="module")
def control_group() -> Iterator[Path | None]:
    """A control group with little memory, where one may be made."""
    for limit, root in CONTROL_GROUPS.items():
        group = root / f"kvat-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(LIMIT_BYTES))
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    yield None


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, control_group: Path | None) -> Outcome:
    site = tmp_path_factory.mktemp("site")
    shutil.copy(ENGINE, site)
    info = site / "kvat_fault_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvat-fault-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvat.engines]\nfaults = kvat_fault_engine:FaultEngine\n")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    group = {} if control_group is None else {"KVAT_TEST_CONTROL_GROUP": str(control_group)}
    out = tmp_path_factory.mktemp("faults") / "out"
    name = secrets.token_hex(8)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", TUNE, out],
        env={**os.environ, **group, "PYTHONPATH": path, RUN: name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Outcome(
        plan=read_plan(out / "best_plan.json"),
        run=Run.from_events(read_journal(out / "journal.jsonl")),
        wall_s=time.monotonic() - started,
        parent_bytes=int(done.stdout) * 1024,
        name=name,
    )


def test_the_right_candidate_wins(outcome: Outcome) -> None:
    assert outcome.plan.winner.settings == {"fault": "fast"}
    assert outcome.plan.verdict == "better"
    assert not outcome.plan.partial
    for sound in ("none", "fast"):
        score = outcome.result(sound).score
        assert score is not None
        assert score.n >= outcome.plan.profile.launches


@pytest.mark.parametrize("fault", KINDS)
def test_each_failure_has_the_right_kind_and_reason(outcome: Outcome, fault: str) -> None:
    kind, phase, reason = KINDS[fault]
    failure = outcome.failure(fault)
    assert (failure.kind, failure.phase) == (kind, phase)
    assert reason in failure.reason


def test_every_candidate_is_sound_or_has_a_fault_that_is_expected(outcome: Outcome) -> None:
    states = {one.settings["fault"]: one.state for one in outcome.plan.candidates}
    assert states == {"none": "ok", "fast": "ok", **dict.fromkeys(KINDS, "failed")}


def test_what_the_kernel_killed_for_memory_is_told_from_a_crash(outcome: Outcome, control_group: Path | None) -> None:
    if control_group is None:
        pytest.skip("no control group can be made here; the address space was limited instead")
    assert "the kernel's out-of-memory killer ended the worker" in outcome.failure("allocate").reason


def test_of_a_flood_of_errors_the_end_is_kept(outcome: Outcome) -> None:
    tail = outcome.failure("flood").stderr_tail
    assert tail
    assert set(tail) == {"x"}
    assert len(tail) <= 2000
    assert outcome.parent_bytes < 2**29


def test_no_process_is_left(outcome: Outcome) -> None:
    def is_marked(process: psutil.Process) -> bool:
        try:
            return process.environ().get(RUN) == outcome.name
        except psutil.Error:
            return False

    assert not [process for process in psutil.process_iter() if is_marked(process)]


def test_failures_in_a_row_were_no_fault_of_the_machine(outcome: Outcome) -> None:
    assert outcome.run.health
    assert all(health.ok for health in outcome.run.health)


def test_it_takes_no_longer_than_its_deadlines_and_a_fifth(outcome: Outcome) -> None:
    """What hangs costs its deadline; every other process no more than the slowest of those that end by themselves."""
    overdue = {failed.launch: failed for failed in outcome.run.failed if failed.failure.kind == "timeout"}
    faults = {entry.candidate.id: entry.candidate.settings["fault"] for entry in outcome.run.candidates}
    assert sorted(faults[failed.cell.candidate] for failed in overdue.values()) == sorted(OVERDUE_S)
    ordinary_s = max(end.wall_s for end in outcome.run.ended if end.launch not in overdue)
    processes = 1 + len(outcome.run.launches) + len(outcome.run.health)
    assert outcome.wall_s <= 1.2 * (sum(OVERDUE_S.values()) + processes * ordinary_s)
