"""Time `generate` of a model in this process, in plain Transformers code that knows nothing of kvat.

    python benchmarks/_plain_generate.py MODEL PROMPT_TOKENS OUTPUT_TOKENS SAMPLES [device=NAME] [KNOB=VALUE ...]

Without settings the model is loaded and called as Transformers does by itself. Of a directory without weights it is
built, with random ones. Nothing sees a token: a call for one
token takes the time to the first one, and a whole call takes longer by the time of all others. What was called before
decides what is in the processor's caches, so each timed call follows a whole one. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

KERNELS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
CACHES = ("dynamic", "static", "offloaded", "offloaded_static")
WARM_UP_CALLS = 6
"""More than the first two, which compile."""


def main() -> None:
    model_directory, prompt_tokens, output_tokens, samples, *pairs = sys.argv[1:]
    settings = dict(pair.split("=") for pair in pairs)
    model = load(model_directory, settings)
    prompt = torch.randint(5, model.config.vocab_size, (1, int(prompt_tokens)), device=model.device)
    whole, one = (timed(model, prompt, int(output_tokens), count, settings) for count in (int(output_tokens), 1))
    for _ in range(WARM_UP_CALLS):
        whole()
    ttft_s, whole_s = [], []
    for _ in range(int(samples)):
        whole_s.append(whole())
        ttft_s.append(one())
        whole()
    first_s = median(ttft_s)
    decode_tps = (int(output_tokens) - 1) / (median(whole_s) - first_s)
    print(json.dumps({"ttft_s": first_s, "decode_tps": decode_tps, "dtype": str(model.dtype).removeprefix("torch.")}))


def load(directory: str, settings: dict[str, str]) -> Any:
    """The model with the threads, dtype, attention and device that are set, or with those that Transformers takes."""
    if "threads" in settings:
        torch.set_num_threads(int(settings["threads"]))
    options: dict[str, Any] = {}
    if "dtype" in settings:
        options["dtype"] = getattr(torch, settings["dtype"])
    if "attention" in settings:
        options["attn_implementation"] = "sdpa" if settings["attention"] in KERNELS else settings["attention"]
    if any(Path(directory).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
    else:
        config = AutoConfig.from_pretrained(directory)
        with torch.device(settings.get("device", "cpu")):
            model = AutoModelForCausalLM.from_config(config, **{"dtype": config.dtype, **options})
    return model.to(settings.get("device", "cpu")).eval()


def timed(model: Any, prompt: torch.Tensor, output_tokens: int, count: int, settings: dict[str, str]) -> Any:
    """A function that generates so many tokens, as set for calls of the full length, and returns the seconds."""
    arguments = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "eos_token_id": None,
        "max_new_tokens": count,
        **cache_arguments(prompt.shape[1] + output_tokens, settings),
    }
    synchronize = torch.cuda.synchronize if prompt.device.type == "cuda" else lambda: None

    def call() -> float:
        with ExitStack() as contexts:
            if settings.get("grad_mode") == "inference_mode":
                contexts.enter_context(torch.inference_mode())
            if settings.get("attention") in KERNELS:
                contexts.enter_context(sdpa_kernel(KERNELS[settings["attention"]]))
            synchronize()
            started = time.perf_counter()
            output = model.generate(**arguments)
            synchronize()
            seconds = time.perf_counter() - started
        assert output.shape[1] == prompt.shape[1] + count
        return seconds

    return call


def cache_arguments(slots: int, settings: dict[str, str]) -> dict[str, Any]:
    """What `generate` is told of cache and compilation."""
    if settings.get("prefill_chunk", "off") != "off" or settings.get("cache") not in (None, *CACHES):
        sys.exit(f"{Path(__file__).name} cannot set {settings}; exclude what it lacks from the search")
    cache = settings.get("cache", "dynamic")
    if "static" not in cache:
        return {} if cache == "dynamic" else {"cache_implementation": cache}
    static = {"cache_implementation": cache, "max_cache_len": slots}
    if settings["compile"] == "off":
        return {**static, "disable_compile": True}
    if settings["compile"] == "auto":
        return static
    config = CompileConfig(mode=settings["compile"])
    if settings.get("device", "cpu") == "cpu":
        config._compile_all_devices = True  # the only door to compilation on the CPU
    return {**static, "compile_config": config}


if __name__ == "__main__":
    main()
