"""The heavy half, and below it the engine itself, which in real life is somebody else's library."""

from __future__ import annotations

from collections import Counter, defaultdict
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

    def make_prompt(self, source: PromptSource, tokens: int, batch: int, nonce: int) -> list[str]:
        """The source's text over and over; in front the nonce, its fastest digits first."""
        text = source.value or " "
        starts = (f"{nonce:x}"[::-1] + f" {row} " for row in range(batch))
        return [(start + "".join(islice(cycle(text), tokens)))[:tokens] for start in starts]

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


class TextCache:
    """Keeps the letters and counts them again for every token."""

    def __init__(self, prompt: str) -> None:
        self._letters = list(prompt)

    def append(self, letter: str) -> None:
        """Take in the next letter."""
        self._letters.append(letter)

    def likeliest(self) -> str:
        """What followed the last letter most often so far; if nothing did, a space."""
        followers = Counter(after for before, after in pairwise(self._letters) if before == self._letters[-1])
        return followers.most_common(1)[0][0] if followers else " "


class CountsCache:
    """Keeps the counts, which grow by one with every letter."""

    def __init__(self, prompt: str) -> None:
        self._last = prompt[0]
        self._followers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for letter in prompt[1:]:
            self.append(letter)

    def append(self, letter: str) -> None:
        """Take in the next letter."""
        self._followers[self._last][letter] += 1
        self._last = letter

    def likeliest(self) -> str:
        """What followed the last letter most often so far; if nothing did, a space."""
        followers = self._followers[self._last]
        return followers.most_common(1)[0][0] if followers else " "


CACHES: dict[str, type[TextCache] | type[CountsCache]] = {"text": TextCache, "counts": CountsCache}


@dataclass(frozen=True)
class Generation:
    """What came of a call."""

    texts: list[str]
    times_s: list[float]
    """From the start of the call to each token; a batch goes step by step, so all rows share them."""
    caches: list[TextCache | CountsCache]


def generate(prompts: Sequence[str], new_tokens: int, cache: str) -> Generation:
    """Continue each prompt by that many letters."""
    start_s = perf_counter()
    caches = [CACHES[cache](prompt) for prompt in prompts]
    texts = [""] * len(prompts)
    times_s = []
    for _ in range(new_tokens):
        for row, row_cache in enumerate(caches):
            letter = row_cache.likeliest()
            row_cache.append(letter)
            texts[row] += letter
        times_s.append(perf_counter() - start_s)
    return Generation(texts, times_s, caches)
