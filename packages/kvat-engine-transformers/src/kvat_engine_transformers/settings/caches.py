"""The values of the cache knob: what Transformers is told for each of them, and what it then has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue


@dataclass(frozen=True)
class CacheKind:
    """One value of the knob."""

    implementation: str | None
    """`cache_implementation` of `generate`; None: the paged cache of `generate_batch`."""
    holds: str
    """Class of the live cache."""
    static: bool = False
    """Whether all slots are there from the start."""
    offloads: bool = False
    """Whether layers that are not in use wait in the memory of the host."""
    quantised: Mapping[str, JsonValue] = field(default_factory=dict)
    """Back-end, bits and axes of a quantised cache: the part of `cache_config` that is no knob of its own."""

    @property
    def grouped(self) -> bool:
        """Whether numbers share a scale in groups, and the newest tokens stay unquantised for a while."""
        return "nbits" in self.quantised


def _quantised(backend: str, bits: int | None = None, axis: int | None = None) -> CacheKind:
    grouped: dict[str, JsonValue] = {} if bits is None else {"nbits": bits, "axis_key": axis, "axis_value": axis}
    return CacheKind("quantized", "QuantizedCache", quantised={"backend": backend, **grouped})


CACHES = {
    "dynamic": CacheKind("dynamic", "DynamicCache"),
    "static": CacheKind("static", "StaticCache", static=True),
    "offloaded": CacheKind("offloaded", "DynamicCache", offloads=True),
    "offloaded_static": CacheKind("offloaded_static", "StaticCache", static=True, offloads=True),
    # Axes as Transformers documents them for each back-end (docs, "Cache strategies").
    "quanto_int4": _quantised("quanto", 4, 0),
    "quanto_int2": _quantised("quanto", 2, 0),
    "hqq_int8": _quantised("hqq", 8, 1),
    "hqq_int4": _quantised("hqq", 4, 1),
    "hqq_int2": _quantised("hqq", 2, 1),
    "fp8": _quantised("fp8"),
    "paged": CacheKind(None, "PagedAttentionCache"),
}

GROUPED = tuple(name for name, kind in CACHES.items() if kind.grouped)
OF_GENERATE = tuple(name for name, kind in CACHES.items() if kind.implementation is not None)
CHUNKED = tuple(name for name in OF_GENERATE if not CACHES[name].quantised)
"""Caches that take a prompt in chunks; a quantised one would be asked to quantise the same tokens again and again."""
COMPILED = tuple(name for name, kind in CACHES.items() if kind.static and not kind.offloads)
"""Caches with which `generate` compiles the model."""

GROUP_SIZE, RESIDUAL_LENGTH = 64, 128
"""What a grouped cache of Transformers has if nobody says otherwise."""
