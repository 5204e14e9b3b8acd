"""The contract of a search."""

from __future__ import annotations

from typing import Protocol

from kvat_core.run import Run
from kvat_core.schema import LaunchOrder


class Search(Protocol):
    """Asked "what next?" after every launch. Equal journals give equal answers, so runs can be replayed."""

    def next(self, run: Run) -> LaunchOrder | None:
        """The next launch, or None when enough is known."""

    def remaining(self, run: Run) -> int:
        """Launches still to come if nothing fails, for the display."""
