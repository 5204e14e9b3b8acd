"""Memory for a call of a loaded model, in the terms of a plan's peaks, which are those of whole processes.

A plan says what has to be free before a process is started. Here the process is there, and holds a good part of that
already. So what it holds for the model counts as free.
"""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

from kvat_core.probes.cpu import available_memory_bytes
from kvat_core.schema import Plan


def device_bytes(model: PreTrainedModel) -> int | None:
    """What a process with this model alone could have of its CUDA devices; None where it is on none."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if not devices:
        return None
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    own = sum(storage.nbytes() for storage in storages.values() if storage.device in devices)
    return own + sum(_unused_bytes(device) for device in devices)


def _unused_bytes(device: torch.device) -> int:
    """Free on the device, or kept by torch's allocator for whoever asks next."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_bytes(plan: Plan) -> int | None:
    """What a process with the plan's model alone could have of main memory; None where the plan does not tell its size.

    Of what this process holds, as much counts as the measured one held before its calls: libraries and weights. Pages
    that are mapped from files are left out, since they count as available.
    """
    ready = [one.ready_host_bytes for candidate in plan.candidates for one in candidate.scenarios]
    largest = max((size for size in ready if size is not None), default=None)
    return None if largest is None else available_memory_bytes() + min(_own_bytes(), largest)


def _own_bytes() -> int:
    """Resident and not mapped from a file, where the system tells these apart."""
    held = psutil.Process().memory_info()
    return int(held.rss - getattr(held, "shared", 0))
