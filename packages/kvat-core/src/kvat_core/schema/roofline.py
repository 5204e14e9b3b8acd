"""What bounds a candidate physically: what it makes of the model, and what the machine can do at most."""

from __future__ import annotations

from pydantic import Field

from kvat_core.schema._base import Record


class Footprint(Record):
    """What a candidate makes of the model in one scenario, as far as bytes and operations follow from it.

    A value that nobody has verified for such a candidate is null: *no prediction*, never a guess.
    """

    dtype: str = Field(description="of weights and activations")
    element_bytes: int = Field(gt=0, description="of a weight or an activation")
    kv_element_bytes: float = Field(gt=0, description="of a key's or value's number, its share of scales included")
    reserved_tokens: int | None = Field(
        default=None, description="positions that the cache has per request from the start; null = it grows"
    )
    prefill_bytes: int | None = Field(
        default=None, description="alive in prefill at its widest, without weights and KV cache"
    )
    step_bytes: int | None = Field(
        default=None, description="alive in the last decode step at its widest, without weights and KV cache"
    )
    threads: int | None = Field(default=None, description="CPU threads; null = not the engine's business")


class Ceiling(Record):
    """A rate, measured several times."""

    best: float = Field(gt=0, description="the best of the repeats: what bounds")
    median: float = Field(gt=0, description="of the repeats: how steady the best is")


class Ceilings(Record):
    """What this machine can do at most, with the threads that the run uses."""

    threads: int | None = Field(default=None, description="CPU threads; null = not the engine's business")
    read_bytes_per_s: Ceiling = Field(description="a buffer far larger than any cache is read")
    copy_bytes_per_s: Ceiling = Field(description="such a buffer is copied; what is read and what is written counts")
    gemm_flop_per_s: dict[str, Ceiling] = Field(description="by dtype: two large square matrices are multiplied")
    to_device_bytes_per_s: Ceiling | None = Field(
        default=None, description="from locked memory of the host; null where the device has none of its own"
    )
    from_device_bytes_per_s: Ceiling | None = Field(default=None, description="to locked memory of the host")
    launch_floor_s: Ceiling = Field(description="time of an operation on almost nothing, in a queue of many")
    cache_bytes: int | None = Field(
        default=None, description="last-level cache, from which smaller models are read faster than from memory"
    )
    first_call_bytes: int | None = Field(
        default=None,
        description="host memory that the first call of a process takes whatever the model, most of it library code",
    )
