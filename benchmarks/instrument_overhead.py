"""What does the instrument of a timed call cost?

    python benchmarks/instrument_overhead.py [--pairs 60] [--out FILE]

Times `generate` in one process with one thread: plain, as a snippet's `generate` calls it, and
instrumented, as `kvat tune` times it. A pair is two calls of each with the same prompt, in the order
ABBA, so that slow drift cancels; A is in turn the one and the other. Its ratio is that of the two sums.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import count, cycle, islice
from typing import Any

from _record import Bound, Record, at_least_one, option_parser

from kvat_core import Scenario
from kvat_core.machine import read_machine
from kvat_core.prompts import resolve
from kvat_core.schema import ModelRef, PromptSource, Recipe, Target
from kvat_core.stats import ratio
from kvat_engine_transformers import TransformersEngine

SCENARIO = Scenario(prompt_tokens=128, output_tokens=64)
TARGET = Target(model=ModelRef(id="builtin:llama"), device="cpu", threads=1)
SETTINGS = {"dtype": "float32", "attention": "sdpa", "cache": "dynamic", "compile": "off", "grad_mode": "no_grad"}
EQUAL_COUNTS = (
    "only prompts after which the plain call generates all its tokens without meeting the end-of-sequence token, "
    "which it tests for as any user's call does; nothing is added to the plain call to make counts equal"
)
ORDERS = (("plain", "instrumented", "instrumented", "plain"), ("instrumented", "plain", "plain", "instrumented"))
MAX_RATIO = 1.02

Calls = list[tuple[str, float]]
"""Kind and seconds of the calls of a pair, in their order."""


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--pairs", type=at_least_one, default=60, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    bench = Bench()
    prompts = islice(bench.full_length_prompts(), options.pairs)
    pairs = [bench.time_pair(prompt, order) for prompt, order in zip(prompts, cycle(ORDERS), strict=False)]
    overhead = ratio([math.log(total_s(pair, "instrumented") / total_s(pair, "plain")) for pair in pairs])
    interval = "unknown" if overhead.low is None else f"{overhead.low:.4f} to {overhead.high:.4f}"
    print(f"instrumented ÷ plain: {overhead.value:.4f}, 95 % interval {interval}, {overhead.n} pairs")
    values = {
        "model": TARGET.model.id,
        "settings": SETTINGS,
        "scenario": SCENARIO.key,
        "instrument": TransformersEngine().instrument(),
        "equal_counts": EQUAL_COUNTS,
        "pairs_s": pairs,
        "ratio": overhead.model_dump(),
    }
    return record.close(
        read_machine(TARGET.device, TARGET.threads),
        [Bound("instrumented ÷ plain, time", overhead.value, "<=", MAX_RATIO)],
        values,
    )


def total_s(pair: Calls, kind: str) -> float:
    """Seconds of the calls of one kind."""
    return sum(seconds for name, seconds in pair if name == kind)


class Bench:
    """The loaded model with both ways to call it."""

    def __init__(self) -> None:
        engine = TransformersEngine()
        self._recipe: Recipe = engine.recipe(SETTINGS, SCENARIO, TARGET)
        # Read when torch is imported, which is what `adapter` does.
        os.environ.update(self._recipe.environment)
        self._adapter: Any = engine.adapter()
        load: dict[str, Any] = self._recipe.load
        self._adapter.load_model(**load)
        self._adapter.prepare_cache(self._recipe)

    def full_length_prompts(self) -> Iterator[Any]:
        """Prompts that the plain call does not end early; looking for them warms up."""
        source = resolve(PromptSource(kind="preset", value="chat"))
        for nonce in count():
            prompt = self._adapter.make_prompt(source, SCENARIO.prompt_tokens, SCENARIO.batch_size, nonce)
            self._adapter.run_decode(prompt, SCENARIO.output_tokens)
            _, tokens = self._plain(prompt)
            if tokens == SCENARIO.output_tokens:
                yield prompt

    def time_pair(self, prompt: Any, order: tuple[str, ...]) -> Calls:
        """Make the calls in that order."""
        kinds = {"plain": self._plain, "instrumented": self._instrumented}
        timed = [(kind, *kinds[kind](prompt)) for kind in order]
        assert {tokens for _, _, tokens in timed} == {SCENARIO.output_tokens}
        return [(kind, seconds) for kind, seconds, _ in timed]

    def _plain(self, prompt: Any) -> tuple[float, int]:
        mask = prompt.new_ones(prompt.shape)
        started = time.perf_counter()
        tokens = self._adapter.model.generate(input_ids=prompt, attention_mask=mask, **self._recipe.arguments)
        return time.perf_counter() - started, tokens.shape[1] - prompt.shape[1]

    def _instrumented(self, prompt: Any) -> tuple[float, int]:
        timeline = self._adapter.run_decode(prompt, SCENARIO.output_tokens)
        return timeline.duration_s, timeline.requests[0].output_tokens


if __name__ == "__main__":
    sys.exit(main())
