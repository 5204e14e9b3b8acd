"""The heavy half of the engine of twins."""

from __future__ import annotations

import torch

from kvat_core.schema import Applied, Recipe
from kvat_engine_transformers import TransformersAdapter


class TwinAdapter(TransformersAdapter):
    """Reads back which twin it was asked for; else all are the same."""

    def prepare_cache(self, strategy: Recipe) -> None:
        self._twin = strategy.setup["twin"]
        super().prepare_cache(strategy)

    def applied(self, prompt: torch.Tensor) -> Applied:
        found = super().applied(prompt)
        return found.model_copy(update={"values": {**found.values, "twin": self._twin}})
