"""What can be set on a device, and one setting of it tried: each call in a process of its own.

    python benchmarks/gpu/_one_value.py DEVICE             # settings in which each value of each knob occurs
    python benchmarks/gpu/_one_value.py DEVICE SETTINGS    # one of them, JSON: applied as the recipe says, and right?

Prints one line of JSON. The model is `builtin:llama`, which is trained to answer a recall task: what damages its cache
makes it forget, and what is less precise predicts otherwise than the plainest settings of the same dtype.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from kvat_core import Scenario, likeness, metrics
from kvat_core.engine import EngineError, Probe, SpaceRequest
from kvat_core.schema import Knob, KnobValue, Likeness, ModelRef, ModelShape, PromptSource, Target
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.model.recall import build_example, recall

MODEL = ModelRef(id="builtin:llama")
SCENARIO = Scenario(prompt_tokens=1024, output_tokens=64)
ANSWERS = 8
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
EXAMPLES = 4
ENGINE = TransformersEngine()

Settings = dict[str, str]


def main() -> None:
    device, *settings = sys.argv[1:]
    print(json.dumps(tried(device, json.loads(settings[0])) if settings else list(listed(device))))


def listed(device: str) -> Iterator[dict[str, Any]]:
    """Each value of each knob, with settings in which it runs, all else as by default, or why there are none."""
    probe, shape = ENGINE.probe(device, {}), ENGINE.describe(MODEL, device, {})
    knobs = ENGINE.space(shape, probe, SpaceRequest(space="full"))
    by_name = {knob.name: knob for knob in knobs}
    for knob in knobs:
        for value in knob.values:
            settings, reason = settings_with(knob, value, knobs, shape, probe)
            lossy = [name for name, one in (settings or {}).items() if is_lossy(by_name[name], one)]
            yield {"value": f"{knob.name}={value.name}", "settings": settings, "reason": reason, "lossy": bool(lossy)}


def settings_with(
    knob: Knob, value: KnobValue, knobs: Sequence[Knob], shape: ModelShape, probe: Probe
) -> tuple[Settings | None, str | None]:
    """The defaults with that value, and with as little else changed as makes them possible; or the reason."""
    if value.unavailable is not None:
        return None, value.unavailable
    settings = {one.name: one.default for one in knobs} | {knob.name: value.name}
    usable = {one.name: [each.name for each in one.values if each.unavailable is None] for one in knobs}
    for other, allowed in knob.when.items():
        active = [name for name in (settings[other], *usable[other]) if name in allowed]
        if not active:
            return None, f"is of {other}={' or '.join(allowed)}, none of which can run here"
        settings[other] = active[0]
    fixed = {knob.name, *knob.when}
    changed = ({**settings, name: one} for name in usable if name not in fixed for one in usable[name])
    possible = (one for one in (settings, *changed) if ENGINE.check(one, shape, probe) is None)
    found = next(possible, None)
    return found, None if found else ENGINE.check(settings, shape, probe)


def is_lossy(knob: Knob, name: str) -> bool:
    """Whether the value may change the output beyond rounding."""
    found = knob.value(name)
    return found is not None and found.lossy


def tried(device: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """What was read back in the proof, what a timed call after warm-up shows, and the share of right answers."""
    made = ENGINE.recipe(settings, SCENARIO, Target(model=MODEL, device=device))
    os.environ.update(made.environment)
    with TemporaryDirectory() as scratch:
        adapter: Any = ENGINE.adapter(Path(scratch))
        try:
            adapter.load_model(**made.load)
            adapter.prepare_cache(made)
            prompt = adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)
            applied = adapter.applied(prompt)
            for _ in range(made.warmup):
                adapter.run_decode(prompt, SCENARIO.output_tokens)
            timeline = adapter.run_decode(prompt, SCENARIO.output_tokens)
            answered = right_share(adapter)
            alike = likeness_to_reference(adapter, settings, device)
        except EngineError as error:
            return {"failed": f"{error.kind}: {error.reason}"}
    return {
        "mismatches": applied.mismatches,
        "read_back": applied.values,
        "invalid": metrics.invalid_reason(timeline, SCENARIO),
        "compilations": timeline.compilations,
        "recall": answered,
        "kl_nats": alike.kl_nats,
        "top1_agreement": alike.top1_agreement,
        "clear_divergence": alike.first_clear_divergence,
    }


def likeness_to_reference(adapter: Any, settings: Mapping[str, str], device: str) -> Likeness:
    """How alike the predictions are, token by token, to those of the plainest settings in the same dtype."""
    shape = ENGINE.describe(MODEL, device, {})
    plain = ENGINE.recipe(ENGINE.reference(settings, settings, shape), SCENARIO, Target(model=MODEL, device=device))
    reference: Any = type(adapter)()
    reference.load_model(**plain.load)
    reference.prepare_cache(plain)
    steps = SCENARIO.output_tokens
    whole = adapter.token_ids(adapter.make_prompt(TEXT, [SCENARIO.total_tokens], 1))
    ids, text = whole[:, :-steps], whole[:, -steps:]
    expected, _ = reference.score(ids, steps, text)
    noise = likeness.rounding(expected, reference.score_at_once(ids, text))
    return likeness.compare(expected, adapter.score(ids, steps, text)[0], noise)


def right_share(adapter: Any) -> float:
    """Share of right answers in the recall task, by the very call that is timed."""
    import torch

    def generate(ids: Sequence[int], count: int) -> Sequence[int]:
        made: list[int] = (
            adapter.generate(torch.tensor([list(ids)], device=adapter.model.device), count).tokens[0].tolist()
        )
        return made[len(ids) :]

    examples = (
        build_example(Random(seed), length=SCENARIO.prompt_tokens, pairs=24, answers=ANSWERS)
        for seed in range(EXAMPLES)
    )
    return recall(generate, examples)


if __name__ == "__main__":
    main()
