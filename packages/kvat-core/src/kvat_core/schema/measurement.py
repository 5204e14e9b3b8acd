"""What comes back from a worker: timelines, proofs, resources and failures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from kvat_core.schema._base import Record


class RequestTiming(Record):
    """One request of a timed call, from its start to its last token; or several, where a batch moves in step."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float = Field(description="request start to first token; tokenisation apart")
    e2e_s: float = Field(description="request start to last token")
    token_gaps_s: tuple[float, ...] | None = Field(
        description="time between consecutive tokens, one fewer than output tokens; null where only totals are known"
    )
    count: int = Field(default=1, ge=1, description="requests of this call that have these very figures")


class Timeline(Record):
    """One call as the adapter saw it."""

    clock: Literal["host", "device", "engine"] = Field(
        description="whose: of the calling process, of the device by events in its queue, or the engine's own account"
    )
    duration_s: float = Field(description="the whole call, on the same clock")
    requests: tuple[RequestTiming, ...]
    compilations: int = Field(default=0, ge=0, description="graphs compiled during the call")


class GpuConditions(Record):
    """What the driver told of the card around a call; null where it does not."""

    clock_mhz: int | None = Field(default=None, description="of the streaming multiprocessors, right after the call")
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    foreign_processes: int | None = Field(default=None, description="others that have a context on this card")
    energy_j: float | None = Field(default=None, description="that the whole card took during the call")


class Conditions(Record):
    """What the system told from outside a timed call: the only grounds on which one is rejected. Null = not told."""

    window_s: float = Field(description="between the two readings around the call")
    load_average: float | None = Field(default=None, description="of the last minute")
    steal_share: float | None = Field(default=None, description="of this machine's CPU time that its host took away")
    waiting_share: float | None = Field(
        default=None, description="of the time that the worker's threads could run, spent waiting for a free core"
    )
    cpu_pressure: float | None = Field(default=None, description="share of the window in which some task lacked a core")
    memory_pressure: float | None = Field(default=None, description="… waited for memory")
    io_pressure: float | None = Field(default=None, description="… waited for a disk")
    major_faults: int | None = Field(default=None, description="pages of the worker that had to come from a disk")
    gpu: GpuConditions | None = Field(default=None, description="null where no NVIDIA card is measured on")


class Sample(Timeline):
    """One timed call in its place in the run: the unit of the journal."""

    launch: int
    round: int
    candidate: str
    scenario: str
    index: int = Field(ge=0, description="attempt in its launch, rejected ones counted")
    conditions: Conditions | None = None
    distrust: tuple[str, ...] = Field(default=(), description="why it is rejected; empty = it is used")


class Applied(Record):
    """What an untimed proof call read back from the live engine."""

    values: dict[str, JsonValue] = Field(description="equal values in two candidates make them aliases")
    mismatches: tuple[str, ...] = Field(
        default=(), description="what differs from the recipe; any makes a trial invalid"
    )


class Resources(Record):
    """Peak memory of the calls since the candidate was set up; null where the engine cannot tell."""

    processes: tuple[str, ...] = Field(description="what was counted, by role: never a host or user name")
    peak_host_bytes: int | None = Field(default=None, description="peak resident size")
    ready_host_bytes: int | None = Field(default=None, description="resident size before the first of these calls")
    pinned_host_bytes: int | None = Field(default=None, description="peak of host memory that is locked for a device")
    peak_device_bytes: int | None = Field(default=None, description="the largest of the three that follow")
    device_allocated_bytes: int | None = Field(default=None, description="peak in use by the engine's allocator")
    device_reserved_bytes: int | None = Field(default=None, description="peak held by the engine's allocator")
    device_process_bytes: int | None = Field(
        default=None, description="of the whole process by the driver, after the calls: context and libraries included"
    )
    kv_cache_bytes: int | None = Field(default=None, description="bytes held by the live KV cache of the last call")
    kv_cache_predicted_bytes: int | None = Field(
        default=None, description="what the model's shape says that the KV cache holds; null = no prediction"
    )


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
