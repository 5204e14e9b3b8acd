"""What a command costs that starts others: seconds, and memory of it alone and of all of them together."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

import psutil

PERIOD_S = 0.5
"""Between two looks; a peak that is shorter is missed."""


def watched(command: Sequence[str]) -> tuple[int, dict[str, float]]:
    """Run it; return its exit code, and its cost with units in the keys. Sizes are resident ones, sampled."""
    started_s, own_bytes, all_bytes = time.monotonic(), 0, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        own, others = _resident_bytes(process.pid)
        own_bytes, all_bytes = max(own_bytes, own), max(all_bytes, own + others)
        time.sleep(PERIOD_S)
    wall_s = time.monotonic() - started_s
    return process.returncode, {"wall_s": wall_s, "peak_own_bytes": own_bytes, "peak_all_bytes": all_bytes}


def _resident_bytes(pid: int) -> tuple[int, int]:
    """Of a process, and of all that it has started."""
    try:
        process = psutil.Process(pid)
        return process.memory_info().rss, sum(map(_size, process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0, 0


def _size(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
