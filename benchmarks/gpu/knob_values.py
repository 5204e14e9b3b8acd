"""Stage: every value of every knob is applied as set and answers right, or there is a reason why it cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _record import NOT_MEASURED, Bound, run
from stage import Stage

ONE_VALUE = Path(__file__).with_name("_one_value.py")
LONGEST_S = 240.0
"""Of one value, with all that it compiles; a stage that has less left does not begin with it."""
LEAST_RECALL = 0.96
"""Share of right answers of what loses nothing."""


def checked(directory: Path, device: str, stage: Stage) -> bool:
    """Try what is left to be tried; whether that is all. Values that need the same settings are tried once."""
    values = _listed(directory, device)
    while (value := next((one for one in values if one["settings"] and "result" not in one), None)) is not None:
        if stage.left_s < LONGEST_S:
            return False
        value["result"] = _tried(device, value["settings"])
        for one in values:
            if one["settings"] == value["settings"]:
                one["result"] = value["result"]
        _file(directory).write_text(json.dumps(values, indent=1) + "\n")
        print(f"{value['value']}: {_outcome(value)}", flush=True)
    return True


def found(directory: Path) -> list[dict[str, Any]]:
    """All values with what they showed."""
    return list(json.loads(_file(directory).read_text()))


def bounds(values: Sequence[dict[str, Any]]) -> Iterator[Bound]:
    """What has to hold of them."""
    ran = [one["result"] for one in values if one["settings"]]
    yield Bound(f"knob values, of {len(ran)} that can run, not applied as set", sum(map(_wrong, ran)), "<=", 0)
    lossless = [one["result"] for one in values if one["settings"] and not one["lossy"] and not _wrong(one["result"])]
    yield Bound(
        f"lossless knob values, of {len(lossless)}, that forget",
        sum(one["recall"] < LEAST_RECALL for one in lossless),
        "<=",
        0,
    )
    others = _clearly_others(lossless)
    yield Bound(f"lossless knob values, of {len(lossless)}, that clearly predict another token", others, "<=", 0)


def _clearly_others(values: Sequence[dict[str, Any]]) -> int:
    return sum(one["clear_divergence"] is not None for one in values)


def table(values: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| knob value | outcome |"
    yield "|---|---|"
    for one in values:
        yield f"| {one['value']} | {_outcome(one)} |"


def _listed(directory: Path, device: str) -> list[dict[str, Any]]:
    if not _file(directory).is_file():
        _file(directory).write_text(run([sys.executable, str(ONE_VALUE), device]).stdout.splitlines()[-1] + "\n")
    values = found(directory)
    if not values:
        print(f"the engine has nothing to set on {device}", file=sys.stderr)
        raise SystemExit(NOT_MEASURED)
    return values


def _file(directory: Path) -> Path:
    return directory / "knob_values.json"


def _tried(device: str, settings: dict[str, str]) -> dict[str, Any]:
    """What a process of its own prints; that it hangs or dies is a result as well."""
    command = [sys.executable, str(ONE_VALUE), device, json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {LONGEST_S:.0f} s"}
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}: {(done.stderr.splitlines() or ['silent'])[-1]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _wrong(result: dict[str, Any]) -> bool:
    return bool("failed" in result or result["mismatches"] or result["invalid"] or result["compilations"])


def _outcome(one: dict[str, Any]) -> str:
    if not one["settings"]:
        return f"cannot run: {one['reason']}"
    result = one["result"]
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    if _wrong(result):
        compiled = f"{result['compilations']} compilations after warm-up" if result["compilations"] else ""
        return "NOT APPLIED: " + "; ".join(filter(None, [*result["mismatches"], result["invalid"], compiled]))
    alike = f"KL {result['kl_nats']:.2g} nats, first choices agree in {result['top1_agreement']:.1%}"
    return f"applied, recall {result['recall']:.3f}, {alike}{' (lossy)' if one['lossy'] else ''}"
