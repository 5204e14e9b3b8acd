"""What does the instrument of a timed call cost?

    python benchmarks/instrument_overhead.py [--blocks 60] [--out FILE]

Times `generate` in one process with one thread: plain, as a snippet's `generate` calls it; endless, the
same with nothing to end a sequence early; and instrumented, as `kvat tune` times it. A block is two calls
of each with the same prompt, in some order and back again (ABCCBA), so that slow drift cancels; each of
the three comes first in turn. Its ratios are those of the sums.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from _record import Bound, Record, at_least_one, option_parser

from kvat_core import Scenario, stats
from kvat_core.machine import read_machine
from kvat_core.prompts import resolve
from kvat_core.schema import ModelRef, PromptSource, Ratio, Recipe, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.settings.knobs import PLAIN

SCENARIO = Scenario(prompt_tokens=128, output_tokens=64)
TARGET = Target(model=ModelRef(id="builtin:llama"), device="cpu", threads=1)
SETTINGS = {**PLAIN, "dtype": "float32", "threads": "1"}
EQUAL_COUNTS = (
    "only prompts after which the plain call generates all its tokens without meeting the end-of-sequence token, "
    "which it tests for as any user's call does; nothing is added to the plain call to make counts equal"
)
KINDS = ("plain", "endless", "instrumented")
ORDERS = tuple((*order, *reversed(order)) for order in (KINDS[turn:] + KINDS[:turn] for turn in range(len(KINDS))))
MAX_RATIO = 1.02

Calls = list[tuple[str, float]]
"""Kind and seconds of the calls of a block, in their order."""


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--blocks", type=at_least_one, default=60, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    bench = Bench()
    prompts = islice(bench.full_length_prompts(), options.blocks)
    blocks = [bench.time_block(prompt, order) for prompt, order in zip(prompts, cycle(ORDERS), strict=False)]
    ratios = {kind: compare(blocks, kind) for kind in ("plain", "endless")}
    for kind, found in ratios.items():
        interval = "unknown" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
        print(f"instrumented ÷ {kind}: {found.value:.4f}, 95 % interval {interval}, {found.n} blocks")
    values = {
        "model": TARGET.model.id,
        "settings": SETTINGS,
        "scenario": SCENARIO.key,
        "instrument": TransformersEngine().instrument(),
        "equal_counts": EQUAL_COUNTS,
        "blocks_s": blocks,
        "ratios": {kind: found.model_dump() for kind, found in ratios.items()},
    }
    return record.close(
        read_machine(TARGET.device, TARGET.threads),
        [Bound(f"instrumented ÷ {kind}, time", found.value, "<=", MAX_RATIO) for kind, found in ratios.items()],
        values,
    )


def compare(blocks: list[Calls], kind: str) -> Ratio:
    """Time of the instrumented calls over that of another kind."""
    return stats.compare([math.log(total_s(block, "instrumented") / total_s(block, kind)) for block in blocks]).ratio()


def total_s(block: Calls, kind: str) -> float:
    """Seconds of the calls of one kind."""
    return sum(seconds for name, seconds in block if name == kind)


class Bench:
    """The loaded model with both ways to call it."""

    def __init__(self) -> None:
        engine = TransformersEngine()
        self._scratch = tempfile.TemporaryDirectory()
        self._recipe: Recipe = engine.recipe(SETTINGS, SCENARIO, TARGET)
        # Read when torch is imported, which is what `adapter` does.
        os.environ.update(self._recipe.environment)
        self._adapter: Any = engine.adapter(Path(self._scratch.name))
        load: dict[str, Any] = self._recipe.load
        self._adapter.load_model(**load)
        self._adapter.prepare_cache(self._recipe)

    def full_length_prompts(self) -> Iterator[Any]:
        """Prompts that the plain call does not end early; looking for them warms up."""
        source = resolve(PromptSource(kind="preset", value="chat"))
        for nonce in count():
            prompt = self._adapter.make_prompt(source, SCENARIO.prompt_lengths, nonce)
            self._adapter.run_decode(prompt, SCENARIO.output_tokens)
            _, tokens = self._plain(prompt)
            if tokens == SCENARIO.output_tokens:
                yield prompt

    def time_block(self, prompt: Any, order: tuple[str, ...]) -> Calls:
        """Make the calls in that order."""
        kinds = {"plain": self._plain, "endless": self._endless, "instrumented": self._instrumented}
        timed = [(kind, *kinds[kind](prompt)) for kind in order]
        assert {tokens for _, _, tokens in timed} == {SCENARIO.output_tokens}
        return [(kind, seconds) for kind, seconds, _ in timed]

    def _plain(self, prompt: Any, **options: Any) -> tuple[float, int]:
        inputs = {"input_ids": prompt, "attention_mask": prompt.new_ones(prompt.shape)}
        started = time.perf_counter()
        tokens = self._adapter.model.generate(**inputs, **self._recipe.arguments, **options)
        return time.perf_counter() - started, tokens.shape[1] - prompt.shape[1]

    def _endless(self, prompt: Any) -> tuple[float, int]:
        return self._plain(prompt, eos_token_id=None)

    def _instrumented(self, prompt: Any) -> tuple[float, int]:
        timeline = self._adapter.run_decode(prompt, SCENARIO.output_tokens)
        return timeline.duration_s, timeline.requests[0].output_tokens


if __name__ == "__main__":
    sys.exit(main())
