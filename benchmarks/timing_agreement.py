"""Are the times that kvat reports those that a stopwatch shows?

    python benchmarks/timing_agreement.py [--blocks 60] [--out FILE]

Measures `generate` of one model object in one process with one thread, twice: as `kvat tune` does, with a clock
inside the call that notes every token; and by a loop written out here, which knows nothing of kvat. That loop
loads the model with plain Transformers, hands `generate` nothing that could see a token, and looks at its
watch before and after each call: a call for one token takes the time to the first token, and a whole call
takes longer by the time of all further tokens, since setting up and returning are in both and cancel out.
Of the first token that leaves the return in the loop's time, some ten microseconds, and nothing else.

A call is quicker or slower by what the call before it has left in the processor's caches. So every timed call
follows a whole one, and an untimed whole call stands where a call for one token would come before. A block
is: kvat, whole, one, (untimed), one, (untimed), whole, kvat, all with the same prompt; in every other
block kvat and whole change places. So slow drift cancels, and so does who comes first. Nothing
ends a sequence early on either side. The ratios of a block are those of its sums.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _record import Bound, Record, at_least_one, option_parser

from kvat_core import Scenario, stats
from kvat_core.machine import read_machine
from kvat_core.schema import ModelRef, Ratio, Recipe, Target
from kvat_engine_transformers import TransformersEngine, builtin_path
from kvat_engine_transformers.settings.knobs import PLAIN

SCENARIO = Scenario(prompt_tokens=256, output_tokens=64)
TARGET = Target(model=ModelRef(id="builtin:llama"), device="cpu", threads=1)
SETTINGS = {**PLAIN, "dtype": "float32", "threads": "1"}
CACHES = ("dynamic", "static")
METRICS = ("ttft", "decode")
WARM_UP_BLOCKS = 3
MAX_DIFFERENCE = 0.03

TIMED = ("kvat", "whole", "one")
ORDER = ("kvat", "whole", "one", "untimed", "one", "untimed", "whole", "kvat")
CHANGED = {"kvat": "whole", "whole": "kvat"}
ORDERS = (ORDER, tuple(CHANGED.get(kind, kind) for kind in ORDER))

Block = list[dict[str, Any]]
"""Kind and seconds of the timed calls, in their order."""


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--blocks", type=at_least_one, default=60, metavar="N")
    options = parser.parse_args()
    record = Record(options)
    blocks = measure(options.blocks)
    ratios = {cache: {metric: compare(blocks[cache], metric) for metric in METRICS} for cache in CACHES}
    for cache, metric in ((cache, metric) for cache in CACHES for metric in METRICS):
        print(sentence(cache, metric, ratios[cache][metric]))
    values = {
        "model": TARGET.model.id,
        "settings": SETTINGS,
        "scenario": SCENARIO.key,
        "orders": ORDERS,
        "blocks": blocks,
        "ratios": {cache: {metric: one.model_dump() for metric, one in both.items()} for cache, both in ratios.items()},
    }
    bounds = [
        Bound(f"|kvat ÷ stopwatch - 1|, {metric}, {cache}", abs(one.value - 1), "<=", MAX_DIFFERENCE)
        for cache, both in ratios.items()
        for metric, one in both.items()
    ]
    return record.close(read_machine(TARGET.device, TARGET.threads), bounds, values)


def measure(count: int) -> dict[str, list[Block]]:
    """So many blocks by cache; the caches take turns."""
    engine = TransformersEngine()
    recipes = {cache: engine.recipe({**SETTINGS, "cache": cache}, SCENARIO, TARGET) for cache in CACHES}
    # Read when torch is imported.
    os.environ.update(recipes["dynamic"].environment)
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        tool = Tool(engine.adapter(Path(scratch)), recipes, stopwatch.model)
        blocks: dict[str, list[Block]] = {cache: [] for cache in CACHES}
        for number in range(WARM_UP_BLOCKS + count):
            for cache in CACHES:
                prompt = stopwatch.prompt(number)
                tool.prepare(cache)
                if number == 0:
                    assert tool.tokens(prompt) == stopwatch.tokens(prompt, cache), "both do the same"
                block = [call(kind, tool, stopwatch, prompt, cache) for kind in ORDERS[number % 2]]
                blocks[cache].append([one for one in block if one["kind"] in TIMED])
    return {cache: every[WARM_UP_BLOCKS:] for cache, every in blocks.items()}


def call(kind: str, tool: Tool, stopwatch: Stopwatch, prompt: Any, cache: str) -> dict[str, Any]:
    """Make one call of a block."""
    if kind == "kvat":
        return {"kind": kind, **tool.times(prompt)}
    tokens = 1 if kind == "one" else SCENARIO.output_tokens
    return {"kind": kind, "call_s": stopwatch.call_s(prompt, tokens, cache)}


def compare(blocks: list[Block], metric: str) -> Ratio:
    """What kvat reports over what the stopwatch shows: the time to the first token, or the decode rate."""
    ratio_of = ttft_ratio if metric == "ttft" else decode_ratio
    return stats.compare([math.log(ratio_of(block)) for block in blocks]).ratio()


def ttft_ratio(block: Block) -> float:
    """Of a block."""
    return total_s(block, "kvat", "ttft_s") / total_s(block, "one", "call_s")


def decode_ratio(block: Block) -> float:
    """Of a block; both decode equally many tokens, so the rates are as the times, the other way round."""
    stopwatch_s = total_s(block, "whole", "call_s") - total_s(block, "one", "call_s")
    return stopwatch_s / total_s(block, "kvat", "decode_s")


def total_s(block: Block, kind: str, what: str) -> float:
    """Seconds of the calls of one kind."""
    return float(sum(one[what] for one in block if one["kind"] == kind))


def sentence(cache: str, metric: str, found: Ratio) -> str:
    """One line for a reader."""
    interval = "unknown" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
    return f"{cache}, {metric}: kvat ÷ stopwatch {found.value:.4f}, 95 % interval {interval}, {found.n} blocks"


class Stopwatch:
    """The loop by hand: nothing but Transformers and a clock around its calls."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        path = builtin_path("llama")
        load: Any = AutoModelForCausalLM.from_pretrained
        self.model: Any = load(path, dtype=torch.float32, attn_implementation="sdpa").eval()

    def prompt(self, number: int) -> Any:
        """Random ids, of which none has a special meaning."""
        import torch

        generator = torch.Generator().manual_seed(number)
        return torch.randint(5, self.model.config.vocab_size, (1, SCENARIO.prompt_tokens), generator=generator)

    def tokens(self, prompt: Any, cache: str) -> list[int]:
        """What a whole call generates."""
        output = self.model.generate(**self._arguments(prompt, SCENARIO.output_tokens, cache))
        return list(output[0, SCENARIO.prompt_tokens :].tolist())

    def call_s(self, prompt: Any, new_tokens: int, cache: str) -> float:
        """Seconds of a call."""
        arguments = self._arguments(prompt, new_tokens, cache)
        started = time.perf_counter()
        output = self.model.generate(**arguments)
        seconds = time.perf_counter() - started
        assert output.shape[1] == SCENARIO.prompt_tokens + new_tokens
        return seconds

    def _arguments(self, prompt: Any, new_tokens: int, cache: str) -> dict[str, Any]:
        slots = {"max_cache_len": SCENARIO.total_tokens, "disable_compile": True} if cache == "static" else {}
        return {
            "input_ids": prompt,
            "attention_mask": prompt.new_ones(prompt.shape),
            "do_sample": False,
            "max_new_tokens": new_tokens,
            "eos_token_id": None,
            "cache_implementation": cache,
            **slots,
        }


