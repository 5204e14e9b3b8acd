"""Which devices are there, and what each of them cannot do."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence

import torch
from pydantic import JsonValue

from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.probes.control_group import quota_cores
from kvat_core.probes.cpu import available_memory_bytes, usable_cores
from kvat_engine_transformers.settings import libraries, placement

_DISTRIBUTIONS = ("torch", "transformers", "triton")


def probe_device(device: str | None, options: Mapping[str, str]) -> Probe:
    """The device to use, and for each thing that it cannot do the reason.

    Raises:
        UsageError: the device is unknown or not there, or the options cannot be carried out.
    """
    placement.require_possible(options)
    chosen = _choose(device)
    if "device_map" in options and chosen != _present()[0]:
        raise UsageError(
            f"device_map begins with {_present()[0]}, not with {chosen}; leave --device out, and choose among CUDA "
            "devices with CUDA_VISIBLE_DEVICES"
        )
    used = used_devices(chosen, options)
    for one in used:
        _use(one)
    facts = _cuda_facts(torch.device(chosen)) if chosen.startswith("cuda") else _other_facts(chosen)
    return Probe(
        device=chosen,
        threads=_threads(),
        device_memory_bytes=_own_memory_bytes(used),
        versions=_versions(),
        device_uuid=_uuid(chosen),
        facts={**facts, "free_bytes": free_bytes(used), "cores": usable_cores()},
    )


def used_devices(device: str, options: Mapping[str, str]) -> tuple[str, ...]:
    """The device, or with a `device_map` all of its kind."""
    kind = device.partition(":")[0]
    return tuple(one for one in _present() if one.partition(":")[0] == kind) if "device_map" in options else (device,)


def free_bytes(devices: Sequence[str]) -> int:
    """Memory that a model can still be loaded into, of all devices together."""
    if devices[0].startswith("cuda"):
        return sum(int(torch.cuda.mem_get_info(torch.device(device))[0]) for device in devices)
    return available_memory_bytes()


def _own_memory_bytes(devices: Sequence[str]) -> int | None:
    if not devices[0].startswith("cuda"):
        return None
    return sum(int(torch.cuda.get_device_properties(device).total_memory) for device in devices)


def _choose(asked: str | None) -> str:
    present = _present()
    if asked is None:
        return present[0]
    name = "cuda:0" if asked == "cuda" else asked
    if name in present:
        return name
    raise UsageError(f"device {asked} is not here; choose one of: {', '.join(present)}")


def _use(device: str) -> None:
    """Compute something small on the device and wait for it.

    Raises:
        UsageError: it does not work.
    """
    try:
        ones = torch.ones(512, 512, device=device)
        works = float((ones @ ones)[0, 0]) == 512.0
    except RuntimeError as error:
        raise UsageError(f"device {device} is there but does not work ({type(error).__name__})") from error
    if not works:
        raise UsageError(f"device {device} computes wrong results")


def _uuid(device: str) -> str | None:
    """As its driver is asked by; AMD's cards have none that NVML knows."""
    if not device.startswith("cuda") or torch.version.hip is not None:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _present() -> list[str]:
    """All devices, the best one first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def _threads() -> int:
    """Torch's own number, but one core stays free, and no more than the control group allows.

    OpenMP threads wait for each other by spinning; where any other process takes one of their cores, and be it the
    one that supervises the measurement, two threads on two cores were seen to be up to ninety times slower than one.
    """
    allowed = usable_cores() if quota_cores() is None else min(usable_cores(), int(quota_cores() or 1))
    return max(1, min(torch.get_num_threads(), allowed - 1))


def _versions() -> dict[str, str]:
    # The version of the build itself, which names the accelerator toolkit as well.
    return {**libraries.versions((*_DISTRIBUTIONS, *libraries.OPTIONAL)), "torch": torch.__version__}


def _other_facts(device: str) -> dict[str, JsonValue]:
    return {
        **{name: _dtype_reason(name, device) for name in ("bfloat16", "float16")},
        "compile": _cxx_reason() if device == "cpu" else None,
        **libraries.facts(device, _cxx_reason()),
    }


def _dtype_reason(name: str, device: str) -> str | None:
    try:
        ones = torch.ones(2, 2, dtype=getattr(torch, name), device=device)
        torch.mm(ones, ones)
    except (RuntimeError, TypeError):
        return f"{device} of this machine cannot compute in {name}"
    return None


def _cxx_reason() -> str | None:
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if any(shutil.which(compiler) for compiler in compilers if compiler):
        return None
    return "torch.compile needs a C++ compiler on the CPU and found none; install g++ or set CXX"


def _cuda_facts(device: torch.device) -> dict[str, JsonValue]:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    card = f"{properties.name} (compute capability {capability[0]}.{capability[1]})"
    modern = capability >= (8, 0) or torch.version.hip is not None
    return {
        "bfloat16": None if modern else f"{card} has no bfloat16 arithmetic",
        "sdpa_flash": None if modern else f"the flash kernel needs compute capability 8.0, {card} is older",
        "sdpa_cudnn": _cudnn_reason(card, modern),
        "compile": _triton_reason(card, capability >= (7, 0)),
        **libraries.facts("cuda", _cxx_reason()),
    }


def _cudnn_reason(card: str, modern: bool) -> str | None:
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    return None if modern else f"the cuDNN kernel needs compute capability 8.0, {card} is older"


def _triton_reason(card: str, supported: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on cuda, which is not installed"
    return None if supported else f"torch.compile needs compute capability 7.0, {card} is older"
