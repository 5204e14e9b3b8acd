"""kvat: measure which KV-cache settings make a model fastest here, prove it, and hand over a plan.

The heavy names are imported when they are first used, so that reading a plan costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvat_core.errors import KvatError
from kvat_core.profiles import load_profile, presets
from kvat_core.schema import (
    Limit,
    Limits,
    Objective,
    Plan,
    Profile,
    PromptSource,
    Scenario,
    Situation,
    read_plan,
)

if TYPE_CHECKING:
    from kvat_core.config_files import ConfigChange, config_change
    from kvat_core.preview import DryRun, dry_run
    from kvat_core.replan import decide_again
    from kvat_core.snippets import snippet
    from kvat_core.tuner import Progress, TuneRequest, TuneResult, tune

__all__ = [
    "ConfigChange",
    "DryRun",
    "KvatError",
    "Limit",
    "Limits",
    "Objective",
    "Plan",
    "Profile",
    "Progress",
    "PromptSource",
    "Scenario",
    "Situation",
    "TuneRequest",
    "TuneResult",
    "config_change",
    "decide_again",
    "dry_run",
    "load_profile",
    "presets",
    "read_plan",
    "snippet",
    "tune",
]

_LAZY = {
    "ConfigChange": "kvat_core.config_files",
    "DryRun": "kvat_core.preview",
    "Progress": "kvat_core.tuner",
    "TuneRequest": "kvat_core.tuner",
    "TuneResult": "kvat_core.tuner",
    "config_change": "kvat_core.config_files",
    "decide_again": "kvat_core.replan",
    "dry_run": "kvat_core.preview",
    "snippet": "kvat_core.snippets",
    "tune": "kvat_core.tuner",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvat_core' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
