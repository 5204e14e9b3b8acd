"""Fallbacks of a plan: the situation at run time, when a rule holds in it, and which candidate it names."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from typing_extensions import Self

from kvat_core.schema._base import Record
from kvat_core.schema.measurement import FailureKind

MARGIN_BYTES = 256 * 2**20
"""Least that has to be free beyond a measured peak: what else the process holds, and other processes take."""
MARGIN_SHARE = 0.02
"""The same as a share of the peak, where that is more."""

Setting = Annotated[str, Field(pattern="^[^=]+=", description="KNOB=VALUE, e.g. cache=static")]


def needed_bytes(peak_bytes: int) -> int:
    """Memory that has to be free, in bytes, before something with this measured peak is started."""
    return peak_bytes + max(MARGIN_BYTES, round(MARGIN_SHARE * peak_bytes))


class Situation(Record):
    """What is known at run time; of what is null nothing follows."""

    device_memory_free_bytes: int | None = Field(default=None, ge=0)
    host_memory_free_bytes: int | None = Field(default=None, ge=0)
    prompt_tokens: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    missing_features: tuple[Setting, ...] = Field(default=(), description="settings that cannot run here")
    error_kind: FailureKind | None = Field(default=None, description="how the winner ended here")
    requests: int | None = Field(default=None, ge=1, description="calls expected of one process; a batch is one")


class Condition(Record):
    """When a rule holds: if all its keys do; keys that it has not are left out of its JSON."""

    device_memory_free_below: int | None = Field(default=None, gt=0, description="bytes")
    host_memory_free_below: int | None = Field(default=None, gt=0, description="bytes")
    prompt_longer_than: int | None = Field(default=None, ge=0, description="tokens")
    prompt_at_most: int | None = Field(default=None, gt=0, description="tokens")
    batch_above: int | None = Field(default=None, ge=0, description="requests in one call")
    batch_at_most: int | None = Field(default=None, gt=0, description="requests in one call")
    feature_missing: Setting | None = None
    error_kind: FailureKind | None = None
    requests_below: int | None = Field(default=None, gt=0, description="calls of one process; a batch is one")

    @model_validator(mode="after")
    def _some_key(self) -> Self:
        if not self.keys():
            raise ValueError("a condition has at least one key")
        return self

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    def keys(self) -> dict[str, int | str]:
        """What has to hold, by key."""
        return {key: value for key, value in self if value is not None}

    def holds(self, situation: Situation) -> bool:
        """Whether all keys hold; one about something unknown does not."""
        return (
            _holds(operator.lt, situation.device_memory_free_bytes, self.device_memory_free_below)
            and _holds(operator.lt, situation.host_memory_free_bytes, self.host_memory_free_below)
            and _holds(operator.gt, situation.prompt_tokens, self.prompt_longer_than)
            and _holds(operator.le, situation.prompt_tokens, self.prompt_at_most)
            and _holds(operator.gt, situation.batch_size, self.batch_above)
            and _holds(operator.le, situation.batch_size, self.batch_at_most)
            and _holds(operator.lt, situation.requests, self.requests_below)
            and self.feature_missing in (None, *situation.missing_features)
            and self.error_kind in (None, situation.error_kind)
        )


def _holds(compare: Callable[[int, int], bool], known: int | None, limit: int | None) -> bool:
    return limit is None or (known is not None and compare(known, limit))


class Rule(Record):
    """A fallback: when the situation holds, use that measured candidate."""

    when: Condition
    use: str = Field(description="id of a candidate of the plan")
    because: str
    evidence: dict[str, int | float] = Field(
        default_factory=dict, description="measured figures that support it, with the unit in the key"
    )
