"""What a live model and its cache are, read from the objects themselves."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

_BACKENDS = {"QuantoQuantizedLayer": "quanto", "HQQQuantizedLayer": "hqq", "Fp8QuantizedLayer": "fp8"}
"""Class of a quantised layer to the back-end that it stands for."""


@dataclass(frozen=True)
class Layer:
    """One layer of a live cache."""

    kind: str
    sliding: bool
    slots: int
    """Positions that its tensors hold: allocated ones of a static layer, stored ones of a dynamic layer."""
    dtype: str
    device: str
    quantised: Mapping[str, Any] | None = None
    """What it says of its quantisation, in the words of `cache_config`; None where numbers are kept as they are."""
    packed: str | None = None
    """Type of the numbers that it really keeps for the older tokens."""


@dataclass(frozen=True)
class StateLayer:
    """One layer of a live cache that keeps a state of fixed size instead of keys and values."""

    kind: str


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; asking does not import the compiler."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def layer_of(layer: Any) -> Layer | StateLayer:
    """What a layer of a live cache is."""
    if getattr(layer, "keys", None) is None:
        return StateLayer(kind=type(layer).__name__)
    quantised = _quantisation(layer)
    return Layer(
        kind=type(layer).__name__,
        sliding=bool(layer.is_sliding),
        slots=int(layer.keys.shape[-2]) if quantised is None else int(layer.get_seq_length()),
        dtype=name_of(layer.keys.dtype),
        device=name_of(layer.keys.device),
        quantised=quantised,
        packed=None if quantised is None else _packed(layer._quantized_keys),
    )


def _quantisation(layer: Any) -> Mapping[str, Any] | None:
    backend = _BACKENDS.get(type(layer).__name__)
    if backend is None:
        return None
    of_groups = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
    return {"backend": backend, **{name: getattr(layer, name) for name in of_groups if hasattr(layer, name)}}


def _packed(quantised: Any) -> str:
    """Type of packed numbers: of quanto's own tensors, or of a tensor beside what it takes to unpack it."""
    if hasattr(quantised, "qtype"):
        return str(quantised.qtype.name)
    tensor, how = quantised
    return f"{how['nbits']} bits" if isinstance(how, Mapping) else name_of(tensor.dtype)


def homes(model: PreTrainedModel) -> dict[str, torch.device]:
    """Where Transformers says that each module is; empty where all are on one device."""
    device_map: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    return {name: torch.device(home) for name, home in device_map.items()}


def spread(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Devices over which Transformers says to have spread the modules; None where they are all on one."""
    found = homes(model)
    return names_of(found.values()) if found else None


def strays(model: PreTrainedModel) -> tuple[str, ...]:
    """Weights that are on another device than Transformers says."""
    found = homes(model)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if any(
            name_of(parameter.device) != name_of(home)
            and (not module or name == module or name.startswith(f"{module}."))
            for module, home in found.items()
        )
    )


def compile_mode(model: PreTrainedModel) -> str:
    """Mode of the compiled forward that generate left on the model, or ``off``."""
    left = vars(model)
    if "_compiled_call" not in left:
        return "off"
    config = left.get("_last_compile_config")
    return "unknown" if config is None else str(config.mode)


def name_of(value: Any) -> str:
    """A dtype or a device in a word."""
    # There is one mps device, and torch writes its number on tensors only.
    return str(value).removeprefix("torch.").replace("mps:0", "mps")


def dtypes_by_bytes(model: PreTrainedModel) -> tuple[str, ...]:
    """Dtypes of the weights, by how many bytes each holds."""
    held: Counter[str] = Counter()
    for parameter in model.parameters():
        held[name_of(parameter.dtype)] += parameter.nbytes
    return tuple(dtype for dtype, _ in held.most_common())


def names_of(values: Iterable[Any]) -> tuple[str, ...]:
    """The same of several, each once."""
    return tuple(sorted({name_of(value) for value in values}))
