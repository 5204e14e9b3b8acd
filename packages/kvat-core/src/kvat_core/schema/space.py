"""The search space: knobs with values, candidates made of them, recipes that carry them out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, JsonValue

from kvat_core.schema._base import Record, digest

Space = Literal["safe", "default", "full"]
SPACES: tuple[Space, ...] = ("safe", "default", "full")
"""From the smallest to the largest; each contains the one before."""


class KnobValue(Record):
    """One value of a knob, and all that core has to know of it to filter, compare and explain."""

    name: str
    space: Space = Field(description="smallest space that tries this value")
    lossy: bool = Field(default=False, description="may change the model's output beyond rounding")
    shares_state: bool = Field(default=False, description="shares state between requests")
    simplicity: int = Field(default=0, ge=0, description="breaks ties: 0 is what the engine does by itself")
    compiles: bool = Field(default=False, description="compiles code before it is at speed")
    unavailable: str | None = Field(default=None, description="why this value cannot run here; null = it can")


class Knob(Record):
    """A setting of the engine. Core enumerates and explains knobs; it never branches on a name."""

    name: str
    values: tuple[KnobValue, ...] = Field(min_length=1)
    default: str = Field(description="the engine's own default: what the incumbent has")
    when: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="active only where each named knob has one of these values"
    )

    def value(self, name: str) -> KnobValue | None:
        """The value of that name, or None."""
        return next((value for value in self.values if value.name == name), None)


class Candidate(Record):
    """One combination of settings: a value for every knob, the inactive ones at their default."""

    id: str
    label: str
    settings: dict[str, str]
    lossy: bool = Field(default=False, description="may lose output that what runs today does not")
    exact: bool = Field(default=True, description="loses nothing that its reference does not lose as well")
    compiles: bool = False
    complexity: int = Field(default=0, ge=0, description="sum of its values' simplicity ranks; less is simpler")


class ContextCall(Record):
    """A context manager to enter around the call: dotted name and JSON arguments."""

    name: str
    arguments: tuple[JsonValue, ...] = ()


class Recipe(Record):
    """Exactly what is done for a candidate in a scenario: executed by the adapter, printed by the snippet."""

    environment: dict[str, str] = Field(default_factory=dict, description="set before the worker imports anything")
    load: dict[str, JsonValue] = Field(description="arguments of load_model; with environment, the key of a launch")
    setup: dict[str, JsonValue] = Field(default_factory=dict, description="engine state to set after load, undoable")
    context: tuple[ContextCall, ...] = Field(default=(), description="entered in order around each call")
    call: str = Field(description="the engine's function that is timed")
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    warmup: int = Field(default=1, ge=1, description="untimed calls of the timed shape before the first sample")
    compiles: bool = False

    def warmup_calls(self, asked: int | None) -> int:
        """Warm-up calls when a profile asks for a number; what compiles is never warmed up less than it needs."""
        if asked is None:
            return self.warmup
        return max(asked, self.warmup) if self.compiles else asked

    @property
    def load_key(self) -> str:
        """Candidates whose recipes share this key may share one launch."""
        return digest({"environment": self.environment, "load": self.load})

    @property
    def key(self) -> str:
        """Candidates whose recipes share this key are one candidate."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return digest(data)
