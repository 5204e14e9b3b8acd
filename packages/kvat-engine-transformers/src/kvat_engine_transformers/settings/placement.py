"""Engine options for models that no single device holds: what can be asked for, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from kvat_core.errors import UsageError

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

OPTIONS = {
    "device_map": f"spread the weights over all devices as Transformers does: {', '.join(DEVICE_MAPS)}",
    "tp_plan": "refused with its reason: tensor parallelism takes a process per device, kvat measures one",
}


def require_possible(options: Mapping[str, str]) -> None:
    """Refuse options that cannot be carried out, before anything is loaded.

    Raises:
        UsageError: a value is unknown, a library is missing, or a run of one process cannot do it.
    """
    if "tp_plan" in options:
        raise UsageError(
            "tp_plan takes one process per device that torchrun starts together, and kvat measures one process; "
            "use --engine-option device_map=auto for a model larger than one device"
        )
    asked = options.get("device_map")
    if asked is None:
        return
    if asked not in DEVICE_MAPS:
        raise UsageError(
            f"device_map is one of {', '.join(DEVICE_MAPS)}, not {asked!r}; a single device is named with --device"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("device_map needs accelerate, which is not installed; pip install accelerate")
