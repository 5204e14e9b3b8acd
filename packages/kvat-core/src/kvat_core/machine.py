"""This machine, as far as results depend on it."""

from __future__ import annotations

import platform

from kvat_core.probes import cpu, gpu
from kvat_core.schema import Machine, digest


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
