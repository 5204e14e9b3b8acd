"""From a plan to code that can be used, without measuring anything."""

from __future__ import annotations

from pathlib import PurePath

from kvat_core import discovery
from kvat_core.errors import UsageError
from kvat_core.outputs import SNIPPET
from kvat_core.schema import Plan


def snippet(plan: Plan) -> dict[str, str]:
    """The files that put a plan to use, by name; `snippet.py` is the one to run.

    Raises:
        NothingFeasible: the plan has no winner.
        UsageError: the plan's engine is not installed, does not know a setting of the plan, writes no code, or names a
            file that is no plain name.
    """
    plan.require_winner()
    files = dict(discovery.load_engine(plan.engine.name).snippet(plan))
    if SNIPPET not in files:
        raise UsageError(f"engine {plan.engine.name} writes no {SNIPPET}; apply its plan by its own means")
    if strange := [name for name in files if PurePath(name).name != name]:
        raise UsageError(f"engine {plan.engine.name} names a file {strange[0]!r}, which is no plain name; report that")
    return files
