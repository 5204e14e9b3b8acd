"""A disk that is full or cannot be written: one clear line, nothing lost, and the run goes on when that is mended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvat_core import Plan, Profile, TuneRequest, TuneResult, tune
from kvat_core.errors import CannotWrite, UsageError
from kvat_core.journal import read_journal
from kvat_core.schema import Objective, Sample, Scenario

pytestmark = pytest.mark.slow

SMALL = Profile(
    name="small",
    scenarios=(Scenario(prompt_tokens=8, output_tokens=3),),
    objective=Objective(ttft=0.5, decode=0.5),
    launches=2,
    samples=2,
)
TUNE = f"""
import sys
from kvat_core import Profile, TuneRequest, tune
from kvat_core.errors import KvatError

def tuned(out, **changes):
    profile = Profile.model_validate_json({SMALL.model_dump_json()!r})
    try:
        plan = tune(TuneRequest(out=out, model="fake:tiny", profile=profile, **changes)).plan
    except KvatError as error:
        return type(error).__name__ + ": " + str(error)
    return plan.model_dump_json()
"""
"""The same request in a process of its own; what it prints is a plan or an error."""

LIMITED = f"""{TUNE}
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
print(tuned(sys.argv[1]))
"""

FULL = f"""{TUNE}
import json, subprocess
from contextlib import suppress
from pathlib import Path


disk, room = Path(sys.argv[1]), int(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
ballast = disk / "ballast"
ballast.write_bytes(bytes(2**20 - room))

def fill():
    with ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))

seen = {{"full": tuned(disk / "out"), "journal": (disk / "out" / "journal.jsonl").read_text()}}
with suppress(OSError):
    fill()
