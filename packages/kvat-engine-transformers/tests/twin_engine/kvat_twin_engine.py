"""Transformers with one setting that changes nothing: an A/A test of whatever decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvat_core.engine import EngineAdapter, Probe, SpaceRequest
from kvat_core.schema import (
    Ceilings,
    Footprint,
    Knob,
    KnobValue,
    ModelShape,
    Plan,
    Recipe,
    Scenario,
    Target,
)
from kvat_engine_transformers import TransformersEngine
from kvat_engine_transformers.settings import recipes
from kvat_engine_transformers.settings.knobs import PLAIN

TWINS = ("first", "second", "third", "fourth")
PER_LOAD = 2
"""Twins that share a launch, so that there are pairs in one launch and pairs in two."""
SETTINGS = {**PLAIN, "dtype": "float32"}


class TwinEngine(TransformersEngine):
    """What the twins are called is in their recipes and in what is read back, so that nobody takes them for one."""

    name = "twins"

    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        values = tuple(KnobValue(name=name, space="safe", simplicity=rank) for rank, name in enumerate(TWINS))
        return (Knob(name="twin", values=values, default=TWINS[0]),)

    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        return None

    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        twin = settings["twin"]
        made = recipes.recipe({**SETTINGS, "threads": str(target.threads)}, scenario, target)
        load = {**made.load, "extra": {**made.load["extra"], "pair": TWINS.index(twin) // PER_LOAD}}
        return made.model_copy(update={"load": load, "setup": {"twin": twin}})

    def reference(self, settings: Mapping[str, str], incumbent: Mapping[str, str], shape: ModelShape) -> None:
        return None

    def footprint(
        self, settings: Mapping[str, str], scenario: Scenario, shape: ModelShape, device: str
    ) -> Footprint | None:
        return None

    def ceilings(self, device: str, threads: int | None, dtypes: Sequence[str]) -> Ceilings | None:
        return None

    def snippet(self, plan: Plan) -> Mapping[str, str]:
        return {}

    def adapter(self, scratch: Path) -> EngineAdapter:
        super().adapter(scratch)  # points the compilers' caches to the scratch directory
        from kvat_twin_adapter import TwinAdapter

        return TwinAdapter()
