"""What Linux counts of the machine and of one process; elsewhere nothing is told."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STALLED = re.compile(r"^some .*\btotal=(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Counters:
    """Sums since some start, to be subtracted from each other; None where the system does not tell."""

    time_s: float
    cpu_ticks: int | None
    """Of all CPUs, idle ones included."""
    stolen_ticks: int | None
    """Of those, taken by the host of a virtual machine."""
    stalled_us: dict[str, int]
    """Resource (cpu, memory, io) to the time in which some task lacked it, in microseconds."""
    running_ns: int | None
    """Of all threads of the process."""
    waiting_ns: int | None
    """Of all threads of the process that could have run, had a core been free."""
    major_faults: int | None
    """Of the process."""


def read_counters(pid: int | None) -> Counters:
    """All counters now.

    Args:
        pid: the process to look at, None for none.
    """
    ticks = _cpu_ticks()
    running_ns, waiting_ns = _schedule(pid)
    return Counters(
        time_s=time.monotonic(),
        # guest time, from the ninth on, is part of user time already
        cpu_ticks=None if ticks is None else sum(ticks[:8]),
        stolen_ticks=None if ticks is None else ticks[7],
        stalled_us={resource: us for resource in ("cpu", "memory", "io") if (us := _stalled_us(resource)) is not None},
        running_ns=running_ns,
        waiting_ns=waiting_ns,
        major_faults=_major_faults(pid),
    )


def load_average() -> float | None:
    """Of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _cpu_ticks() -> list[int] | None:
    """User, nice, system, idle, iowait, irq, softirq, steal … of proc(5)."""
    text = _text(_PROC / "stat")
    return None if text is None else [int(word) for word in text.splitlines()[0].split()[1:]]


def _stalled_us(resource: str) -> int | None:
    """Pressure stall information of the kernel's Documentation/accounting/psi.rst."""
    found = _STALLED.search(_text(_PROC / "pressure" / resource) or "")
    return None if found is None else int(found[1])


def _schedule(pid: int | None) -> tuple[int | None, int | None]:
    """Time on a core and time waiting for one, of Documentation/scheduler/sched-stats.rst."""
    if pid is None:
        return None, None
    try:
        threads = [_text(thread / "schedstat") for thread in (_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return None, None
    fields = [text.split() for text in threads if text]
    return sum(int(field[0]) for field in fields), sum(int(field[1]) for field in fields)


def _major_faults(pid: int | None) -> int | None:
    text = None if pid is None else _text(_PROC / str(pid) / "stat")
    # The name of the process, in parentheses, may hold anything; majflt is the tenth field after it.
    return None if text is None else int(text.rpartition(")")[2].split()[9])
