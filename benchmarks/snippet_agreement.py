"""Is the snippet as fast as its plan says?

    python benchmarks/snippet_agreement.py [--cases NAME ...] [--runs 3] [--reuse DIR] [--out FILE]

Tunes each case, then runs its snippet in fresh processes. The median decode rate of those runs
has to lie within the winner's interval in the plan, widened by 15 % at both ends. With --reuse
a case that DIR/NAME holds a plan of is not tuned again, and one that is tuned is left there.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from _record import NOT_MEASURED, Bound, Record, at_least_one, option_parser, run, tune

from kvat_core import Plan, read_plan
from kvat_core.machine import read_machine
from kvat_core.outputs import PLAN
from kvat_core.schema import ScenarioResult

CASES = {
    "llama-chat-agent": ("--model", "builtin:llama", "--profile", "chat-agent"),
    "llama-longform": ("--model", "builtin:llama", "--profile", "longform", "--context", "512,1024"),
    "mistral-chat-agent": ("--model", "builtin:mistral", "--profile", "chat-agent"),
    "mistral-longform": ("--model", "builtin:mistral", "--profile", "longform", "--context", "512,1024"),
    "smollm2-ci-micro": ("--model", "random:smollm2-135m", "--profile", "ci-micro"),
}
WIDENED = 0.15

Shape = tuple[int, int, int]
"""Prompt tokens, output tokens, batch size."""


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--runs", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--reuse", type=Path, metavar="DIR")
    options = parser.parse_args()
    record = Record(options)
    with ExitStack() as stack:
        parent = options.reuse or Path(stack.enter_context(TemporaryDirectory()))
        plans = {case: tuned(parent / case, CASES[case]) for case in options.cases}
        values = {case: compare(plan, parent / case / "snippet.py", options.runs) for case, plan in plans.items()}
    compared = [(case, scenario) for case in values for scenario in values[case]["scenarios"]]
    for case, scenario in compared:
        print(sentence(case, scenario))
    outside = sum(not scenario["inside"] for _, scenario in compared)
    bounds = [Bound(f"scenarios out of {len(compared)} outside their interval", outside, "<=", 0)]
    return record.close(next(iter(plans.values())).machine, bounds, {"widened": WIDENED, "cases": values})


def tuned(out: Path, arguments: tuple[str, ...]) -> Plan:
    """The plan of a case, measured unless it is there."""
    if not (out / PLAN).exists():
        tune(out, "--engine", "transformers", *arguments)
    plan = read_plan(out / PLAN)
    if plan.machine.fingerprint != read_machine(plan.machine.device, plan.machine.threads).fingerprint:
        print(f"{out} was tuned on another machine; name another directory with --reuse", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return plan


def compare(plan: Plan, snippet: Path, runs: int) -> dict[str, Any]:
    """The winner's figures beside what its snippet prints."""
    printed = [decode_rates(run([sys.executable, str(snippet)]).stdout) for _ in range(runs)]
    winner = plan.candidate(plan.winner.id)
    return {
        "model": plan.model.id,
        "profile": plan.profile.name,
        "winner": plan.winner.label,
        "noise_floor": plan.confidence.noise_floor,
        "plan_created": plan.created,
        "scenarios": [compare_scenario(one, [rates[shape_of(one)] for rates in printed]) for one in winner.scenarios],
    }


def compare_scenario(planned: ScenarioResult, snippet_tps: list[float]) -> dict[str, Any]:
    """One scenario: is the snippet's median inside the widened interval?"""
    low, high = planned.decode_tps.low * (1 - WIDENED), planned.decode_tps.high * (1 + WIDENED)
    return {
        "shape": shape_of(planned),
        "plan_decode_tps": planned.decode_tps.model_dump(),
        "snippet_decode_tps": snippet_tps,
        "low": low,
        "high": high,
        "inside": low <= median(snippet_tps) <= high,
    }


def decode_rates(stdout: str) -> dict[Shape, float]:
    """Decode tokens per second by shape, from the lines `name=value …` of a snippet."""
    lines = [dict(word.split("=") for word in line.split()) for line in stdout.splitlines()]
    return {
        (int(line["prompt_tokens"]), int(line["output_tokens"]), int(line["batch_size"])): float(line["decode_tps"])
        for line in lines
    }


def shape_of(planned: ScenarioResult) -> Shape:
    """What a snippet tells its scenarios apart by."""
    return planned.prompt_tokens, planned.output_tokens, planned.batch_size


def sentence(case: str, scenario: dict[str, Any]) -> str:
    """One line for a reader."""
    prompt_tokens, output_tokens, batch_size = scenario["shape"]
    planned, measured = scenario["plan_decode_tps"]["median"], median(scenario["snippet_decode_tps"])
    return (
        f"{case} {prompt_tokens}+{output_tokens}x{batch_size}: plan {planned:.1f} tokens/s, snippet {measured:.1f} "
        f"(allowed {scenario['low']:.1f} to {scenario['high']:.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
