"""Does everything that Transformers offers on a CPU really run, and what do quantised caches lose?

    python benchmarks/every_family.py [--budget 14m] [--reuse DIR] [--out FILE]

Two tunes of the built-in Llama with one thread and a prompt of 512 tokens, in float32. The first one has the full space
and races. To save time it leaves out further sizes of a chunk, group or residual, shared blocks, `inference_mode`,
`max-autotune`, and `sdpa_flash`, which `sdpa` takes by itself here. The second one times every quantised cache beside
what runs today, so that each is held against its reference, token by token. With --reuse a tune whose plan DIR holds
is not made again, and one that is made is left there.

Bounds: every family of settings has a candidate whose proof holds and that was timed; int2 caches of optimum-quanto and
of HQQ, which has to be installed, are found lossy and lose more than their int4 ones; nothing that loses more than
the limits allow is recommended.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _record import NOT_MEASURED, Bound, Record, option_parser, tune

from kvat_core import Plan, read_plan
from kvat_core.machine import read_machine
from kvat_core.outputs import PLAN

QUANTISED = ("quanto_int4", "quanto_int2", "hqq_int8", "hqq_int4", "hqq_int2", "fp8")
FAMILIES: Mapping[str, Mapping[str, str]] = {
    "SDPA": {"attention": "sdpa", "cache": "dynamic", "prefill_chunk": "off"},
    "SDPA math": {"attention": "sdpa_math"},
    "eager": {"attention": "eager"},
    "flex attention": {"attention": "flex_attention"},
    "static": {"cache": "static", "compile": "off"},
    "compiled": {"compile": "default"},
    "chunked": {"prefill_chunk": "128"},
    "compiled and chunked": {"compile": "default", "prefill_chunk": "128"},
    "paged": {"cache": "paged"},
    **{cache: {"cache": cache} for cache in QUANTISED},
}
"""Name to the settings that its candidates have in common."""
COMMON = (
    "--engine",
    "transformers",
    "--model",
    "builtin:llama",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--space",
    "full",
)
FIXED = ("dtype=float32", "grad_mode=no_grad")
LEFT_OUT = ("residual_length=32", "group_size=32", "block_sharing=on")
TUNES = {
    "families": {
        "set": FIXED,
        "exclude": (
            *LEFT_OUT,
            *("attention=sdpa_flash", "compile=max-autotune", "prefill_chunk=512", "prefill_chunk=2048"),
        ),
    },
    "quantised": {
        "set": (*FIXED, "attention=sdpa", "compile=off", "prefill_chunk=off"),
        "exclude": (*LEFT_OUT, "cache=static", "cache=paged"),
        "search": ("grid",),
    },
}
"""Name to options of `kvat tune`, each with all its values."""


def main() -> int:
    options = _options()
    record = Record(options)
    with TemporaryDirectory() as scratch:
        plans = {name: tuned(name, options.reuse or Path(scratch), options.budget) for name in TUNES}
    families = {name: figures(plans["families"], settings) for name, settings in FAMILIES.items()}
    quantised = {name: figures(plans["quantised"], {"cache": name}) for name in QUANTISED}
    for found in (families, quantised):
        for name, one in found.items():
            print(f"{name}: {in_words(one)}")
    winners = {name: plan.candidate(plan.require_winner().id) for name, plan in plans.items()}
    for name, winner in winners.items():
        print(f"winner of {name}: {winner.label}, {winner.fidelity.verdict}")
    least = [quantised[name] for name in QUANTISED if name.endswith("int2")]
    more = [quantised[name.replace("int2", "int4")] for name in QUANTISED if name.endswith("int2")]
    recommended = [one for name, plan in plans.items() for one in named(plan) if lost(plan, one)]
    bounds = [
        Bound("families that were not timed", sum(one["timed"] == 0 for one in families.values()), "<=", 0),
        Bound("int2 caches that are not found lossy", sum(one["verdict"] != "lossy" for one in least), "<=", 0),
        Bound("int2 caches that lose no more than int4", sum(map(loses_no_more, least, more)), "<=", 0),
        Bound("lossy ones that are recommended", len(recommended), "<=", 0),
    ]
    values = {
        "families": families,
        "quantised": quantised,
        "winners": {name: one.label for name, one in winners.items()},
    }
    return record.close(plans["families"].machine, bounds, values)


def _options() -> Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--budget", default="14m", metavar="TIME", help="of each tune")
    parser.add_argument("--reuse", type=Path, metavar="DIR")
    return parser.parse_args()


def tuned(name: str, parent: Path, budget: str) -> Plan:
    """The plan of a tune, measured unless it is there."""
    out = parent / name
    if not (out / PLAN).exists():
        words = (word for option, values in TUNES[name].items() for one in values for word in (f"--{option}", one))
        tune(out, *COMMON, "--context", "512", "--budget", budget, *words)
    plan = read_plan(out / PLAN)
    versions = {name: version(name) for name in plan.engine.versions}
    if plan.machine.fingerprint != read_machine("cpu", 1).fingerprint or plan.engine.versions != versions:
        print(f"{out} holds a plan of another machine or other versions; name another --reuse", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return plan


def figures(plan: Plan, settings: Mapping[str, str]) -> dict[str, Any]:
    """How many that have these settings were timed, and what is known of the one that decodes fastest."""
    members = [one for one in plan.candidates if settings.items() <= one.settings.items()]
    timed = [one for one in members if one.scenarios and one.failure is None]
    told: dict[str, Any] = {
        "timed": len(timed),
        "failed": sorted({one.failure.reason for one in members if one.failure is not None}),
    }
    if not timed:
        return {**told, "verdict": None, "kl_nats": None}
    best = max(timed, key=lambda one: one.scenarios[0].decode_tps.median)
    call, judged = best.scenarios[0], best.fidelity
    return {
        **told,
        "label": best.label,
        "ttft_s": call.ttft_s.median,
        "decode_tps": call.decode_tps.median,
        "kv_cache_bytes": call.kv_cache_bytes,
        "first_call_s": None if call.compile_cost is None else call.compile_cost.first_call_s,
        "verdict": judged.verdict,
        "kl_nats": judged.kl_nats,
        "top1_agreement": judged.top1_agreement,
    }


def in_words(one: Mapping[str, Any]) -> str:
    """A line for people."""
    if not one["timed"]:
        return f"not timed; {'; '.join(one['failed']) or 'not reached'}"
    speed = f"{1000 * one['ttft_s']:.1f} ms to the first token, {one['decode_tps']:.0f} tok/s"
    alike = (
        "" if one["kl_nats"] is None else f", KL {one['kl_nats']:.2g} nats, {100 * one['top1_agreement']:.1f} % alike"
    )
    return f"{one['timed']} timed; {one['label']}: {speed}; {one['verdict'] or 'not judged'}{alike}"


def loses_no_more(few: Mapping[str, Any], many: Mapping[str, Any]) -> bool:
    """Whether of two caches the one of fewer bits is not shown to lose more."""
    return None in (few["kl_nats"], many["kl_nats"]) or few["kl_nats"] <= many["kl_nats"]


def named(plan: Plan) -> tuple[str, ...]:
    """Candidates that a plan gives to anybody: its winner, who cannot be told from it, and who stands in for it."""
    return (plan.require_winner().id, *plan.equivalents, *(rule.use for rule in plan.rules))


def lost(plan: Plan, candidate_id: str) -> bool:
    """Whether a candidate was found to lose more than the limits allow."""
    return plan.candidate(candidate_id).fidelity.verdict in ("lossy", "broken")


if __name__ == "__main__":
    sys.exit(main())
