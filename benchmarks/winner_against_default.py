"""How much faster is what kvat recommends than what somebody runs who sets nothing?

    python benchmarks/winner_against_default.py [--cases one two] [--blocks 4] [--samples 3] [--reuse DIR] [--out FILE]

Saves a bfloat16 checkpoint of random weights, and tunes it for one prompt of 512 and 64 output tokens in the default
space, first token and decoding weighing alike, once with one thread and once with two. Then times, with as many threads
and in fresh processes without kvat by `_timed_generate.py`, the plan's own `snippet.py` beside plain `from_pretrained`
and `generate`. A block is four processes in the order ABBA, the next one in the order BAAB; its ratio is that of
the means of both kinds. With --reuse a case that DIR/NAME holds a plan of is not tuned again, and one that is
tuned is left there.

Bounds, for random:smollm2-135m at these lengths, on a processor that has to widen bfloat16 to multiply it: with one
thread the first token comes at least 1.5 times as fast, at 0.97 of the decode rate or more; with two the geometric mean
of both is at least 1.3. One with instructions for bfloat16 (AMX, AVX512_BF16) is fastest in prefill by what somebody
runs who sets nothing; there, and of everything else, the figures are reported only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser, run, tune
from claimed_ratio import shown
from transformers import AutoModelForCausalLM

from kvat_core import Plan, Scenario, read_plan, stats
from kvat_core.machine import read_machine
from kvat_core.outputs import PLAN, SNIPPET
from kvat_core.schema import Objective, Ratio
from kvat_engine_transformers import build_random_model, builtin_path, random_path


@dataclass(frozen=True)
class Case:
    """With how many threads, and how much faster the winner has to be at least, by metric."""

    threads: int
    least: Mapping[str, float]


CASES = {"one": Case(1, {"ttft": 1.5, "decode": 0.97}), "two": Case(2, {"both": 1.3})}
MODEL = "random:smollm2-135m"
SCENARIO = Scenario(prompt_tokens=512, output_tokens=64)
OBJECTIVE = Objective(ttft=0.5, decode=0.5)
TIMED = Path(__file__).with_name("_timed_generate.py")
ORDERS = (("default", "winner", "winner", "default"), ("winner", "default", "default", "winner"))
METRICS = ("ttft", "decode", "both")

BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}
"""As the kernel names instructions that multiply bfloat16: of x86 the first two, of ARM the last."""

Block = dict[str, Any]


def main() -> int:
    options = _options()
    record, started_load = Record(options), os.getloadavg()
    scenario = Scenario(prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        checkpoint = scratch / Path(options.model.partition(":")[2]).name
        save_checkpoint(options.model, checkpoint)
        parent = options.reuse or scratch
        plans = {case: tuned(parent / case, CASES[case], checkpoint, scenario, options) for case in options.cases}
        values = {
            case: against_default(plan, parent / case / SNIPPET, checkpoint, scenario, options)
            for case, plan in plans.items()
        }
    for case, found in values.items():
        for line in lines(case, found):
            print(line)
    free = why_unbound(options.model, scenario)
    if free is not None:
        print(f"no bounds: {free}")
    bounds = [] if free is not None else [bound for case, found in values.items() for bound in bounds_of(case, found)]
    told = {"model": options.model, "scenario": scenario.key, "objective": OBJECTIVE.model_dump(), "no_bounds": free}
    machine = plans[options.cases[-1]].machine
    return record.close(machine, bounds, {**told, "load_average": started_load, "cases": values})


def _options() -> Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--blocks", type=at_least_one, default=4, metavar="N", help="of four processes each")
    parser.add_argument("--samples", type=at_least_one, default=3, metavar="N", help="timed calls of a process")
    parser.add_argument("--reuse", type=Path, metavar="DIR")
    parser.add_argument("--model", default=MODEL, metavar="random:NAME|random:DIR|builtin:NAME")
    parser.add_argument("--prompt-tokens", type=at_least_one, default=SCENARIO.prompt_tokens, metavar="N")
    parser.add_argument("--output-tokens", type=at_least_one, default=SCENARIO.output_tokens, metavar="N")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="KNOB=VALUE", help="not to be tried, to save time")
    return parser.parse_args()


def save_checkpoint(model: str, directory: Path) -> None:
    """The same bfloat16 files each time: random weights of a shape, or those that come with the engine."""
    scheme, _, name = model.partition(":")
    if scheme == "random":
        built = build_random_model(random_path(name), dtype=torch.bfloat16, device="cpu", attention="sdpa")
    else:
        built = AutoModelForCausalLM.from_pretrained(builtin_path(name), dtype=torch.bfloat16)
    built.save_pretrained(directory)


def tuned(out: Path, case: Case, checkpoint: Path, scenario: Scenario, options: Namespace) -> Plan:
    """The plan of a case, measured unless it is there."""
    if not (out / PLAN).exists():
        profile = checkpoint.with_suffix(".profile.json")
        shape = {"prompt_tokens": scenario.prompt_tokens, "output_tokens": scenario.output_tokens}
        told = {"format": 1, "name": "one-prompt", "scenarios": [shape], "objective": OBJECTIVE.model_dump()}
        profile.write_text(json.dumps(told) + "\n")
        what = ("--engine", "transformers", "--model", str(checkpoint), "--profile", str(profile), "--device", "cpu")
        left_out = (word for one in options.exclude for word in ("--exclude", one))
        tune(out, *what, "--threads", str(case.threads), "--space", "default", *left_out)
    plan = read_plan(out / PLAN)
    asked = (read_machine("cpu", case.threads).fingerprint, weights_sha256(checkpoint), (scenario,), OBJECTIVE)
    if asked != (plan.machine.fingerprint, plan.model.sha256, plan.profile.scenarios, plan.profile.objective):
        print(f"{out} holds a plan of another machine, model or traffic; name another --reuse", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return plan


def weights_sha256(checkpoint: Path) -> str:
    """As a plan names a model."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def against_default(
    plan: Plan, snippet: Path, checkpoint: Path, scenario: Scenario, options: Namespace
) -> dict[str, Any]:
    """Blocks of fresh processes, and what they tell."""
    winner, threads = plan.require_winner(), plan.machine.threads
    words = {"default": [], "winner": [str(snippet)]}
    shape = [str(one) for one in (scenario.prompt_tokens, scenario.output_tokens, options.samples)]
    os.environ.update({"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})
    blocks = []
    for number in range(options.blocks):
        block: Block = {"load_average_1m": os.getloadavg()[0], "default": [], "winner": []}
        for kind in ORDERS[number % 2]:
            printed = run([sys.executable, str(TIMED), str(checkpoint), *shape, *words[kind]]).stdout
            block[kind].append(json.loads(printed.splitlines()[-1]))
        blocks.append(block)
        print(sentence(number, block), flush=True)
    for kind, choice in (("default", plan.incumbent), ("winner", winner)):
        for one in (one for block in blocks for one in block[kind]):
            ran, meant = (one["dtype"], one["threads"]), (choice.settings["dtype"], threads)
            assert ran == meant, f"the {kind} ran with {ran}, the plan says {meant}"
    return {
        "threads": threads,
        "verdict": plan.verdict,
        "winner": winner.model_dump(),
        "incumbent": plan.incumbent.model_dump(),
        "noise_floor": plan.confidence.noise_floor if plan.confidence else None,
        "claimed": plan.ratio.model_dump() if plan.ratio else None,
        "blocks": blocks,
        "ratios": {metric: ratio(blocks, metric).model_dump() for metric in METRICS},
    }


def ratio(blocks: list[Block], metric: str) -> Ratio:
    """How much faster the winner is."""
    return stats.compare(
        [log_speed(one["winner"], metric) - log_speed(one["default"], metric) for one in blocks]
    ).ratio()


def log_speed(processes: list[dict[str, Any]], metric: str) -> float:
    """Mean over processes of the log of their median speed; of both metrics together, the mean of the two."""
    if metric == "both":
        return fmean([log_speed(processes, "ttft"), log_speed(processes, "decode")])
    medians = [figure(one, metric) for one in processes]
    return fmean(-math.log(one) if metric == "ttft" else math.log(one) for one in medians)


def figure(process: Mapping[str, Any], metric: str) -> float:
    """Median of the timed calls: seconds to the first token, or tokens per second."""
    key = "ttft_s" if metric == "ttft" else "decode_tps"
    return median(call[key] for call in process["timed"])


def sentence(number: int, block: Block) -> str:
    """One line for somebody who waits."""
    told = [
        f"{kind} {fmean(figure(one, 'ttft') for one in block[kind]):.4f} s to the first token, "
        f"{fmean(figure(one, 'decode') for one in block[kind]):.2f} tokens/s"
        for kind in ("default", "winner")
    ]
    return f"block {number}: {'; '.join(told)}; load average {block['load_average_1m']:.2f}"


def lines(case: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What was found in one case."""
    yield f"{case}: {found['verdict']}, {found['winner']['label']}"
    for metric in METRICS:
        fresh = shown(Ratio.model_validate(found["ratios"][metric]))
        yield f"{case}: {metric} {fresh} times as fast as by default, {len(found['blocks'])} blocks"


def why_unbound(model: str, scenario: Scenario) -> str | None:
    """Why nothing is demanded of these figures, or None."""
    if (model, scenario) != (MODEL, SCENARIO):
        return f"they are of {MODEL} with {SCENARIO.prompt_tokens} + {SCENARIO.output_tokens} tokens"
    cpu = Path("/proc/cpuinfo")
    found = sorted(BFLOAT16.intersection(cpu.read_text().split())) if cpu.is_file() else []
    return f"this processor multiplies bfloat16 by itself ({', '.join(found)})" if found else None


def bounds_of(case: str, found: Mapping[str, Any]) -> Iterator[Bound]:
    """What has to hold of the point estimates."""
    for metric, least in CASES[case].least.items():
        yield Bound(f"{case}: {metric}, winner ÷ default", found["ratios"][metric]["value"], ">=", least)


if __name__ == "__main__":
    sys.exit(main())
