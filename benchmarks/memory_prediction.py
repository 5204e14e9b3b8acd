"""Is the memory that kvat predicts from a model's shape the memory that its calls then take?

    python benchmarks/memory_prediction.py [--contexts 512 1024 …] [--out FILE]

Per case the prediction is that of `kvat_core.roofline.peak_bytes`, from the shape that the engine describes, its
footprint for these settings, and the memory of a first call as its ceilings tell. Beside it stands how far the
resident size of a worker rises above that after loading, by what a memory launch of `kvat tune` asks of it. They have
to agree within 10 % of the measured rise or 16 MiB, whichever is larger.

Three shapes with random weights: heads in groups, as many KV heads as query heads, and a large vocabulary. A context
is prompt and output together, and the output has eight tokens. As in memory_agreement.py, the size from which on glibc
gives freed memory back is fixed; else the same calls can peak quite differently by chance. Linux only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser
from memory_agreement import ALLOCATORS, CACHES, MIB, PATIENT, report, rise

from kvat_core import Scenario, roofline
from kvat_core.machine import read_machine
from kvat_core.measure.supervisor import WorkerProcess
from kvat_core.schema import Ceilings, ModelRef, ModelShape, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.settings.knobs import PLAIN

MAX_DIFFERENCE = 0.10
MAX_DIFFERENCE_BYTES = 16 * MIB
CONTEXTS = (512, 1024, 2048, 4096, 8192)
OUTPUT_TOKENS = 8
THREADS = 1
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "max_position_embeddings": max(CONTEXTS),
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "one KV head per query head": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 32000,
    },
    "large vocabulary": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 131072,
        "tie_word_embeddings": True,
    },
}


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--contexts", type=at_least_one, nargs="+", default=list(CONTEXTS), metavar="N")
    options = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        print("this system does not tell the peak of a span of time", file=sys.stderr)
        return NOT_MEASURED
    record = Record(options)
    first_call_bytes = ask_first_call_bytes()
    cases = [
        case(name, cache, context, first_call_bytes)
        for name, cache, context in product(SHAPES, CACHES, options.contexts)
    ]
    worst = max(abs(one["difference_bytes"]) / one["allowed_bytes"] for one in cases)
    bounds = [Bound(f"largest difference of {len(cases)} peaks ÷ what is allowed", worst, "<=", 1.0)]
    values = {
        "environment": ALLOCATORS["fixed"],
        "shapes": SHAPES,
        "first_call_bytes": first_call_bytes,
        "peaks": cases,
    }
    return record.close(read_machine("cpu", THREADS), bounds, values)


def ask_first_call_bytes() -> int:
    """What the engine's ceilings say, from a process of their own as in a run."""
    with WorkerProcess({**ALLOCATORS["fixed"], "OMP_NUM_THREADS": str(THREADS)}) as worker:
        worker.call("start", {"engine": "transformers", "scratch": None}, "start", PATIENT)
        asked: dict[str, Any] = {"device": "cpu", "threads": THREADS, "dtypes": ["float32"]}
        ceilings = Ceilings.model_validate(worker.call("ceilings", asked, "ceilings", PATIENT))
    assert ceilings.first_call_bytes is not None
    return ceilings.first_call_bytes


def case(name: str, cache: str, context: int, first_call_bytes: int) -> dict[str, Any]:
    """Prediction and measurement of one shape with one cache at one length."""
    engine = TransformersEngine()
    scenario = Scenario(prompt_tokens=context - OUTPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
    settings = {**PLAIN, "dtype": "float32", "cache": cache}
    settings["threads"] = str(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**COMMON, **SHAPES[name]}))
        model = ModelRef(id=f"random:{folder}")
        shape = described(model)
        recipe = engine.recipe(settings, scenario, Target(model=model, device="cpu", threads=THREADS))
        environment = {**recipe.environment, **ALLOCATORS["fixed"]}
        measured = rise(report(recipe.model_copy(update={"environment": environment}), scenario))
    footprint = engine.footprint(settings, scenario, shape, "cpu")
    assert footprint is not None
    predicted = roofline.peak_bytes(shape, footprint, scenario, first_call_bytes)
    assert predicted is not None
    print(f"{name}, {cache}, {context}: {predicted / MIB:.1f} MiB predicted, {measured / MIB:.1f} MiB", flush=True)
    return {
        "shape": name,
        "cache": cache,
        "context_tokens": context,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "difference_bytes": predicted - measured,
        "allowed_bytes": max(MAX_DIFFERENCE_BYTES, MAX_DIFFERENCE * measured),
    }


def described(model: ModelRef) -> ModelShape:
    """The shape as a run has it: from the engine, in a child."""
    with WorkerProcess({}) as worker:
        worker.call("start", {"engine": "transformers", "scratch": None}, "start", PATIENT)
        asked = {"model": model.model_dump(mode="json"), "device": "cpu", "options": {}}
        answer = worker.call("describe", asked, "describe", PATIENT)
    return ModelShape.model_validate(answer)


if __name__ == "__main__":
    sys.exit(main())
