"""Is the winner of a plan faster by what the plan claims, for somebody who does not use kvat?

    python benchmarks/claimed_ratio.py [--model random:smollm2-135m] [--processes 8] [--samples 3] [--reuse DIR]

Tunes the model for profile ci-micro, one thread, in the default space, or takes the plan that is in DIR, of any run
of one scenario on this machine with one thread. Then measures the winner and what Transformers
does by itself, each in as many fresh processes, by `_plain_generate.py`: plain `from_pretrained` and `generate` of one
saved model with random weights, the winner's settings applied by hand. Processes come in the order ABBA, and
neighbours are a pair; the ratio is the profile's: time to first token and decode rate, by their weights.

The mean over the pairs has to lie within the plan's interval, widened by the plan's noise floor at both ends. Where
what runs today has won, nothing is claimed of it, but of the others: that none is shown to be faster by more than ε. So
then it is the one with the best score that is measured, against the interval of that score; and where the verdict is a
tie, its ratio has to be at most 1 + ε as well.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser, run, tune

from kvat_core import Plan, read_plan, stats
from kvat_core.machine import read_machine
from kvat_core.outputs import PLAN
from kvat_core.schema import Objective, Ratio, Scenario, eligible_by_score
from kvat_engine_transformers import random_path

PROFILE = "ci-micro"
THREADS = 1
PLAIN = Path(__file__).with_name("_plain_generate.py")
ORDERS = (("default", "chosen"), ("chosen", "default"))


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--model", default="random:smollm2-135m", metavar="random:NAME")
    parser.add_argument("--processes", type=at_least_one, default=8, metavar="N")
    parser.add_argument("--samples", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--reuse", type=Path, metavar="DIR", help="of a run of this model")
    options = parser.parse_args()
    record = Record(options)
    with TemporaryDirectory() as directory:
        plan = reused(options.reuse) if options.reuse else tuned(Path(directory) / "tuned", options.model)
        chosen, claim = claimed(plan)
        model = Path(directory) / "model"
        save_model(options.model, model)
        runs = {"default": {}, "chosen": plan.candidate(chosen).settings}
        pairs = measure(model, plan.profile.scenarios[0], runs, options.processes, options.samples)
    assert pairs[0]["default"]["dtype"] == plan.incumbent.settings["dtype"], "what runs today is what comes by itself"
    fresh = stats.compare([log_ratio(pair, plan.profile.objective) for pair in pairs]).ratio()
    noise_floor = plan.confidence.noise_floor or 0.0
    low, high = claim.low / (1 + noise_floor), claim.high * (1 + noise_floor)
    print(f"{plan.verdict}: {plan.candidate(chosen).label}, claimed {shown(claim)}, afresh {shown(fresh)}")
    bounds = [
        Bound("ratio measured afresh, lower end of the claim", fresh.value, ">=", low),
        Bound("ratio measured afresh, upper end of the claim", fresh.value, "<=", high),
    ]
    if plan.verdict == "tie":
        bounds.append(Bound("ratio of the best other one, afresh", fresh.value, "<=", 1 + plan.confidence.epsilon))
    values = {
        "profile": plan.profile.model_dump(mode="json"),
        "verdict": plan.verdict,
        "chosen": plan.candidate(chosen).label,
        "claim": claim.model_dump(),
        "noise_floor": noise_floor,
        "epsilon": plan.confidence.epsilon,
        "fresh": fresh.model_dump(),
        "pairs": pairs,
    }
    return record.close(plan.machine, bounds, values)


def tuned(out: Path, model: str) -> Plan:
    """The plan of a model."""
    arguments = ("--model", model, "--profile", PROFILE, "--threads", str(THREADS), "--space", "default")
    tune(out, "--engine", "transformers", *arguments)
    return read_plan(out / PLAN)


def reused(out: Path) -> Plan:
    """The plan of another run."""
    plan = read_plan(out / PLAN)
    here = read_machine(plan.machine.device, THREADS, plan.machine.device_memory_bytes)
    if plan.machine.fingerprint != here.fingerprint or len(plan.profile.scenarios) != 1:
        print(f"{out} holds a plan of another machine, or of several scenarios; name another --reuse", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return plan


def claimed(plan: Plan) -> tuple[str, Ratio]:
    """Id of the candidate that the plan claims something of, and how much faster it is than what runs today."""
    winner, today = plan.require_winner().id, plan.incumbent.id
    others = [one for one in eligible_by_score(plan.candidates) if one.id != today]
    if winner != today and plan.ratio is not None:
        found, claim = winner, plan.ratio.score
    elif others and others[0].score is not None:
        found, claim = others[0].id, others[0].score
    else:
        found, claim = winner, None
    if claim is None or claim.low is None:
        print("the plan claims nothing of any candidate but what runs today", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return found, claim


def save_model(model: str, directory: Path) -> None:
    """A checkpoint of the shape, with random weights in the dtype that its configuration names."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(random_path(model.removeprefix("random:")))
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(directory)


def measure(
    model: Path, scenario: Scenario, runs: Mapping[str, Mapping[str, str]], processes: int, samples: int
) -> list[dict[str, Any]]:
    """Pairs of neighbouring processes, one of each kind; who comes first changes from pair to pair."""
    os.environ.update({"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
    shape = [str(one) for one in (scenario.prompt_tokens, scenario.output_tokens, samples)]
    pairs = []
    for number in range(processes):
        pair = {}
        for kind in ORDERS[number % 2]:
            settings = [f"{knob}={value}" for knob, value in runs[kind].items()]
            printed = run([sys.executable, str(PLAIN), str(model), *shape, *settings]).stdout
            pair[kind] = json.loads(printed.splitlines()[-1])
        print(json.dumps(pair), flush=True)
        pairs.append(pair)
    return pairs


def log_ratio(pair: Mapping[str, Mapping[str, float]], objective: Objective) -> float:
    """Log of the score of the chosen one over that of the default."""
    chosen, default = pair["chosen"], pair["default"]
    ttft = math.log(default["ttft_s"] / chosen["ttft_s"])
    decode = math.log(chosen["decode_tps"] / default["decode_tps"])
    return (objective.ttft * ttft + objective.decode * decode) / (objective.ttft + objective.decode)


def shown(ratio: Ratio) -> str:
    """A ratio with its interval, which one pair does not have."""
    interval = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{ratio.value:.3f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
