"""The name under which Transformers hands a cache in and back: `past_key_values` up to 5.23, `cache` from 5.24 on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import Cache

NAMES = ("cache", "past_key_values")


def named(names: Collection[str]) -> bool:
    """Whether a cache is among parameters or fields of these names."""
    return any(name in names for name in NAMES)


def cache_of(output: Any) -> Cache | None:
    """What `generate` has handed back beside its tokens; None where it is no cache, or nothing."""
    # Not by attribute: the old name is still there in new versions, and warns.
    found = next((output[name] for name in NAMES if name in output.keys()), None)  # noqa: SIM118 - of its own kind
    return found if isinstance(found, Cache) else None
