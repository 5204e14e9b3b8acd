"""The machine, as far as a result depends on it; anonymous by construction."""

from __future__ import annotations

from pydantic import Field

from kvat_core.schema._base import Record


class Gpu(Record):
    """One accelerator."""

    name: str
    memory_bytes: int | None = None
    driver: str | None = None


class Machine(Record):
    """Hardware and system that the figures belong to; no host, user or path."""

    fingerprint: str = Field(description="equal for runs whose figures may be compared")
    device: str = Field(description="what was measured on, e.g. cpu, cuda:0, mps")
    cpu: str
    cores: int = Field(description="cores this process may use")
    threads: int | None = Field(
        default=None, description="CPU threads that were used; null = not the engine's business"
    )
    memory_bytes: int
    device_memory_bytes: int | None = Field(
        default=None, description="of the device measured on; null where it has none of its own"
    )
    gpus: tuple[Gpu, ...] = ()
    os: str
    python: str
