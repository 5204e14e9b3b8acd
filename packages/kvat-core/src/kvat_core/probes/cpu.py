"""Processor and main memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where the system shows the control group of this process, in a container at least."""


def cpu_name() -> str:
    """Marketing name of the processor, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory, or the smaller limit of this process's control group."""
    total: int = psutil.virtual_memory().total
    return min([total, *_cgroup_bytes("memory.max", "memory.limit_in_bytes")])


def available_memory_bytes() -> int:
    """Main memory that can still be had, within the limit of this process's control group."""
    limits = _cgroup_bytes("memory.max", "memory.limit_in_bytes")
    used = _cgroup_bytes("memory.current", "memory.usage_in_bytes")
    cache = _file_cache_bytes()
    room = [max(0, limit - max(0, now - cache)) for limit, now in zip(limits, used, strict=False)]
    return min([int(psutil.virtual_memory().available), *room])


def quota_cores() -> float | None:
    """CPU time that this process's control group allows per time, in cores; None without a limit."""
    unified = CONTROL_GROUP / "cpu.max"
    legacy = [CONTROL_GROUP / "cpu" / name for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    words = unified.read_text().split() if unified.is_file() else [f.read_text().strip() for f in legacy if f.is_file()]
    if len(words) != 2 or not words[0].isdigit():
        return None
    return int(words[0]) / int(words[1])


def oom_kills() -> int | None:
    """How often the kernel has killed for lack of memory, in this control group if it tells; None where nobody does."""
    files = (CONTROL_GROUP / "memory.events", Path("/proc/vmstat"))
    file = next((one for one in files if one.is_file()), None)
    lines = file.read_text().splitlines() if file is not None else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _cgroup_bytes(unified: str, legacy: str) -> list[int]:
    """A figure of the control group by its name in either version; none without one, or where it is unlimited."""
    files = (CONTROL_GROUP / unified, CONTROL_GROUP / "memory" / legacy)
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _file_cache_bytes() -> int:
    """What the control group holds of files: charged to it, and given up as soon as memory is wanted."""
    files = (CONTROL_GROUP / "memory.stat", CONTROL_GROUP / "memory" / "memory.stat")
    file = next((one for one in files if one.is_file()), None)
    pairs = [line.split() for line in file.read_text().splitlines()] if file is not None else []
    return sum(int(number) for name, number in pairs if name in ("active_file", "inactive_file"))
