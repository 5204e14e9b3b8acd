"""What is here that a plan was not made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvat_core.engine import Probe
from kvat_core.machine import read_machine
from kvat_core.schema import Gpu, Machine, ModelShape, Plan


def differences(plan: Plan, probe: Probe, shape: ModelShape) -> Iterator[str]:
    """Each thing by which figures of the plan may not hold, in words.

    Args:
        plan: as it was made.
        probe: of this machine.
        shape: of the model; weights are compared where both have a digest.
    """
    # The number of threads is the plan's choice, and not a fact of the machine.
    now = read_machine(probe.device, plan.machine.threads, probe.device_memory_bytes)
    yield from _of_machines(now, plan.machine)
    for name in sorted({*plan.engine.versions, *probe.versions}):
        before, found = plan.engine.versions.get(name, "none"), probe.versions.get(name, "none")
        if before != found:
            yield f"{name} {found} instead of {before}"
    if None not in (shape.sha256, plan.model.sha256) and shape.sha256 != plan.model.sha256:
        yield "weights with another digest"
    if shape.quantization != plan.model.quantization:
        yield f"quantisation {_shown(shape.quantization)} instead of {_shown(plan.model.quantization)}"
    if plan.model.dimensions is not None:
        for name, before in plan.model.dimensions:
            if before != (found := getattr(shape, name)):
                yield f"{name} {_shown(found)} instead of {_shown(before)}"


def _of_machines(now: Machine, before: Machine) -> Iterator[str]:
    names = (name for name in Machine.model_fields if name != "fingerprint")
    pairs = ((name, getattr(now, name), getattr(before, name)) for name in names)
    different = [(name, found, was) for name, found, was in pairs if found != was]
    for name, found, was in different:
        yield f"{name} {_shown(found)} instead of {_shown(was)}"
    if not different and now.fingerprint != before.fingerprint:
        yield f"fingerprint {now.fingerprint} instead of {before.fingerprint}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, Gpu):
        return value.name if value.driver is None else f"{value.name} with driver {value.driver}"
    return "none" if value is None else str(value)
