"""The traffic to tune for: scenarios, objective and prompt source make a profile."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from kvat_core.schema._base import FORMAT, Record


class Scenario(Record):
    """One shape of request: a closed batch of prompts with an exact number of output tokens each."""

    prompt_tokens: int = Field(ge=1, description="of a batch of unequal prompts, those of the longest")
    output_tokens: int = Field(ge=2, description="at least 2: a decode rate needs a gap between two tokens")
    batch_size: int = Field(default=1, ge=1)
    shortest_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="of a batch, the shortest prompt: lengths are spread evenly from it to the longest, and an engine "
        "that computes them together pads them on the left; null = all are equal",
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="share of this shape in the traffic, relative to the others"
    )

    @model_validator(mode="after")
    def _unequal_in_a_batch(self) -> Self:
        shortest = self.shortest_prompt_tokens
        if shortest is not None and (self.batch_size < 2 or shortest >= self.prompt_tokens):
            raise ValueError("shortest_prompt_tokens is of a batch of 2 or more, and less than prompt_tokens")
        return self

    @property
    def key(self) -> str:
        """Name of the shape in journal and report, independent of its weight."""
        unequal = "" if self.shortest_prompt_tokens is None else f"from{self.shortest_prompt_tokens}"
        return f"{self.prompt_tokens}+{self.output_tokens}x{self.batch_size}{unequal}"

    @classmethod
    def of_key(cls, key: str) -> Scenario:
        """The shape of that name.

        Raises:
            ValueError: no shape has it.
        """
        if (found := re.fullmatch(r"(\d+)\+(\d+)x(\d+)(?:from(\d+))?", key)) is None:
            raise ValueError(f"{key!r} names no scenario")
        prompt, output, batch = map(int, found.groups()[:3])
        shortest = None if found[4] is None else int(found[4])
        return cls(prompt_tokens=prompt, output_tokens=output, batch_size=batch, shortest_prompt_tokens=shortest)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt of the batch, the shortest first."""
        shortest = self.prompt_tokens if self.shortest_prompt_tokens is None else self.shortest_prompt_tokens
        steps = max(1, self.batch_size - 1)
        return tuple(shortest + row * (self.prompt_tokens - shortest) // steps for row in range(self.batch_size))

    @property
    def total_tokens(self) -> int:
        """Positions that one request occupies in the cache, padding included."""
        return self.prompt_tokens + self.output_tokens

    def reshaped(self, *, prompt_tokens: int | None = None, batch_size: int | None = None) -> Scenario:
        """The same with another longest prompt or batch; the shortest prompt keeps its share of the longest."""
        longest, size = prompt_tokens or self.prompt_tokens, batch_size or self.batch_size
        shortest = self.shortest_prompt_tokens and max(1, self.shortest_prompt_tokens * longest // self.prompt_tokens)
        unequal = shortest if size > 1 and shortest is not None and shortest < longest else None
        return self.model_copy(update={"prompt_tokens": longest, "batch_size": size, "shortest_prompt_tokens": unequal})


class Objective(Record):
    """Weights of the score: each metric counts as a ratio to the incumbent, raised to its share."""

    ttft: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="time to first token")
    decode: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="decode tokens per second")
    memory: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="peak of the memory that binds")
    stability: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="p95 / p50 of the token gaps")
    context: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="longest context in tokens")

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if sum(self.shares().values()) <= 0:
            raise ValueError("at least one weight must be positive")
        return self

    def shares(self) -> dict[str, float]:
        """Weight per metric, as given."""
        return {
            "ttft": self.ttft,
            "decode": self.decode,
            "memory": self.memory,
            "stability": self.stability,
            "context": self.context,
        }


MOST_PERCENTILE = 99.999
"""Beyond it a limit would take more than 300 000 calls to pass."""


class Limit(Record):
    """A value that a share of the timed calls has to keep. A batch is one call, as its requests share their steps."""

    value: float = Field(gt=0, allow_inf_nan=False, description="in the unit of the key that holds the limit")
    percentile: float = Field(
        default=50.0,
        gt=0,
        le=MOST_PERCENTILE,
        allow_inf_nan=False,
        description="share of the calls, in %, that has to be at the value or better; 50 is the median",
    )


class Limits(Record):
    """What a candidate has to keep in every scenario to be recommended; null = no limit."""

    max_device_bytes: int | None = Field(default=None, gt=0, description="peak of the device's own memory")
    max_host_bytes: int | None = Field(default=None, gt=0, description="peak resident size")
    max_ttft_s: Limit | None = Field(default=None, description="time to first token; of a batch, the slowest request")
    max_tpot_s: Limit | None = Field(default=None, description="time per output token; of a batch, the mean")
    min_decode_tps: Limit | None = Field(
        default=None,
        description="decode rate, of a batch all requests together; that share of calls is at least as fast",
    )
    min_context_tokens: int | None = Field(default=None, gt=0, description="prompt and output together")
    max_kl_nats: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="mean KL divergence from the reference; null = 0.01",
    )
    allow_lossy: bool | None = Field(
        default=None, description="whether whatever it loses a candidate may be recommended; null = no"
    )

    def replaced_by(self, others: Limits) -> Limits:
        """These limits, with those that others set in their place."""
        return self.model_copy(update={name: limit for name, limit in others if limit is not None})


class PromptSource(Record):
    """Where the text of the prompts comes from. The text itself is in no output of a run."""

    kind: Literal["preset", "text", "file"]
    value: str | None = Field(
        description="preset name, the text, or the file's path; null in outputs for the latter two"
    )

    def redacted(self) -> PromptSource:
        """The same source without anything a user wrote."""
        return self if self.kind == "preset" else self.model_copy(update={"value": None})


class Profile(Record):
    """A kind of traffic, what counts in it, and how often to measure."""

    format: Literal[1] = FORMAT
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    scenarios: tuple[Scenario, ...] = Field(min_length=1)
    objective: Objective
    limits: Limits = Limits()
    prompt: PromptSource = PromptSource(kind="preset", value="chat")
    launches: int = Field(
        default=3, ge=1, le=100, description="loads of the model per candidate: the unit of replication"
    )
    samples: int = Field(default=3, ge=1, le=1000, description="timed calls per launch, candidate and scenario")
    warmup: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="warm-up calls, more where code is compiled; null = the engine's own number",
    )

    @field_validator("scenarios")
    @classmethod
    def _distinct(cls, scenarios: tuple[Scenario, ...]) -> tuple[Scenario, ...]:
        if len({scenario.key for scenario in scenarios}) < len(scenarios):
            raise ValueError("two scenarios have the same prompts, output and batch size")
        return scenarios

    def redacted(self) -> Profile:
        """The profile as it may be written to a journal or a plan."""
        return self.model_copy(update={"prompt": self.prompt.redacted()})
