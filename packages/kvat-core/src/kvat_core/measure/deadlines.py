"""How long each phase of a launch may take before its worker is ended."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from kvat_core.schema import Record


class Deadlines(Record):
    """Seconds per phase. They end what hangs; they are no judgement of what is slow."""

    start_s: float = Field(default=300.0, gt=0, description="spawn and import of the engine's libraries")
    load_s: float = Field(default=600.0, gt=0, description="describing, loading and preparing a model")
    download_s: float = Field(default=86_400.0, gt=0, description="describing a model that is fetched first")
    compile_s: float = Field(default=1800.0, gt=0, description="proof, and first calls, of what compiles code")
    first_token_s: float = Field(default=900.0, gt=0, description="start of a call to its first token")
    gap_s: float = Field(default=120.0, gt=0, description="one token to the next")
    sample_s: float = Field(default=3600.0, gt=0, description="a whole call")
    other_s: float = Field(default=120.0, gt=0, description="everything that should be immediate")
    grace_s: float = Field(default=10.0, gt=0, description="between SIGTERM and SIGKILL, and for the end after it")


@dataclass(frozen=True)
class Limits:
    """What one request may take; None where a phase has no meaning for it."""

    whole_s: float
    first_token_s: float | None = None
    gap_s: float | None = None
