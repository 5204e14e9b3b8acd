"""The light half: answers without importing torch, except where a child process asks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvat_core.engine import ConfigFile, Engine, Probe, SpaceRequest
from kvat_core.schema import Ceilings, Footprint, Knob, ModelRef, ModelShape, Plan, Recipe, Scenario, Target
from kvat_engine_transformers.outputs import generation_config, snippet
from kvat_engine_transformers.settings import footprint, knobs, placement, recipes

if TYPE_CHECKING:
    from kvat_core.engine import EngineAdapter


class TransformersEngine(Engine):
    """Measures `model.generate` of Hugging Face Transformers."""

    name = "transformers"
    own_models = ("builtin:llama", "builtin:mistral", "random:")
    options = placement.OPTIONS

    def probe(self, device: str | None, options: Mapping[str, str]) -> Probe:
        from kvat_engine_transformers.settings.devices import probe_device

        return probe_device(device, options)

    def describe(self, model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
        from kvat_engine_transformers.model.description import describe_model

        return describe_model(model, device, options)

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        return knobs.space(shape, probe, request.threads)

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        return knobs.check(settings, shape, probe)

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        return recipes.recipe(settings, scenario, target)

    def reference(
        self, settings: Mapping[str, str], incumbent: Mapping[str, str], shape: ModelShape
    ) -> Mapping[str, str]:
        return knobs.reference(settings, incumbent, shape)

    def in_full_precision(self, settings: Mapping[str, str], shape: ModelShape) -> Mapping[str, str]:
        return knobs.in_full_precision(settings, shape)

    def footprint(
        self, settings: Mapping[str, str], scenario: Scenario, shape: ModelShape, device: str
    ) -> Footprint | None:
        return footprint.footprint(settings, scenario, shape, device)

    def ceilings(self, device: str, threads: int | None, dtypes: Sequence[str]) -> Ceilings | None:
        from kvat_engine_transformers.measuring.ceilings import measure_ceilings

        return measure_ceilings(device, threads, dtypes)

    def snippet(self, plan: Plan) -> Mapping[str, str]:
        return {"snippet.py": snippet.render(plan)}

    def config_file(self, plan: Plan, folder: Path) -> ConfigFile:
        return generation_config.config_file(plan, folder)

    def adapter(self, scratch: Path) -> EngineAdapter:
        # Else a compiler would find what earlier runs have left, and report a time that no first user sees.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
        from kvat_engine_transformers.measuring.adapter import TransformersAdapter

        return TransformersAdapter()

    def instrument(self) -> Sequence[str]:
        return (
            "eos_token_id=None: nothing ends a sequence early, so max_new_tokens is the exact count; "
            "this adds no work per token and leaves out the end-of-sequence test (one comparison per token)",
            "streamer (on the CPU): a clock that notes when each token reaches the host",
            "stopping_criteria (on cuda and mps): a criterion that stops nothing; it puts an event into the device's "
            "queue after each token, and nobody waits for it; this adds one operation on a tensor of the batch's size",
            "return_dict_in_generate=True (not on mps): hands back the cache, whose layers, slots and bytes are read "
            "after the clock has stopped",
            "TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR: an empty directory of this run, so that the first compilation "
            "is one with nothing cached",
        )
