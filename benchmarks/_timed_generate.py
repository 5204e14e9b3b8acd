"""Time `generate` of a checkpoint in this process, as somebody calls it who does not know kvat.

    python benchmarks/_timed_generate.py MODEL_DIRECTORY PROMPT_TOKENS OUTPUT_TOKENS SAMPLES [SNIPPET]

Without a snippet the model is loaded and called as Transformers does by itself; with one, by its `load` and `generate`,
after as many calls as it makes before its own clock. A streamer notes when each token reaches the host. Prompts
are random, another one for each call and the same ones in every process. Prints one line of JSON.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from typing import Any

WARM_UP_CALLS = 6
"""Of what Transformers does by itself: as many as a snippet makes of what compiles, so more than it needs."""


def main() -> None:
    directory, prompt_tokens, output_tokens, samples, *snippet = sys.argv[1:]
    # Run as a module: what it sets for the libraries comes before they are imported.
    way = runpy.run_path(snippet[0]) if snippet else {"load": load, "generate": generate, "WARMUP": WARM_UP_CALLS}
    model = way["load"](directory)
    calls = [
        timed(way["generate"], model, random_prompt(model, number, int(prompt_tokens)), int(output_tokens))
        for number in range(way["WARMUP"] + int(samples))
    ]
    assert not [name for name in sys.modules if name.startswith("kvat")], "what is timed here is free of kvat"
    print(json.dumps({**described(model), "warm_up": calls[: way["WARMUP"]], "timed": calls[way["WARMUP"] :]}))


def load(directory: str) -> Any:
    """The model as Transformers loads it if nobody says more."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def generate(model: Any, input_ids: Any, max_new_tokens: int, **options: Any) -> Any:
    """A call as Transformers makes it if nobody says more."""
    mask = input_ids.new_ones(input_ids.shape)
    return model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)


class TokenClock:
    """A streamer that notes when tokens reach the host; the first thing it gets is the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def random_prompt(model: Any, number: int, tokens: int) -> Any:
    """Ids of which none has a special meaning."""
    import torch

    generator = torch.Generator().manual_seed(number)
    return torch.randint(5, model.config.vocab_size, (1, tokens), generator=generator)


def timed(way: Any, model: Any, prompt: Any, output_tokens: int) -> dict[str, float]:
    """Seconds to the first token of one call of an exact length, and tokens per second from there on."""
    clock = TokenClock()
    started_s = time.perf_counter()
    output = way(model, prompt, output_tokens, eos_token_id=None, streamer=clock)
    assert output.shape[1] == prompt.shape[1] + output_tokens
    assert len(clock.times_s) == 1 + output_tokens
    first_s, last_s = clock.times_s[1], clock.times_s[-1]
    return {"ttft_s": first_s - started_s, "decode_tps": (output_tokens - 1) / (last_s - first_s)}


def described(model: Any) -> dict[str, Any]:
    """What was really loaded."""
    import torch

    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
