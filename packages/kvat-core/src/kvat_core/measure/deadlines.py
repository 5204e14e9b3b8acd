"""How long each phase of a launch may take before its worker is ended."""

from __future__ import annotations

from kvat_core.schema import Record


class Deadlines(Record):
    """Seconds per phase. They end what hangs; they are no judgement of what is slow."""

    start_s: float = 300.0
    """Spawn and import of the engine's libraries."""
    load_s: float = 600.0
    download_s: float = 86_400.0
    """Describing a model that may have to be fetched first."""
    first_call_s: float = 1800.0
    """First call of a cell, which may compile."""
    call_s: float = 1800.0
    other_s: float = 120.0
    """Everything that should be immediate."""
