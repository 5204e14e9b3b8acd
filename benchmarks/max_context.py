"""Does kvat find the longest context that a scan of all lengths finds?

    python benchmarks/max_context.py [--room-mib N] [--out FILE]

Workers get an address space that is `--room-mib` larger than that of one that has served a short prompt, by the
system's own limit (RLIMIT_AS), set before the model is loaded. With each cache `kvat_core.tune` measures the longest
context of a small model with random weights, whose own limit lies far beyond. Beside it stands a scan that knows
nothing of the search: each length gets a worker of its own under the same limit, the calls of a trial, in steps of
1 % from 3 % below what kvat found to 3 % above it, and in steps of 75 % from the scenario to the model's limit. The
longest that ran has to be within 2 % of what kvat found; and no length that is longer than one that failed may run, or
"longest" would mean little. As in memory_agreement.py, the size from which on glibc gives freed memory back is fixed;
else one and the same length runs at times and at times does not. Linux only.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser
from memory_agreement import ALLOCATORS, MIB, PATIENT

from kvat_core import Objective, Profile, Scenario, TuneRequest, context, tune
from kvat_core.machine import read_machine
from kvat_core.measure.deadlines import Limits
from kvat_core.measure.messages import Operation, PromptSpec
from kvat_core.measure.supervisor import WorkerFailed, WorkerProcess
from kvat_core.schema import MaxContext, ModelRef, PromptSource, Recipe, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.settings.knobs import PLAIN

CACHES = ("dynamic", "static")
MAX_DIFFERENCE = 0.02
STEP, WINDOW = 0.01, 0.03
WIDE_STEP = 0.75
SCENARIO = Scenario(prompt_tokens=256, output_tokens=8)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "hidden_size": 128,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}


class LimitedWorker(WorkerProcess):
    """A worker whose address space is limited from the moment when it loads a model; at first to what there is."""

    limit_bytes = resource.RLIM_INFINITY

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__({**environment, **ALLOCATORS["fixed"]})

    def call(self, operation: Operation, arguments: dict[str, Any], phase: str, limits: Limits) -> Any:
        if operation == "load":
            resource.prlimit(self.pid, resource.RLIMIT_AS, (self.limit_bytes, self.limit_bytes))
        return super().call(operation, arguments, phase, limits)


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--room-mib", type=at_least_one, default=48, metavar="N")
    options = parser.parse_args()
    if not hasattr(resource, "prlimit"):
        print("this system cannot limit the memory of another process", file=sys.stderr)
        return NOT_MEASURED
    record = Record(options)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        model = ModelRef(id=f"random:{folder}")
        LimitedWorker.limit_bytes = address_space(model) + options.room_mib * MIB
        cases = [case(cache, model, Path(folder)) for cache in CACHES]
    bounds = [
        bound
        for cache, one in zip(CACHES, cases, strict=True)
        for bound in (
            Bound(f"{cache}: |found - scanned| ÷ scanned", abs(one["difference"]), "<=", MAX_DIFFERENCE),
            Bound(f"{cache}: lengths that ran beyond one that failed", one["ran_beyond_a_failure"], "<=", 0),
        )
    ]
    values = {
        "shape": SHAPE,
        "environment": ALLOCATORS["fixed"],
        "limit_bytes": LimitedWorker.limit_bytes,
        "caches": dict(zip(CACHES, cases, strict=True)),
    }
    return record.close(read_machine("cpu", 1), bounds, values)


def settings(cache: str) -> dict[str, str]:
    return {**PLAIN, "dtype": "float32", "cache": cache}


def recipe_for(model: ModelRef, cache: str, scenario: Scenario) -> Recipe:
    target = Target(model=model, device="cpu", threads=1)
    return TransformersEngine().recipe({**settings(cache), "threads": "1"}, scenario, target)


def address_space(model: ModelRef) -> int:
    """Of a worker that has served the scenario, bytes."""
    recipe = recipe_for(model, CACHES[0], SCENARIO)
    with LimitedWorker(recipe.environment) as worker:
        prefill(worker, recipe, SCENARIO)
        return int(psutil.Process(worker.pid).memory_info().vms)


def prefill(worker: WorkerProcess, recipe: Recipe, scenario: Scenario) -> None:
    """What a trial asks of a worker."""
    with tempfile.TemporaryDirectory() as scratch:
        worker.call("start", {"engine": "transformers", "scratch": scratch}, "start", PATIENT)
        worker.call("load", dict(recipe.load), "load", PATIENT)
        worker.call("prepare", recipe.model_dump(mode="json"), "prepare", PATIENT)
        source = PromptSource(kind="text", value="any text will do")
        spec = PromptSpec(source=source, tokens=scenario.prompt_lengths, nonce=0)
        arguments = {"prompt": spec.model_dump(mode="json"), "max_new_tokens": scenario.output_tokens}
        for _ in range(context.CALLS):
            worker.call("prefill", arguments, "context", PATIENT)


def runs(model: ModelRef, cache: str, tokens: int) -> bool:
    """Whether a length runs in a worker of its own; anything but a lack of memory ends the benchmark."""
    scenario = context.scenario(tokens)
    recipe = recipe_for(model, cache, scenario)
    try:
        with LimitedWorker(recipe.environment) as worker:
            prefill(worker, recipe, scenario)
    except WorkerFailed as failed:
        if failed.failure.kind != "oom_host":
            print(f"{tokens} tokens: {failed.failure}", file=sys.stderr)
            raise SystemExit(NOT_MEASURED) from failed
        return False
    return True


def found_by_kvat(model: ModelRef, cache: str, out: Path) -> MaxContext:
    objective = Objective(ttft=1.0, context=1.0)
    profile = Profile(name="longest", scenarios=(SCENARIO,), objective=objective, launches=1, samples=1)
    request = TuneRequest(
        out=out / cache, model=model.id, device="cpu", threads=1, profile=profile, pinned=settings(cache), search="grid"
    )
    found = tune(request, open_worker=LimitedWorker).plan.max_context
    assert found is not None
    return found


def lengths(found: int) -> Iterator[int]:
    """All that are scanned, in steps of a constant share."""
    most = SHAPE["max_position_embeddings"]
    for first, last, step in (
        (SCENARIO.total_tokens, most, WIDE_STEP),
        ((1 - WINDOW) * found, (1 + WINDOW) * found, STEP),
    ):
        for number in range(1 + int(math.log(last / first) / math.log1p(step))):
            yield min(most, round(first * (1 + step) ** number))


def case(cache: str, model: ModelRef, folder: Path) -> dict[str, Any]:
    found = found_by_kvat(model, cache, folder)
    print(f"{cache}: kvat found {found.tokens} tokens, bounded by {found.bounded_by}", flush=True)
    scan = {tokens: runs(model, cache, tokens) for tokens in sorted(set(lengths(found.tokens)))}
    longest = max(tokens for tokens, ran in scan.items() if ran)
    shortest_failed = min((tokens for tokens, ran in scan.items() if not ran), default=math.inf)
    print(f"{cache}: a scan of {len(scan)} lengths finds {longest}", flush=True)
    return {
        "found": found.model_dump(mode="json"),
        "scanned_tokens": longest,
        "difference": found.tokens / longest - 1,
        "ran_beyond_a_failure": sum(ran for tokens, ran in scan.items() if tokens > shortest_failed),
        "scan": scan,
    }


if __name__ == "__main__":
    raise SystemExit(main())
