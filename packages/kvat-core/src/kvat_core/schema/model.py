"""The model under test: how it is named, and what its shape tells without loading it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from kvat_core.schema._base import Record


class ModelRef(Record):
    """Which model, as the user named it."""

    id: str = Field(description="hub id, local directory, or an engine's own scheme such as builtin:llama")
    revision: str | None = Field(default=None, description="hub revision; null where there is none")
    allow_download: bool = Field(default=False, description="whether the engine may fetch missing files")


class ModelDimensions(Record):
    """By which a model is told from another one without its weights; null is what its metadata does not tell."""

    architecture: str = Field(description="in the engine's words")
    layers: int = Field(gt=0)
    kv_heads: int | None = None
    head_dim: int | None = None
    attention_heads: int | None = Field(default=None, description="query heads")
    hidden_size: int | None = Field(default=None, description="numbers per token between two layers")
    vocab_size: int | None = None
    sliding_window: int | None = Field(default=None, description="tokens; null without windowed layers")


class ModelShape(ModelDimensions):
    """What an engine knows of a model from its metadata alone.

    A value that the metadata cannot tell is null: *no prediction*, never a guess.
    """

    attention: tuple[Literal["full", "sliding", "other"], ...] = Field(description="kind per layer")
    mlp_size: int | None = Field(
        default=None, description="inner width of each layer's gated MLP; null where layers have another one, or differ"
    )
    max_context_tokens: int | None = Field(default=None, description="longest position, prompt and output together")
    dtype: str | None = Field(default=None, description="dtype the weights are stored in")
    quantization: str | None = Field(
        default=None, description="how the weights are stored packed, in the checkpoint's words; null for plain numbers"
    )
    weight_bytes: int | None = None
    parameters: int | None = Field(default=None, description="all of them")
    step_parameters: int | None = Field(
        default=None,
        description="read by each decode step whatever is decoded: not embedding tables, from which it takes single "
        "rows, and not experts, of which it takes some",
    )
    experts: int | None = Field(default=None, description="per layer that has any; null without experts")
    experts_per_token: int | None = Field(default=None, description="that a layer chooses for a token")
    expert_parameters: int | None = Field(default=None, description="of one expert in each of the layers that have any")
    weights: Literal["checkpoint", "random"] = "checkpoint"
    revision: str | None = Field(default=None, description="revision that was resolved, where the source has any")
    sha256: str | None = Field(default=None, description="digest of the weight files, where they are local")
    local: bool = Field(default=False, description="named by a path on this machine, which no output may show")
    has_tokenizer: bool = True
    facts: dict[str, JsonValue] = Field(
        default_factory=dict, description="what else the engine's `space` has to know of the model; opaque to core"
    )
