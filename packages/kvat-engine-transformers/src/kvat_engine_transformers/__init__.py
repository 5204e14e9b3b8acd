"""The Hugging Face Transformers engine of kvat.

Importing this package imports neither torch nor transformers; the names that need them
are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvat_engine_transformers.engine import TransformersEngine

if TYPE_CHECKING:
    from kvat_engine_transformers.adapter import TransformersAdapter
    from kvat_engine_transformers.models import builtin_path, random_path
    from kvat_engine_transformers.random_model import build_random_model

__all__ = ["TransformersAdapter", "TransformersEngine", "build_random_model", "builtin_path", "random_path"]

_HEAVY = {
    "TransformersAdapter": "kvat_engine_transformers.adapter",
    "build_random_model": "kvat_engine_transformers.random_model",
    "builtin_path": "kvat_engine_transformers.models",
    "random_path": "kvat_engine_transformers.models",
}


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        return getattr(import_module(_HEAVY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
