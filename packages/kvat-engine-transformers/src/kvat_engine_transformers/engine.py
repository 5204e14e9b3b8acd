"""The light half: answers without importing torch, except where a child process asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvat_core.engine import Engine, Probe, SpaceRequest
from kvat_core.schema import Knob, ModelRef, ModelShape, Plan, Recipe, Scenario, Target
from kvat_engine_transformers import knobs, recipes, snippet

if TYPE_CHECKING:
    from kvat_core.engine import EngineAdapter


class TransformersEngine(Engine):
    """Measures `model.generate` of Hugging Face Transformers."""

    name = "transformers"
    own_models = ("builtin:llama", "builtin:mistral", "random:")

    def probe(self, device: str | None) -> Probe:
        from kvat_engine_transformers.devices import probe_device

        return probe_device(device)

    def describe(self, model: ModelRef, device: str) -> ModelShape:
        from kvat_engine_transformers.description import describe_model

        return describe_model(model, device)

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        return knobs.space(shape, probe)

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        return knobs.check(settings, shape, probe)

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        return recipes.recipe(settings, scenario, target)

    def snippet(self, plan: Plan) -> Mapping[str, str]:
        return {"snippet.py": snippet.render(plan)}

    def adapter(self) -> EngineAdapter:
        from kvat_engine_transformers.adapter import TransformersAdapter

        return TransformersAdapter()

    def instrument(self) -> Sequence[str]:
        return (
            "eos_token_id=None: nothing ends a sequence early, so max_new_tokens is the exact count; "
            "this adds no work per token and leaves out the end-of-sequence test (one comparison per token)",
            "streamer: a clock that notes when each token reaches the host; each token is copied to the host once more",
            "return_dict_in_generate=True (not on mps): hands back the cache, whose layers, slots and bytes are read "
            "after the clock has stopped",
            "on mps Transformers hands over each token one step late, after queueing the next step; the times are "
            "those at which a streaming client gets the token",
        )
