"""This machine: what results depend on, and what disturbs them."""

from __future__ import annotations

import os
import platform

import psutil

from kvat_core.probes import cpu, gpu
from kvat_core.schema import Machine, digest

BUSY_LOAD_PER_CORE = 0.5
"""Load average per core above which another process is likely to share a core with the measurement."""
SHORT_MEMORY_SHARE = 0.1
"""Share of main memory that should be free before anything is loaded."""


def read_machine(device: str, threads: int | None, device_memory_bytes: int | None = None) -> Machine:
    """Describe this machine for a run.

    Args:
        device: what is measured on.
        threads: CPU threads that are used; None = not the engine's business.
        device_memory_bytes: the device's own memory, None if it has none.
    """
    facts = {
        "device": device,
        "cpu": cpu.cpu_name(),
        "cores": cpu.usable_cores(),
        "threads": threads,
        "memory_bytes": cpu.memory_bytes(),
        "device_memory_bytes": device_memory_bytes,
        "gpus": [one.model_dump() for one in gpu.gpus()],
        "os": f"{platform.system()} {platform.release()}",
    }
    return Machine.model_validate({**facts, "fingerprint": digest(facts, 16), "python": platform.python_version()})


def warnings() -> list[str]:
    """What makes measurements on this machine noisy right now, one line each with what to do."""
    return [finding for finding in (_load(), _memory(), _battery()) if finding is not None]


def _load() -> str | None:
    load, cores = os.getloadavg()[0], cpu.usable_cores()
    if load <= BUSY_LOAD_PER_CORE * cores:
        return None
    return f"load average {load:.1f} on {cores} cores: other work slows measurements; stop it, or use fewer --threads"


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
