"""NVIDIA accelerators, through NVML where it is present."""

from __future__ import annotations

import pynvml

from kvat_core.schema import Gpu


def gpus() -> tuple[Gpu, ...]:
    """The cards of this machine in NVML's order; none where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Gpu(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                driver=driver,
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()