class Tool:
    """The same calls as kvat makes them.

    Args:
        adapter: without a model yet.
        recipes: by cache.
        model: what the adapter is to call instead of what it has loaded by itself.
    """

    def __init__(self, adapter: Any, recipes: dict[str, Recipe], model: Any) -> None:
        self._adapter = adapter
        self._recipes = recipes
        load: dict[str, Any] = recipes["dynamic"].load
        adapter.load_model(**load)
        assert [str(one) for one in kind_of(adapter.model)] == [str(one) for one in kind_of(model)]
        adapter.model = model

    def prepare(self, cache: str) -> None:
        """Set up the recipe of a cache."""
        self._adapter.prepare_cache(self._recipes[cache])

    def tokens(self, prompt: Any) -> list[int]:
        """What a call generates."""
        made = self._adapter.generate(prompt, SCENARIO.output_tokens)
        return list(made.tokens[0, SCENARIO.prompt_tokens :].tolist())

    def times(self, prompt: Any) -> dict[str, float]:
        """What a timed call reports."""
        request = self._adapter.run_decode(prompt, SCENARIO.output_tokens).requests[0]
        assert request.output_tokens == SCENARIO.output_tokens
        return {"ttft_s": request.ttft_s, "decode_s": request.e2e_s - request.ttft_s}


def kind_of(model: Any) -> tuple[object, ...]:
    """What has to be alike in two loaded models for their calls to be."""
    return type(model), model.dtype, model.device, model.config._attn_implementation, model.training


if __name__ == "__main__":
    sys.exit(main())
