"""What disturbs measurements on this machine, one line each with what to do about it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from kvat_core.probes import control_group, cpu, gpu, host

BUSY_LOAD_PER_CORE = 0.5
"""Load average per core above which another process is likely to share a core with the measurement."""
SHORT_MEMORY_SHARE = 0.1
"""Share of main memory that should be free before anything is loaded."""
MAX_SHARE = 0.05
"""Share of time lost to somebody else, above which timed calls are rejected as well."""
TRIAL_S = 0.5

_SPIN = f"""
import os, time
end = time.monotonic() + {TRIAL_S}
while time.monotonic() < end:
    pass
running, waiting, _ = open("/proc/self/schedstat").read().split()
print(int(waiting) / max(1, int(running) + int(waiting)))
"""
"""Keeps a core busy and prints which share of that time it had to wait for one."""


def standing_findings() -> list[str]:
    """What can be seen without trying."""
    return [finding for look in _LOOKS if (finding := look()) is not None] + list(_cards())


def tried_findings() -> list[str]:
    """What shows when all cores are kept busy for a moment, first one and then all of them."""
    return [finding for finding in (_one_core(), _all_cores()) if finding is not None]


def _load() -> str | None:
    load, cores = host.load_average(), cpu.usable_cores()
    if load is None or load <= BUSY_LOAD_PER_CORE * cores:
        return None
    return f"load average {load:.1f} on {cores} cores: other work slows measurements; stop it, or use fewer --threads"


def _quota() -> str | None:
    quota, cores = control_group.quota_cores(), cpu.usable_cores()
    if quota is None or quota >= cores:
        return None
    return (
        f"its control group allows {quota:.1f} of {cores} cores: more threads than that are stopped in turn; "
        f"use --threads {max(1, int(quota))}"
    )


def _governor() -> str | None:
    files = Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    slow = sorted({text for file in files if (text := _text(file)) not in ("", "performance")})
    if not slow:
        return None
    return (
        f"CPU frequency governor {' and '.join(slow)}: clocks follow the load; "
        "set it with: sudo cpupower frequency-set --governor performance"
    )


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a core that is switched off
        return ""


def _memory() -> str | None:
    available = cpu.available_memory_bytes()
    if available >= SHORT_MEMORY_SHARE * cpu.memory_bytes():
        return None
    return f"only {available / 2**30:.1f} GiB of memory are available: close programs before tuning"


def _battery() -> str | None:
    try:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except OSError:  # a container that hides what the kernel knows of power supplies
        return None
    if battery is None or battery.power_plugged is not False:
        return None
    return "running on battery: clocks change with charge; connect the charger"


_LOOKS: tuple[Callable[[], str | None], ...] = (_load, _quota, _governor, _memory, _battery)


def _cards() -> Iterator[str]:
    for name, card in gpu.open_cards():
        if pids := card.pids():
            yield f"{name}: {len(pids)} processes have a context on it; stop them, or measure on another --device"
        if held := [reason for reason in card.throttle_reasons() if reason != "power cap"]:
            yield f"{name}: its clock is held down by {' and '.join(held)}; let it cool, and look at its power supply"


def _one_core() -> str | None:
    before = host.read_counters(None)
    shares = _spin(1)
    after = host.read_counters(None)
    if before.stolen_ticks is not None and after.stolen_ticks is not None and after.cpu_ticks and before.cpu_ticks:
        stolen = (after.stolen_ticks - before.stolen_ticks) / max(1, after.cpu_ticks - before.cpu_ticks)
        if stolen > MAX_SHARE:
            return f"the host of this virtual machine took {stolen:.0%} of its CPU time: ask for dedicated cores"
    if shares and shares[0] > MAX_SHARE:
        return f"a busy loop waited for a free core for {shares[0]:.0%} of its time: other work runs here; stop it"
    return None


def _all_cores() -> str | None:
    cores = cpu.usable_cores()
    shares = _spin(cores) if cores > 1 else []
    if not shares or max(shares) <= MAX_SHARE:
        return None
    return (
        f"with all {cores} cores busy, one waited {max(shares):.0%} of its time: threads that wait for each other then "
        f"get many times slower; use --threads {cores - 1}, or stop other work"
    )


def _spin(processes: int) -> list[float]:
    """Share of waiting of each of some processes that are busy at once; nothing where the system does not tell."""
    if not Path("/proc/self/schedstat").is_file():
        return []
    command = [sys.executable, "-S", "-c", _SPIN]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    printed = [process.communicate()[0] for process in started]
    return [float(share) for share in printed if share.strip()]
