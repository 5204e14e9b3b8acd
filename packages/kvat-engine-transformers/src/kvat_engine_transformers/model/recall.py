"""Associative recall: a task on which a damaged KV cache shows as wrong answers.

A prompt scatters key-value pairs in random filler and ends with the query mark and one of the keys.
The built-in checkpoints answer with the value that followed that key, and then walk on: value n is
followed by key n, whose own value comes next, and so forth. The first answer comes out of the
prefill, every later one is decoded through the cache, so ask for several answers to test a cache::

    <bos> .. <k07> <v31> .. <k31> <v02> .. <k02> <v07> .. <query> <k07> | <v31> <k31> <v02> ..

All to the left of the bar is the prompt, the rest is what generation must produce. Nothing here
needs torch, except the small adapter `greedy`, which imports it when called.

The checkpoints are trained for prompts of up to 1024 tokens with up to 24 pairs; the Mistral one
needs `window=512`, its sliding window. A Llama prompt much beyond 1100 tokens loses recall by itself.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

# The token ids of the built-in tokenizer, in order: marks, keys, values, bytes, merges.
PAD, BOS, EOS, QUERY, SEPARATOR = range(5)
MARKS = ("<pad>", "<bos>", "<eos>", "<query>", "<sep>")
KEYS = 64
FIRST_KEY = len(MARKS)
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_TEXT = FIRST_VALUE + KEYS
VOCAB = 512

Generate = Callable[[Sequence[int], int], Sequence[int]]
"""Takes prompt ids and a number of new tokens, returns the ids of the new tokens alone."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with what must follow it.

    `tokens` are the ids of prompt and continuation together; the first `prompt_tokens` of them are
    the prompt, which ends with the first key asked for.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids to generate from."""
        return self.tokens[: self.prompt_tokens]

    @property
    def continuation(self) -> tuple[int, ...]:
        """The ids a flawless model generates: value, key, value, ..., value."""
        return self.tokens[self.prompt_tokens :]

    @property
    def queries(self) -> range:
        """Positions in `tokens` of the keys asked for; the logits there predict the answers."""
        return range(self.prompt_tokens - 1, len(self.tokens) - 1, 2)

    @property
    def answers(self) -> tuple[int, ...]:
        """The value ids expected, one for each position of `queries`."""
        return self.continuation[::2]


def build_example(rng: Random, *, length: int, pairs: int, answers: int = 1, window: int | None = None) -> Example:
    """Draw one example with a prompt of exactly `length` tokens.

    `pairs` pairs are spread evenly at random over the prompt; `answers` of them are asked for, at
    most all. With `window` (tokens, for models with sliding attention) every pair lies so late that
    the last token of the walk still sees all of it; what comes before is filler.

    Raises ValueError if the numbers do not fit together or the pairs do not fit in.
    """
    if not 1 <= answers <= pairs <= KEYS:
        raise ValueError(f"need 1 <= answers <= pairs <= {KEYS}, got {answers=}, {pairs=}")
    # One cycle through all pairs, so that a walk is as long as wanted and never asks a key twice.
    cycle = rng.sample(range(KEYS), pairs)
    walk = [token for n in cycle[1:] + cycle[:1] for token in (FIRST_VALUE + n, FIRST_KEY + n)]
    continuation = walk[: 2 * answers - 1]

    last_query = length + len(continuation) - 2
    start = 1 if window is None else max(1, last_query - window + 1)
    filler = (length - 2) - start - 2 * pairs
    if filler < 0:
        raise ValueError(f"{pairs} pairs do not fit into {length=}, {window=}, {answers=}")
    tokens = [BOS, *_filler(rng, start - 1)]
    slots = [True] * pairs + [False] * filler
    rng.shuffle(slots)
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    shuffled = iter(rng.sample(cycle, pairs))
    for is_pair, text in zip(slots, _filler(rng, len(slots)), strict=True):
        if is_pair:
            n = next(shuffled)
            tokens += FIRST_KEY + n, FIRST_VALUE + following[n]
        else:
            tokens.append(text)
    tokens += QUERY, FIRST_KEY + cycle[0], *continuation
    return Example(tuple(tokens), length)


def _filler(rng: Random, count: int) -> list[int]:
    return rng.choices(range(FIRST_TEXT, VOCAB), k=count)


def recall(generate: Generate, examples: Iterable[Example]) -> float:
    """Share of answers (0 to 1) that `generate` gives right, over all `examples`.

    It is asked for as many tokens as the continuation has. The walk runs free: after a wrong value
    the model asks itself a wrong key, so later answers are lost as well. Missing tokens are wrong,
    surplus ones ignored. Raises ValueError without examples.
    """
    right = total = 0
    for example in examples:
        new = generate(example.prompt, len(example.continuation))
        right += sum(a == b for a, b in zip(new[::2], example.answers, strict=False))
        total += len(example.answers)
    if not total:
        raise ValueError("recall of no examples is undefined")
    return right / total


def greedy(model: Any, **options: Any) -> Generate:
    """A `Generate` that calls `model.generate` of a Transformers model, greedily, batch size 1.

    `options` go to `generate` as they are, such as `cache_implementation="static"`. A cache object
    that must be new for each call belongs in a callable of your own.
    """
    import torch

    def generate(prompt: Sequence[int], new_tokens: int) -> Sequence[int]:
        ids = torch.tensor([list(prompt)], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                **options,
            )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new

    return generate
