"""What the system tells of this machine, and what it keeps to itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pynvml
import pytest

from kvat_core import noise
from kvat_core.measure.conditions import SystemWatch
from kvat_core.probes import control_group, cpu, gpu
from kvat_core.schema import GpuConditions


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An NVML with one card that tells everything."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetName": "Some Card",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=8 << 30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    return monkeypatch


def refuse(*_: object) -> NoReturn:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_card_is_described(driver: pytest.MonkeyPatch) -> None:
    (card,) = gpu.gpus()
    assert (card.name, card.memory_bytes, card.driver) == ("Some Card", 8 << 30, "580.1")


@pytest.mark.parametrize("silent", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion"])
def test_what_a_card_does_not_tell_is_null_and_no_error(driver: pytest.MonkeyPatch, silent: str) -> None:
    driver.setattr(pynvml, silent, refuse)
    (card,) = gpu.gpus()
    told = (card.name, card.memory_bytes, card.driver)
    assert sum(value in (None, "unknown") for value in told) == 1


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert gpu.gpus() == ()


def test_hidden_power_supplies_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> NoReturn:
        raise FileNotFoundError("/sys/class/power_supply")

    monkeypatch.setattr(psutil, "sensors_battery", hidden, raising=False)
    assert not any("battery" in finding for finding in noise.standing_findings())


def test_available_memory_is_part_of_all_memory() -> None:
    assert 0 < cpu.available_memory_bytes() <= cpu.memory_bytes()


UNIFIED = {"limit": "memory.max", "used": "memory.current", "stat": "{}"}
LEGACY = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "stat": "total_{}"}


@pytest.fixture
def control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A system whose groups have these files; this process is in the group that `membership` names."""
    monkeypatch.setattr(control_group, "MOUNT", tmp_path)
    monkeypatch.setattr(control_group, "MEMBERSHIP", tmp_path / "membership")

    def make(membership: str, files: Mapping[str, str]) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    return make


def memory(folder: str, names: Mapping[str, str], limit: str, used: int, cache: int = 0) -> dict[str, str]:
    """Files of a group; what it holds of files is partly active."""
    stat = [f"anon {used - cache}", *(f"{names['stat'].format(name)} {cache // 2}" for name in CACHES)]
    texts = {"limit": limit, "used": str(used)}
    return {f"{folder}/{names[kind]}": text for kind, text in texts.items()} | {
        f"{folder}/memory.stat": "\n".join(stat)
    }


CACHES = ("active_file", "inactive_file")


@pytest.mark.parametrize(("folder", "names"), [(".", UNIFIED), ("memory", LEGACY)], ids=["unified", "legacy"])
def test_what_a_control_group_holds_of_files_is_available(
    control_groups: Callable[..., None], folder: str, names: Mapping[str, str]
) -> None:
    control_groups("", memory(folder, names, "1000000", 900_000, 650_000))
    assert cpu.memory_bytes() == 1_000_000
    assert cpu.available_memory_bytes() == 750_000


@pytest.mark.parametrize(
    ("membership", "root", "names"),
    [("0::/jobs/7/step\n", ".", UNIFIED), ("5:cpu:/\n4:memory:/jobs/7/step\n0::/\n", "memory", LEGACY)],
    ids=["unified", "legacy"],
)
@pytest.mark.parametrize(
    ("limits", "total", "available"),
    [
        (("max", "2000000", "1000000"), 1_000_000, 600_000),
        (("max", "1000000", "max"), 1_000_000, 400_000),
        # The narrower limit has more room than the wider one, in which others are.
        (("1500000", "max", "1200000"), 1_200_000, 500_000),
    ],
)
def test_every_group_above_counts(
    control_groups: Callable[..., None],
    membership: str,
    root: str,
    names: Mapping[str, str],
    limits: tuple[str, str, str],
    total: int,
    available: int,
) -> None:
    folders = (f"{root}/jobs", f"{root}/jobs/7", f"{root}/jobs/7/step")
    used = (1_000_000, 600_000, 400_000)
    groups = [memory(folder, names, *of) for folder, *of in zip(folders, limits, used, strict=True)]
    control_groups(membership, {name: text for group in groups for name, text in group.items()})
    assert (cpu.memory_bytes(), cpu.available_memory_bytes()) == (total, available)


