"""Many candidates in few words."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 3


def some_of(labels: Sequence[str]) -> str:
    """The first ones by their labels; more are counted."""
    more = len(labels) - _NAMED
    return "; ".join(labels[:_NAMED]) + (f" and {more} more" if more > 0 else "")
