"""Prompts of an exact length whose first tokens no other prompt has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from random import Random

from kvat_core.engine import EngineError
from kvat_core.schema import PromptSource

NONCE_TOKENS = 16
"""Length of the block that makes a prompt unique: the smallest block that prefix caches commonly share."""

Encode = Callable[[str], Iterable[int]]


def prompt_ids(
    text_ids: Sequence[int], ordinary: Sequence[int], *, tokens: int, batch: int, nonce: int
) -> list[list[int]]:
    """`batch` rows of exactly `tokens` ids: a random block, then the text, repeated or cut.

    Args:
        text_ids: ids of the text; without any, the random block goes on to the end.
        ordinary: ids to draw from, none of which has a special meaning.
    """
    random = Random(nonce)
    block = min(tokens, NONCE_TOKENS) if text_ids else tokens
    body = list(islice(cycle(text_ids), tokens - block))
    return [random.choices(ordinary, k=block) + body for _ in range(batch)]


def text_ids(source: PromptSource, encode: Encode, special: frozenset[int]) -> list[int]:
    """Ids of the source's text without any special one.

    Raises:
        EngineError: the text is empty or holds nothing but special tokens.
    """
    ids = [token for token in encode(source.value or "") if token not in special]
    if not ids:
        raise EngineError("error", f"the prompt source of kind {source.kind} gives no tokens")
    return ids