@pytest.mark.parametrize("membership", ["", "0::/somewhere/else\n", "0::/../../outside\n"])
def test_a_group_that_cannot_be_seen_from_here_is_its_root(
    control_groups: Callable[..., None], membership: str
) -> None:
    control_groups(membership, memory(".", UNIFIED, "1000000", 400_000))
    assert cpu.memory_bytes() == 1_000_000


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job\n", {"job/cpu.max": "150000 100000", "cpu.max": "100000 100000"}, 1.0),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, None),
        ("3:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_a_control_group_s_quota_is_counted_in_cores(
    control_groups: Callable[..., None], membership: str, files: Mapping[str, str], cores: float | None
) -> None:
    control_groups(membership, files)
    assert control_group.quota_cores() == cores


def test_kills_for_memory_are_counted_in_this_process_s_own_group(control_groups: Callable[..., None]) -> None:
    control_groups("0::/job\n", {"job/memory.events": "oom 5\noom_kill 3", "memory.events": "oom 9\noom_kill 9"})
    assert control_group.oom_kills() == 3


@pytest.mark.parametrize(
    ("probe", "value", "finding"),
    [
        ("host.load_average", 7.0, "load average 7.0 on 2 cores"),
        ("control_group.quota_cores", 1.5, "its control group allows 1.5 of 2 cores: .* use --threads 1"),
        ("cpu.available_memory_bytes", 2**28, "only 0.2 GiB of memory are available: close programs"),
    ],
)
def test_a_finding_says_what_to_do(monkeypatch: pytest.MonkeyPatch, probe: str, value: float, finding: str) -> None:
    quiet = {
        "host.load_average": 0.1,
        "control_group.quota_cores": None,
        "cpu.usable_cores": 2,
        "cpu.available_memory_bytes": 2**34,
        "cpu.memory_bytes": 2**34,
    }
    for name, answer in {**quiet, probe: value}.items():
        monkeypatch.setattr(f"kvat_core.noise.{name}", lambda answer=answer: answer)
    assert [one for one in noise.standing_findings() if re.search(finding, one)]
    monkeypatch.setattr(f"kvat_core.noise.{probe}", lambda: quiet[probe])
    assert not [one for one in noise.standing_findings() if re.search(finding, one)]


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="the system does not tell who waits for a core")
def test_a_core_that_is_shared_is_noticed_by_trying() -> None:
    """Both cores of this trial are one, so each of two busy loops has to wait half of its time."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert any("waited for a free core" in finding for finding in noise.tried_findings())
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, allowed)


def test_others_on_a_card_are_named_with_what_to_do(driver: pytest.MonkeyPatch) -> None:
    driver.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [SimpleNamespace(pid=7, usedGpuMemory=1)])
    driver.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda _: 0x40 | 0x4)
    findings = [finding for finding in noise.standing_findings() if finding.startswith("Some Card")]
    assert findings == [
        "Some Card: 1 processes have a context on it; stop them, or measure on another --device",
        "Some Card: its clock is held down by hardware thermal slowdown; let it cool, and look at its power supply",
    ]


def test_a_card_tells_what_disturbs_a_call(driver: pytest.MonkeyPatch) -> None:
    energy_mj = iter((1000, 4000))
    answers = {
        "nvmlDeviceGetHandleByUUID": object(),
        "nvmlDeviceGetClockInfo": 1200,
        "nvmlDeviceGetTemperature": 70,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x20,
        "nvmlDeviceGetComputeRunningProcesses": [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 << 30),
            SimpleNamespace(pid=1, usedGpuMemory=None),
        ],
    }
    for name, answer in answers.items():
        driver.setattr(pynvml, name, lambda *_, answer=answer: answer)
    driver.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: next(energy_mj))
    watch = SystemWatch("GPU-some")
    seen = watch(os.getpid())().gpu
    assert seen == GpuConditions(
        clock_mhz=1200,
        temperature_c=70,
        throttle_reasons=("thermal slowdown",),
        foreign_processes=1,
        energy_j=3.0,
    )
    assert watch.process_bytes(os.getpid()) == 5 << 30
    assert watch.process_bytes(4711) is None


def test_a_card_that_tells_nothing_is_no_error(driver: pytest.MonkeyPatch) -> None:
    driver.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda _: object())
    for name in ("ClockInfo", "Temperature", "CurrentClocksThrottleReasons", "ComputeRunningProcesses"):
        driver.setattr(pynvml, f"nvmlDeviceGet{name}", refuse)
    driver.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    seen = SystemWatch("GPU-some")(os.getpid())().gpu
    assert seen is not None
    assert (seen.clock_mhz, seen.temperature_c, seen.throttle_reasons, seen.energy_j) == (None, None, (), None)


def test_without_a_card_nothing_is_said_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    for uuid in (None, "GPU-some"):
        assert SystemWatch(uuid)(os.getpid())().gpu is None
