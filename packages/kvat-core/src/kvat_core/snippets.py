"""From a plan to code that can be used, without measuring anything."""

from __future__ import annotations

from kvat_core import discovery
from kvat_core.schema import Plan


def snippet(plan: Plan) -> dict[str, str]:
    """The files that put a plan to use, by name; `snippet.py` is the one to run.

    Raises:
        UsageError: the plan's engine is not installed.
    """
    return dict(discovery.load_engine(plan.engine.name).snippet(plan))
