"""The Hugging Face Transformers engine of kvat.

Importing this package imports neither torch nor transformers; all names but that of the
engine are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvat_engine_transformers.engine import TransformersEngine

if TYPE_CHECKING:
    from kvat_engine_transformers.measuring.adapter import TransformersAdapter
    from kvat_engine_transformers.model.models import builtin_path, random_path
    from kvat_engine_transformers.model.random_model import build_random_model
    from kvat_engine_transformers.serving.plan_warnings import FallbackWarning, PlanWarning
    from kvat_engine_transformers.serving.runtime import PlannedModel, load_plan, patch_generate

__all__ = [
    "FallbackWarning",
    "PlanWarning",
    "PlannedModel",
    "TransformersAdapter",
    "TransformersEngine",
    "build_random_model",
    "builtin_path",
    "load_plan",
    "patch_generate",
    "random_path",
]

_ON_FIRST_USE = {
    "FallbackWarning": "kvat_engine_transformers.serving.plan_warnings",
    "PlanWarning": "kvat_engine_transformers.serving.plan_warnings",
    "PlannedModel": "kvat_engine_transformers.serving.runtime",
    "TransformersAdapter": "kvat_engine_transformers.measuring.adapter",
    "build_random_model": "kvat_engine_transformers.model.random_model",
    "builtin_path": "kvat_engine_transformers.model.models",
    "load_plan": "kvat_engine_transformers.serving.runtime",
    "patch_generate": "kvat_engine_transformers.serving.runtime",
    "random_path": "kvat_engine_transformers.model.models",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
