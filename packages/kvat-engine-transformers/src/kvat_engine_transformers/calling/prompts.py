"""Prompts of an exact length whose first tokens no other prompt has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from random import Random

import torch

from kvat_core.engine import EngineError
from kvat_core.schema import PromptSource

NONCE_TOKENS = 16
"""Length of the block that makes a prompt unique: the smallest block that prefix caches commonly share."""

PAD = -1
"""In place of an id, where a row of a batch has no token; no model has such an id."""

Encode = Callable[[str], Iterable[int]]


def prompt_ids(
    text_ids: Sequence[int], ordinary: Sequence[int], *, tokens: Sequence[int], nonce: int
) -> list[list[int]]:
    """Rows of exactly these numbers of ids: a random block, then the text, repeated or cut; padded on the left.

    Args:
        text_ids: ids of the text; without any, the random block goes on to the end.
        ordinary: ids to draw from, none of which has a special meaning.
        tokens: of each row, without what it is padded with.
        nonce: seed of the random blocks.
    """
    random = Random(nonce)
    longest = max(tokens)
    rows = []
    for length in tokens:
        block = min(length, NONCE_TOKENS) if text_ids else length
        body = islice(cycle(text_ids), length - block)
        rows.append([PAD] * (longest - length) + random.choices(ordinary, k=block) + list(body))
    return rows


def unpadded(prompt: torch.Tensor) -> list[list[int]]:
    """The ids of each row."""
    return [[token for token in row if token != PAD] for row in prompt.tolist()]


def model_inputs(prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `generate` takes: ids, where padded any will do, and the mask that says where that is."""
    return {"input_ids": prompt.clamp(min=0), "attention_mask": (prompt != PAD).long()}


def text_ids(source: PromptSource, encode: Encode, special: frozenset[int]) -> list[int]:
    """Ids of the source's text without any special one.

    Raises:
        EngineError: the text is empty or holds nothing but special tokens.
    """
    ids = [token for token in encode(source.value or "") if token not in special]
    if not ids:
        raise EngineError("error", f"the prompt source of kind {source.kind} gives no tokens")
    return ids
