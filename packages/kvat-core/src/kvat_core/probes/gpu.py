"""NVIDIA accelerators, through NVML where it is present."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from kvat_core.schema import Gpu

_Value = TypeVar("_Value")

_THROTTLE_REASONS = {
    "power cap": "nvmlClocksThrottleReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "thermal slowdown": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}


def gpus() -> tuple[Gpu, ...]:
    """The cards of this machine in NVML's order; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = _known(pynvml.nvmlSystemGetDriverVersion)
        return tuple(_gpu(index, driver) for index in range(_known(pynvml.nvmlDeviceGetCount) or 0))
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, driver: str | None) -> Gpu:
    handle = _known(lambda: pynvml.nvmlDeviceGetHandleByIndex(index))
    name = _known(lambda: str(pynvml.nvmlDeviceGetName(handle)))
    memory_bytes = _known(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    return Gpu(name=name or "unknown", memory_bytes=memory_bytes, driver=driver)


class Card:
    """One card as its driver sees it; every answer is None where the driver does not tell.

    Args:
        handle: NVML's handle, from `open_card`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def clock_mhz(self) -> int | None:
        """Present clock of the streaming multiprocessors."""
        return _known(lambda: int(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)))

    def temperature_c(self) -> int | None:
        """Temperature of the chip."""
        sensor = pynvml.NVML_TEMPERATURE_GPU
        return _known(lambda: int(pynvml.nvmlDeviceGetTemperature(self._handle, sensor)))

    def throttle_reasons(self) -> tuple[str, ...]:
        """What keeps the clock down right now, idleness apart."""
        bits = _known(lambda: int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))) or 0
        return tuple(reason for reason, name in _THROTTLE_REASONS.items() if bits & int(getattr(pynvml, name)))

    def energy_mj(self) -> int | None:
        """Millijoules that the whole card has taken since its driver was loaded."""
        return _known(lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)))

    def process_bytes(self, pid: int) -> int | None:
        """Memory that a process holds on the card, its context included; None where its id is another one there."""
        return self._bytes_by_pid().get(pid)

    def pids(self) -> frozenset[int]:
        """Processes that compute on the card."""
        return frozenset(self._bytes_by_pid())

    def _bytes_by_pid(self) -> dict[int, int | None]:
        processes = _known(lambda: list(pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle))) or []
        return {int(process.pid): process.usedGpuMemory for process in processes}


def open_cards() -> list[tuple[str, Card]]:
    """All cards with their names; none where there is no driver."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [(str(pynvml.nvmlDeviceGetName(handle)), Card(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []


def open_card(uuid: str | None) -> Card | None:
    """The card of that UUID; None without one. NVML stays loaded for as long as this process lives."""
    if uuid is None:
        return None
    try:
        pynvml.nvmlInit()
        return Card(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:
        return None


def _known(ask: Callable[[], _Value]) -> _Value | None:
    """What the driver answers; None for what this card or driver does not tell."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None
