"""The light half: what can be set, and how a choice of settings becomes a recipe."""

from __future__ import annotations

import pprint
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from kvat_core.engine import Engine, EngineAdapter, Probe, SpaceRequest
from kvat_core.errors import UsageError
from kvat_core.schema import Knob, KnobValue, ModelRef, ModelShape, Plan, Recipe, Scenario, Target

MODEL = "minimal:nearest"


class MinimalEngine(Engine):
    """Generates text letter by letter: each time the one that followed the most similar passage so far."""

    name = "minimal"
    own_models = (MODEL,)

    def probe(self, device: str | None, options: Mapping[str, str]) -> Probe:
        """Only the CPU will do; it declares no options, so there are none."""
        if device not in (None, "cpu"):
            raise UsageError(f"engine minimal has no device {device!r}; use --device cpu")
        return Probe(device="cpu", versions={"kvat-engine-minimal": version("kvat-engine-minimal")})

    def describe(self, model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
        """The one model there is; what does not apply to it stays null, so nothing is predicted from it."""
        if model.id != MODEL:
            raise UsageError(f"engine minimal has no model {model.id!r}; use --model {MODEL}")
        return ModelShape(architecture="nearest", layers=1, attention=("other",), weights="random")

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        """One knob. Neither value changes the output, so neither is lossy."""
        off = KnobValue(name="off", space="safe")
        keys = KnobValue(name="keys", space="safe", simplicity=1)
        return (Knob(name="cache", values=(off, keys), default="off"),)

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        """With a single knob there is no impossible combination."""
        return None

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        """All that the adapter is told, and all that the snippet prints."""
        return Recipe(
            load={"model_id": target.model.id, "dtype": None, "device": "cpu", "attn_backend": None, "extra": {}},
            call="generate",
            arguments={"cache": settings["cache"]},
        )

    def snippet(self, plan: Plan) -> Mapping[str, str]:
        """A script that generates with the winner's cache and prints the plan's metrics."""
        target = Target(model=ModelRef(id=plan.model.id), device=plan.machine.device)
        runs = [
            (
                (scenario.prompt_lengths, scenario.output_tokens),
                self.recipe(plan.require_winner().settings, scenario, target).arguments,
            )
            for scenario in plan.profile.scenarios
        ]
        return {"snippet.py": _SNIPPET.format(runs=pprint.pformat(runs))}

    def adapter(self, scratch: Path) -> EngineAdapter:
        """Imported here and not above: a real adapter brings its heavy libraries along."""
        from kvat_engine_minimal.adapter import MinimalAdapter

        return MinimalAdapter()


_SNIPPET = '''\
"""The winner of this plan, in plain code."""

from kvat_engine_minimal.adapter import generate

RUNS = {runs}

for (prompt_lengths, output_tokens), arguments in RUNS:
    prompt_tokens, batch_size = max(prompt_lengths), len(prompt_lengths)
    prompts = [("any text will do, " * length)[:length] for length in prompt_lengths]
    times_s = generate(prompts, output_tokens, **arguments).times_s
    decode_tps = batch_size * (output_tokens - 1) / (times_s[-1] - times_s[0])
    print(
        f"prompt_tokens={{prompt_tokens}} output_tokens={{output_tokens}} batch_size={{batch_size}} "
        f"ttft_s={{times_s[0]:.6f}} decode_tps={{decode_tps:.3f}}"
    )
'''
