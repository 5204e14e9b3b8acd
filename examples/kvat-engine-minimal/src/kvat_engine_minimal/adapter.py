"""The heavy half, and below it the engine itself, which in real life is somebody else's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from time import perf_counter
from typing import Any

from pydantic import JsonValue

from kvat_core.engine import EngineAdapter
from kvat_core.schema import Applied, PromptSource, Recipe, RequestTiming, Resources, Timeline

# The adapter --------------------------------------------------------------------------------------


class MinimalAdapter(EngineAdapter):
    """One token is one letter, so every prompt length is exact."""

    def load_model(
        self,
        model_id: str,
        dtype: str | None,
        device: str,
        attn_backend: str | None,
        extra: Mapping[str, JsonValue],
    ) -> None:
        """Nothing to load: this engine learns from the prompt."""

    def make_prompt(self, source: PromptSource, tokens: Sequence[int], nonce: int) -> list[str]:
        """The source's text over and over; in front the nonce, its fastest digits first."""
        text = source.value or " "
        starts = (f"{nonce:x}"[::-1] + f" {row} " for row in range(len(tokens)))
        return [
            (start + "".join(islice(cycle(text), length)))[:length]
            for start, length in zip(starts, tokens, strict=True)
        ]

    def prepare_cache(self, strategy: Recipe) -> None:
        """Every call makes its own cache, so there is no state to undo."""
        self._arguments: Mapping[str, Any] = strategy.arguments

    def run_decode(self, prompt: list[str], max_new_tokens: int) -> Timeline:
        """What the recipe says, and what came of it: counts are counted, not copied from the request."""
        generation = generate(prompt, max_new_tokens, **self._arguments)
        times_s = generation.times_s
        requests = tuple(
            RequestTiming(
                prompt_tokens=len(before),
                output_tokens=len(after),
                ttft_s=times_s[0],
                e2e_s=times_s[-1],
                token_gaps_s=tuple(late - early for early, late in pairwise(times_s)),
            )
            for before, after in zip(prompt, generation.texts, strict=True)
        )
        return Timeline(clock="host", duration_s=times_s[-1], requests=requests)

    def run_prefill(self, prompt: list[str], max_new_tokens: int = 0) -> Timeline:
        """One token is the least this engine can do."""
        return self.run_decode(prompt, max(1, max_new_tokens))

    def applied(self, prompt: list[str]) -> Applied:
        """Ask the live objects what they are; the recipe knows only what they should be."""
        wanted = CACHES[self._arguments["cache"]].__name__
        found = sorted({type(cache).__name__ for cache in generate(prompt, 2, **self._arguments).caches})
        mismatches = () if found == [wanted] else (f"cache: the recipe says {wanted}, the engine used {found}",)
        return Applied(values={"cache": list(found)}, mismatches=mismatches)

    def measure_resources(self) -> Resources:
        """This engine cannot tell; null says so, a made-up figure would not."""
        return Resources(processes=("worker",))

    def cleanup(self) -> None:
        """Nothing outlives a call."""


# The engine ---------------------------------------------------------------------------------------


class RecomputedKeys:
    """No cache: the keys of all positions are computed again for every token."""

    def of(self, letters: Sequence[str]) -> list[int]:
        """The key of each position."""
        return [_key(letters, position) for position in range(len(letters))]


class KeptKeys:
    """A cache: only the keys of new positions are computed."""

    def __init__(self) -> None:
        self._keys: list[int] = []

    def of(self, letters: Sequence[str]) -> list[int]:
        """The key of each position; `letters` may only have grown since the last call."""
        self._keys.extend(_key(letters, position) for position in range(len(self._keys), len(letters)))
        return self._keys


CACHES: dict[str, type[RecomputedKeys] | type[KeptKeys]] = {"off": RecomputedKeys, "keys": KeptKeys}


@dataclass(frozen=True)
class Generation:
    """What came of a call."""

    texts: list[str]
    times_s: list[float]
    """From the start of the call to each token; a batch goes step by step, so all rows share them."""
    caches: list[RecomputedKeys | KeptKeys]


def generate(prompts: Sequence[str], new_tokens: int, cache: str) -> Generation:
    """Continue each prompt by that many letters."""
    start_s = perf_counter()
    caches = [CACHES[cache]() for _ in prompts]
    rows = [list(prompt) for prompt in prompts]
    times_s = []
    for _ in range(new_tokens):
        for letters, row_cache in zip(rows, caches, strict=True):
            letters.append(_next_letter(letters, row_cache.of(letters)))
        times_s.append(perf_counter() - start_s)
    texts = ["".join(letters[len(prompt) :]) for letters, prompt in zip(rows, prompts, strict=True)]
    return Generation(texts, times_s, caches)


def _next_letter(letters: Sequence[str], keys: Sequence[int]) -> str:
    """What came after the earlier position whose key has most bits in common with the last one's."""
    query = keys[-1]
    nearest = max(range(len(keys) - 1), key=lambda position: (keys[position] & query).bit_count(), default=-1)
    return letters[nearest + 1]


def _key(letters: Sequence[str], position: int) -> int:
    """Fingerprint of the sixteen letters that end at a position: a bit for each letter at its distance."""
    key = 0
    for distance, letter in enumerate(reversed(letters[max(0, position - 15) : position + 1])):
        key |= 1 << (31 * ord(letter) + 7 * distance) % 256
    return key