seen["still full"] = tuned(disk / "out", resume=True)
seen["files"] = sorted(path.name for path in (disk / "out").iterdir())
ballast.unlink()
seen["resumed"] = tuned(disk / "out", resume=True)
seen["journal afterwards"] = (disk / "out" / "journal.jsonl").read_text()
print(json.dumps(seen))
"""

READ_ONLY = f"""{TUNE}
import json, subprocess
from pathlib import Path

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
tuned(disk / "out")
(disk / "out" / "best_plan.json").unlink()
before = {{path.name: path.read_text() for path in (disk / "out").iterdir()}}
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
seen = {{"resumed": tuned(disk / "out", resume=True), "forced": tuned(disk / "out", force=True)}}
seen["new"] = tuned(disk / "new")
seen["unchanged"] = before == {{path.name: path.read_text() for path in (disk / "out").iterdir()}}
subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
seen["afterwards"] = tuned(disk / "out", resume=True)
print(json.dumps(seen))
"""

IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs a mount namespace in which a tmpfs can be mounted")


def printed(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def seen_on_a_disk_of_its_own(disk: Path, script: str, *arguments: str) -> dict[str, Any]:
    disk.mkdir()
    found: dict[str, Any] = json.loads(printed([*IN_A_NAMESPACE, sys.executable, "-c", script, str(disk), *arguments]))
    return found


def decided(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(exclude={"journal", "created"})


def decided_of(text: str) -> dict[str, Any]:
    return decided(Plan.model_validate_json(text))


Tuned = Callable[..., TuneResult]


@pytest.fixture
def tuned(in_process_worker: Any) -> Tuned:
    """The same request in this process."""

    def run(out: Path, **changes: Any) -> TuneResult:
        fields = {"out": out, "model": "fake:tiny", "profile": SMALL, **changes}
        return tune(TuneRequest(**fields), open_worker=in_process_worker)

    return run


@pytest.fixture
def whole(tuned: Tuned, tmp_path: Path) -> TuneResult:
    """A run that nothing disturbed."""
    return tuned(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.15, 0.6, 0.95])
def test_where_the_journal_cannot_grow_what_was_measured_is_kept(
    tmp_path: Path, tuned: Tuned, whole: TuneResult, share: float
) -> None:
    out, limit = tmp_path / "out", round(share * (whole.out / "journal.jsonl").stat().st_size)
    line = printed([sys.executable, "-c", LIMITED, str(out), str(limit)])
    assert line == (
        f"CannotWrite: {out}/journal.jsonl cannot be written (File too large); what was measured before is in it: mend "
        "that, then go on with --resume"
    )
    assert {path.name for path in out.iterdir()} == {"journal.jsonl"}
    before = (out / "journal.jsonl").read_bytes()
    assert before.endswith(b"\n")
    assert limit - 2000 < len(before) <= limit
    assert any(isinstance(event, Sample) for event in read_journal(out / "journal.jsonl")) == (share > 0.5)
    assert decided(tuned(out, resume=True).plan) == decided(whole.plan)
    assert (out / "journal.jsonl").read_bytes().startswith(before)


def test_a_plan_that_cannot_be_written_is_written_later_without_measuring(
    tmp_path: Path, tuned: Tuned, whole: TuneResult
) -> None:
    out = shutil.copytree(whole.out, tmp_path / "out")
    before = (out / "journal.jsonl").read_bytes()
    (out / "best_plan.json").unlink()
    script = LIMITED.replace("tuned(sys.argv[1])", "tuned(sys.argv[1], resume=True)")
    line = printed([sys.executable, "-c", script, str(out), "1000"])
    assert line == (
        f"CannotWrite: {out}/best_plan.json cannot be written (File too large); all that was measured is in "
        "journal.jsonl: mend that, then write it with --resume"
    )
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert tuned(out, resume=True).plan == whole.plan
    assert (out / "journal.jsonl").read_bytes() == before


@needs_mounts
@pytest.mark.parametrize("room", [8192, 12288])
def test_on_a_full_disk_what_was_measured_is_kept(tmp_path: Path, whole: TuneResult, room: int) -> None:
    seen = seen_on_a_disk_of_its_own(tmp_path / "disk", FULL, str(room))
    assert seen["full"].startswith(f"CannotWrite: {tmp_path}/disk/out/journal.jsonl cannot be written (No space left")
    assert seen["full"].endswith("then go on with --resume")
    assert seen["journal"].endswith("\n")
    assert "\n" not in seen["full"]
    lock = f"{tmp_path}/disk/out/journal.lock"
    assert seen["still full"] == (
        f"CannotWrite: {lock} cannot be written (No space left on device); mend that, then try again"
    )
    assert seen["files"] == ["journal.jsonl"]
    assert decided_of(seen["resumed"]) == decided(whole.plan)
    assert seen["journal afterwards"].startswith(seen["journal"])


@needs_mounts
def test_on_a_disk_too_full_for_the_first_record_a_run_starts_anew(tmp_path: Path) -> None:
    # The lock takes the only page.
    seen = seen_on_a_disk_of_its_own(tmp_path / "disk", FULL, "4096")
    assert seen["full"] == (
        f"CannotWrite: {tmp_path}/disk/out/journal.jsonl cannot be written (No space left on device); nothing was "
        "measured yet: mend that, then start anew with --force"
    )
    assert seen["resumed"].endswith("ends before anything was measured; start anew with --force instead of --resume")


@needs_mounts
def test_a_read_only_disk_is_refused_and_unchanged(tmp_path: Path, whole: TuneResult) -> None:
    seen = seen_on_a_disk_of_its_own(tmp_path / "disk", READ_ONLY)
    out = f"{tmp_path}/disk/out"
    refused = f"UsageError: --out {out} cannot be written ({out} is not a writable directory); name another one"
    assert seen["resumed"] == seen["forced"] == refused
    assert seen["new"].startswith(f"UsageError: --out {tmp_path}/disk/new cannot be written ({tmp_path}/disk is not")
    assert seen["unchanged"]
    assert decided_of(seen["afterwards"]) == decided(whole.plan)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root by its permissions")
def test_a_directory_without_permission_is_refused_and_unchanged(
    tmp_path: Path, tuned: Tuned, whole: TuneResult
) -> None:
    out = shutil.copytree(whole.out, tmp_path / "out")
    out.chmod(0o500)
    try:
        for changes in ({"resume": True}, {"force": True}):
            with pytest.raises(UsageError, match="is not a writable directory"):
                tuned(out, **changes)
    finally:
        out.chmod(0o700)
    assert (out / "journal.jsonl").read_bytes() == (whole.out / "journal.jsonl").read_bytes()


def test_a_journal_that_cannot_be_read_is_named(
    tuned: Tuned, whole: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvat_core.tuner.read_journal", refuse)
    with pytest.raises(UsageError, match=r"journal\.jsonl cannot be read \(Permission denied\)"):
        tuned(whole.out, resume=True)


def test_without_a_temporary_directory_a_run_can_be_resumed_later(
    tmp_path: Path, tuned: Tuned, whole: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        with pytest.raises(CannotWrite, match=r"no temporary directory can be made .* then go on with --resume"):
            tuned(tmp_path / "out")
    assert decided(tuned(tmp_path / "out", resume=True).plan) == decided(whole.plan)


def test_a_temporary_directory_that_is_lost_costs_nothing_measured(
    tmp_path: Path, in_process_worker: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    class Losing(in_process_worker):  # type: ignore[misc]
        def call(self, operation: Any, *rest: Any) -> Any:
            value = super().call(operation, *rest)
            if operation == "cleanup":
                for scratch in temporary.iterdir():
                    shutil.rmtree(scratch)
                    scratch.write_text("")
            return value

    request = TuneRequest(out=tmp_path / "out", engine="fake", model="fake:tiny", profile="ci-micro")
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(temporary))
        with pytest.raises(CannotWrite, match=r"temporary directory cannot be written .* then go on with --resume"):
            tune(request, open_worker=Losing)
    measured = len(list(read_journal(tmp_path / "out" / "journal.jsonl")))
    plan = tune(replace(request, resume=True), open_worker=in_process_worker).plan
    assert measured > 20
    assert not plan.partial
