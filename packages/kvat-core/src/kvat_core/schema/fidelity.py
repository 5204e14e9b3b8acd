"""Whether a candidate says what its reference says, and whether it keeps requests apart."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvat_core.schema._base import Record

FidelityVerdict = Literal["exact", "close", "lossy", "broken", "not_meaningful"]
CanaryVerdict = Literal["clean", "leak", "undetermined"]


class FidelityLimits(Record):
    """How far from its reference a candidate may be, what runs today loses included."""

    kl_nats: float = Field(ge=0, description="at most")
    top1_agreement: float = Field(le=1, description="at least")


class Likeness(Record):
    """How near two ways to compute are in what they predict, on the same forced tokens, one after the other."""

    steps: int = Field(ge=1, description="tokens that were forced, of all requests together")
    kl_nats: float = Field(ge=0, description="mean over steps of KL(reference ‖ candidate)")
    kl_max_nats: float = Field(ge=0, description="the largest of a step")
    top1_agreement: float = Field(ge=0, le=1, description="share of steps in which both have the same first choice")
    first_divergence: int | None = Field(description="first step, from 0, in which they have not; null = none")
    first_clear_divergence: int | None = Field(
        description="the same where the reference prefers its first choice by more than 4 × rounding"
    )


class Rounding(Record):
    """By how much the reference differs from itself, computed in one pass instead of token by token."""

    choice_nats: float = Field(ge=0, description="largest difference of a log-probability of its first two choices")
    kl_nats: float = Field(ge=0, description="mean over steps of KL(token by token ‖ one pass)")


class Fidelity(Record):
    """A candidate against its reference: the plainest way to compute the same in the same precision."""

    prompt_tokens: int = Field(description="before the first token that was forced")
    text: Likeness = Field(description="with the prompt's own text going on")
    greedy: Likeness = Field(description="with what the reference itself chooses")
    rounding: Rounding | None = Field(description="null where the engine cannot compute in one pass")
    full_precision: Likeness | None = Field(
        default=None, description="the reference itself against full precision; null = it is that, or see lacks"
    )
    lacks: str | None = Field(default=None, description="why the reference was not held against full precision")
