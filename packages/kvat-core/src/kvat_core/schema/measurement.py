"""What comes back from a worker: timelines, proofs, resources and failures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from kvat_core.schema._base import Record


class RequestTiming(Record):
    """One request of a timed call, from its start to its last token."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float = Field(description="request start to first token on the host; tokenisation apart")
    e2e_s: float = Field(description="request start to last token on the host")
    token_gaps_s: tuple[float, ...] | None = Field(
        description="time between consecutive tokens, one fewer than output tokens; null where only totals are known"
    )


class Timeline(Record):
    """One call as the adapter saw it."""

    clock: Literal["host", "engine"]
    duration_s: float = Field(description="the whole call, on the same clock")
    requests: tuple[RequestTiming, ...]
    compilations: int = Field(default=0, ge=0, description="graphs compiled during the call")


class Sample(Timeline):
    """One timed call in its place in the run: the unit of the journal."""

    launch: int
    round: int
    candidate: str
    scenario: str
    index: int = Field(ge=0)


class Applied(Record):
    """What an untimed proof call read back from the live engine."""

    values: dict[str, JsonValue] = Field(description="equal values in two candidates make them aliases")
    mismatches: tuple[str, ...] = Field(
        default=(), description="what differs from the recipe; any makes a trial invalid"
    )


class Resources(Record):
    """Peak memory since the engine was loaded; null where the engine cannot tell."""

    processes: tuple[str, ...] = Field(description="what was counted, by role: never a host or user name")
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    kv_cache_bytes: int | None = Field(default=None, description="bytes held by the live KV cache of the last call")


FailureKind = Literal[
    "oom_device",
    "oom_host",
    "timeout",
    "crash",
    "device_error",
    "error",
    "no_output",
    "unkillable",
    "unsupported",
    "not_applied",
    "wrong_output",
    "invalid_output",
    "leak",
    "interrupted",
]


class Failure(Record):
    """How a candidate ended, if not with samples. Failed is infeasible, never slow."""

    kind: FailureKind
    phase: str = Field(description="what was being done: start, load, prepare, prove, warm-up, sample, resources …")
    reason: str
    stderr_tail: str = ""
