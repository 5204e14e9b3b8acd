"""Processor and main memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from kvat_core.probes import control_group


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
    """Main memory, or the smallest limit of a control group that this process is in."""
    total: int = psutil.virtual_memory().total
    return min([total, *(group.limit_bytes for group in control_group.memory_limits())])


def available_memory_bytes() -> int:
    """Main memory that can still be had, within the limits of this process's control groups."""
    room = [
        max(0, group.limit_bytes - max(0, group.used_bytes - group.file_cache_bytes))
        for group in control_group.memory_limits()
    ]
    return min([int(psutil.virtual_memory().available), *room])
