"""Are the bytes that kvat reports those that a cache must have, and that somebody outside sees?

    python benchmarks/memory_agreement.py [--runs 3] [--allocator fixed|own] [--out FILE]

**Cache.** The bytes that kvat reads from live caches are compared with arithmetic written out here: exactly for
dynamic and static caches, within 5 % for quantised ones.

**Peak.** Per case a worker is asked for what a memory launch of `kvat tune` asks, and tells how far its resident
size rose above that after loading. Beside it stands a process that only loads the model with plain Transformers
and calls `generate` twice with the same shape; another process watches it: when it says that it has loaded,
the watcher resets its high-water mark in /proc/PID/clear_refs, reads VmRSS once a millisecond until both calls
are done, and then reads VmHWM. Both take turns, and the medians have to agree within 5 % or 8 MiB.

The same calls can peak quite differently, because glibc moves the size from which on it gives freed memory back
to the system, and what stays in its heap depends on chance. So on both sides that size is fixed (by
MALLOC_MMAP_THRESHOLD_); what is compared then is what the calls need. With `--allocator own` it is not:
that shows how far two launches differ by themselves. Linux only.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser
from pydantic import JsonValue

from kvat_core import Scenario, prompts
from kvat_core.machine import read_machine
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.supervisor import WorkerProcess
from kvat_core.schema import ModelRef, PromptSource, Recipe, Resources, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.settings.knobs import PLAIN

MIB = 2**20
MAX_DIFFERENCE = 0.05
MAX_DIFFERENCE_BYTES = 8 * MIB
ALLOCATORS = {"fixed": {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}, "own": {}}
SOURCE = PromptSource(kind="preset", value="chat")
CACHES = ("dynamic", "static")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
PATIENT = Limits(600.0)


@dataclass(frozen=True)
class Shape:
    """What the size of a model's cache depends on, as its config.json says."""

    layers: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def numbers(self, batch_size: int) -> int:
        """Keys and values of one position, in one layer."""
        return 2 * self.kv_heads * self.head_dim * batch_size


SHAPES = {
    "builtin:llama": Shape(layers=3, kv_heads=2, head_dim=32),
    "builtin:mistral": Shape(layers=3, kv_heads=2, head_dim=32, window=512),
    "random:smollm2-135m": Shape(layers=30, kv_heads=3, head_dim=64),
}
EXACT = (
    *product(("builtin:llama", "builtin:mistral"), ("float32",), ((48, 6, 1), (510, 6, 1), (800, 6, 3))),
    *product(("random:smollm2-135m",), ELEMENT_BYTES, ((48, 6, 1), (256, 6, 2))),
)
"""Model, dtype, and prompt tokens, output tokens and batch size."""
QUANTISED_OPTIONS: tuple[dict[str, Any], ...] = (
    {"backend": "fp8"},
    {"backend": "quanto", "nbits": 4, "q_group_size": 64, "residual_length": 128},
    {"backend": "quanto", "nbits": 2, "q_group_size": 32, "residual_length": 16},
)
QUANTISED = tuple(product(("builtin:llama", "random:smollm2-135m"), QUANTISED_OPTIONS, ((256, 41, 1), (256, 151, 1))))
PEAKS = tuple(
    product(
        (
            *(("builtin:llama", shape) for shape in ((512, 16, 1), (2048, 16, 1), (2048, 16, 8))),
            *(("random:smollm2-135m", shape) for shape in ((512, 4, 1), (2048, 4, 1))),
        ),
        CACHES,
    )
)


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--runs", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="fixed")
    options = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        print("this system does not tell of another process's peak", file=sys.stderr)
        return NOT_MEASURED
    record = Record(options)
    peaks = [
        compare_peaks(model, cache, Scenario(**named(shape)), options.runs, ALLOCATORS[options.allocator])
        for (model, shape), cache in PEAKS
    ]
    exact = [size for case in EXACT for size in read_caches(*case)]
    quantised = [read_quantised(*case) for case in QUANTISED if can_quantise(case[1])]
    if len(quantised) < len(QUANTISED):
        print("optimum-quanto is not installed, so its caches are left out")
    values = {
        "environment": ALLOCATORS[options.allocator],
        "shapes": {model: asdict(shape) for model, shape in SHAPES.items()},
        "cache_bytes": exact,
        "quantised_cache_bytes": quantised,
        "optimum_quanto": version("optimum-quanto") if len(quantised) == len(QUANTISED) else None,
        "peaks": peaks,
    }
    return record.close(read_machine("cpu", 1), bounds_of(exact, quantised, peaks), values)


