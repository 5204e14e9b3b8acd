"""NVIDIA accelerators, through NVML where it is present."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pynvml

from kvat_core.schema import Gpu

_Value = TypeVar("_Value")


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


def _known(ask: Callable[[], _Value]) -> _Value | None:
    """What the driver answers; None for what this card or driver does not tell."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None