def bounds_of(exact: list[dict[str, Any]], quantised: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> list[Bound]:
    """What must hold."""
    wrong = [size for size in exact if len({size["by_hand"], size["live"], size["predicted"]}) > 1]
    quantised_difference = max(abs(size["live"] / size["by_hand"] - 1) for size in quantised)
    peak_difference = max(abs(peak["difference_bytes"]) / peak["allowed_bytes"] for peak in peaks)
    return [
        Bound(f"caches out of {len(exact)} that do not hold exactly what they must", len(wrong), "<=", 0),
        Bound(f"largest difference of {len(quantised)} quantised caches", quantised_difference, "<=", MAX_DIFFERENCE),
        Bound(f"largest difference of {len(peaks)} peaks ÷ what is allowed", peak_difference, "<=", 1.0),
    ]


def named(shape: tuple[int, int, int]) -> dict[str, int]:
    """The numbers of a shape by name."""
    return dict(zip(("prompt_tokens", "output_tokens", "batch_size"), shape, strict=True))


def recipe_of(model: str, cache: str, dtype: str, scenario: Scenario) -> Recipe:
    """What kvat does, in one thread."""
    settings = {**PLAIN, "dtype": dtype, "cache": cache}
    target = Target(model=ModelRef(id=model), device="cpu", threads=1)
    return TransformersEngine().recipe({**settings, "threads": "1"}, scenario, target)


# Caches


def read_caches(model: str, dtype: str, numbers: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """A dynamic and a static cache after a call: by hand, live, and as kvat predicts it."""
    scenario = Scenario(**named(numbers))
    adapter = loaded(model, dtype)
    prompt = adapter.make_prompt(prompts.resolve(SOURCE), scenario.prompt_lengths, 0)
    for cache in CACHES:
        adapter.prepare_cache(recipe_of(model, cache, dtype, scenario))
        adapter.run_decode(prompt, scenario.output_tokens)
        found: Resources = adapter.measure_resources()
        yield {
            "model": model,
            "cache": cache,
            "dtype": dtype,
            "scenario": scenario.key,
            "by_hand": cache_bytes(SHAPES[model], cache, scenario, ELEMENT_BYTES[dtype]),
            "live": found.kv_cache_bytes,
            "predicted": found.kv_cache_predicted_bytes,
        }


def cache_bytes(shape: Shape, cache: str, scenario: Scenario, element_bytes: int) -> int:
    """A static cache has all slots that it was made for; a dynamic one lacks the last token, which nobody reads."""
    slots = scenario.total_tokens if cache == "static" else scenario.total_tokens - 1
    held = slots if shape.window is None else min(slots, shape.window)
    return shape.layers * held * shape.numbers(scenario.batch_size) * element_bytes


def read_quantised(model: str, options: dict[str, Any], numbers: tuple[int, int, int]) -> dict[str, Any]:
    """A quantised float32 cache after a call: by hand, and live."""
    from kvat_engine_transformers.measuring import memory

    scenario = Scenario(**named(numbers))
    adapter = loaded(model, "float32")
    prompt = adapter.make_prompt(prompts.resolve(SOURCE), scenario.prompt_lengths, 0)
    output = adapter.model.generate(
        input_ids=prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        do_sample=False,
        max_new_tokens=scenario.output_tokens,
        eos_token_id=None,
        return_dict_in_generate=True,
        cache_implementation="quantized",
        cache_config=options,
    )
    shape = SHAPES[model]
    layer_bytes = fp8_bytes if options["backend"] == "fp8" else quanto_bytes
    return {
        "model": model,
        "options": options,
        "scenario": scenario.key,
        "by_hand": shape.layers * layer_bytes(shape, scenario, options),
        "live": memory.cache_bytes(output.past_key_values),
        "unquantised": cache_bytes(shape, "dynamic", scenario, ELEMENT_BYTES["float32"]),
    }


def fp8_bytes(shape: Shape, scenario: Scenario, options: Mapping[str, Any]) -> int:
    """Of one layer: a byte for each number; and a scale of a float32 for all keys, and one for all values."""
    return (scenario.total_tokens - 1) * shape.numbers(scenario.batch_size) + 2 * 4


def quanto_bytes(shape: Shape, scenario: Scenario, options: Mapping[str, Any]) -> int:
    """Of one layer: packed numbers with a scale and a zero point for each group, all float32.

    What decoding adds stays float32 until there is enough of it, and is then packed with all else.
    """
    unpacked: int = (scenario.output_tokens - 1) % options["residual_length"]
    packed = (scenario.total_tokens - 1 - unpacked) * shape.numbers(scenario.batch_size)
    groups: int = packed // options["q_group_size"]
    nbits: int = options["nbits"]
    return packed * nbits // 8 + groups * 2 * 4 + unpacked * shape.numbers(scenario.batch_size) * 4


def can_quantise(options: dict[str, Any]) -> bool:
    """Whether the library for it is there."""
    from transformers.utils.import_utils import is_optimum_quanto_available

    return options["backend"] != "quanto" or bool(is_optimum_quanto_available())


@lru_cache(maxsize=1)
def loaded(model: str, dtype: str) -> Any:
    """An adapter with its model, in this process."""
    any_scenario = Scenario(prompt_tokens=1, output_tokens=2)
    with tempfile.TemporaryDirectory() as scratch:
        adapter: Any = TransformersEngine().adapter(Path(scratch))
    load: dict[str, Any] = recipe_of(model, "dynamic", dtype, any_scenario).load
    adapter.load_model(**load)
    return adapter


# Peaks


def compare_peaks(
    model: str, cache: str, scenario: Scenario, runs: int, allocator: Mapping[str, str]
) -> dict[str, Any]:
    """Both sides of a case, several times in turns."""
    recipe = recipe_of(model, cache, "float32", scenario)
    recipe = recipe.model_copy(update={"environment": {**recipe.environment, **allocator}})
    reported, seen = [], []
    for _ in range(runs):
        reported.append(report(recipe, scenario))
        seen.append(watch(model, cache, recipe.environment, scenario))
    rises = {"reported": [rise(one) for one in reported], "seen": [rise(one) for one in seen]}
    difference = median(rises["reported"]) - median(rises["seen"])
    print(f"{model} {cache} {scenario.key}: " + ", ".join(f"{side} {mib(rise)} MiB" for side, rise in rises.items()))
    return {
        "model": model,
        "cache": cache,
        "scenario": scenario.key,
        "reported": reported,
        "seen": seen,
        "difference_bytes": difference,
        "allowed_bytes": max(MAX_DIFFERENCE_BYTES, MAX_DIFFERENCE * median(rises["seen"])),
    }


def rise(one: Mapping[str, int]) -> int:
    """Of the resident size, from after loading to its peak."""
    return one["peak_bytes"] - one["ready_bytes"]


def mib(sizes: list[int]) -> str:
    """Sizes for a reader."""
    return " ".join(f"{size / MIB:.1f}" for size in sizes)


def report(recipe: Recipe, scenario: Scenario) -> dict[str, int]:
    """What a worker tells after what a memory launch asks of it."""
    source = prompts.resolve(SOURCE).model_dump(mode="json")
    tokens: JsonValue = list(scenario.prompt_lengths)
    with tempfile.TemporaryDirectory() as scratch, WorkerProcess(recipe.environment) as worker:
        worker.call("start", {"engine": "transformers", "scratch": scratch}, "start", PATIENT)
        worker.call("load", dict(recipe.load), "load", PATIENT)
        worker.call("prepare", recipe.model_dump(mode="json"), "prepare", PATIENT)
        for nonce in range(2):
            prompt: JsonValue = {"source": source, "tokens": tokens, "nonce": nonce}
            call: dict[str, JsonValue] = {"prompt": prompt, "max_new_tokens": scenario.output_tokens}
            worker.call("decode", call, "memory", PATIENT)
        resources = Resources.model_validate(worker.call("resources", {}, "resources", PATIENT))
    assert resources.ready_host_bytes is not None
    assert resources.peak_host_bytes is not None
    return {"ready_bytes": resources.ready_host_bytes, "peak_bytes": resources.peak_host_bytes}


def watch(model: str, cache: str, environment: Mapping[str, str], scenario: Scenario) -> dict[str, int]:
    """What somebody outside sees of a process that makes the same calls without kvat."""
    command = [sys.executable, "-c", PLAIN_SCRIPT, json.dumps(plain_job(model, cache, scenario))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        expect(process.stdout, "loaded")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM
        ready_bytes = status_bytes(process.pid, "VmRSS")
        print("go on", file=process.stdin, flush=True)
        polled_bytes = 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.001):
                polled_bytes = max(polled_bytes, status_bytes(process.pid, "VmRSS"))
        expect(process.stdout, "done")
        peak_bytes = status_bytes(process.pid, "VmHWM")
        print("end", file=process.stdin, flush=True)
    return {"ready_bytes": ready_bytes, "peak_bytes": peak_bytes, "polled_bytes": polled_bytes}


def plain_job(model: str, cache: str, scenario: Scenario) -> dict[str, Any]:
    """What the plain process is to do, as its argument."""
    from kvat_engine_transformers.model.models import resolve

    slots = {"max_cache_len": scenario.total_tokens, "disable_compile": True} if cache == "static" else {}
    source = resolve(model, None, allow_download=False)
    return {
        "path": str(source.path),
        "random": source.kind == "random",
        "shape": [scenario.batch_size, scenario.prompt_tokens],
        "arguments": {"max_new_tokens": scenario.output_tokens, "cache_implementation": cache, **slots},
    }


def expect(stream: Any, word: str) -> None:
    """Read what the plain process says; anything else ends the benchmark, and it has told on stderr why."""
    if stream.readline().strip() != word:
        raise SystemExit(NOT_MEASURED)


def status_bytes(pid: int, field: str) -> int:
    """A size of another process, by the kernel."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


PLAIN_SCRIPT = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
job = json.loads(sys.argv[1])
kind = {"dtype": torch.float32, "attn_implementation": "sdpa"}
if job["random"]:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["path"]), **kind)
else:
    model = AutoModelForCausalLM.from_pretrained(job["path"], **kind)
model.eval()
print("loaded", flush=True)
sys.stdin.readline()
for seed in range(2):
    prompt = torch.randint(5, 512, job["shape"], generator=torch.Generator().manual_seed(seed))
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    tokens = model.generate(input_ids=prompt, **options, **job["arguments"])
    assert tokens.shape[1] == prompt.shape[1] + job["arguments"]["max_new_tokens"]
print("done", flush=True)
sys.stdin.readline()
"""
"""The plain process: it says what it has done, and waits to be told to go on."""


if __name__ == "__main__":
    sys.exit(main())
