"""What a plan at work has to tell: one line each, attributed to the caller's own code."""

from __future__ import annotations

import inspect
import warnings

_INSIDE = (__package__, "contextlib")


class PlanWarning(UserWarning):
    """The plan was made for something else than what is here, or is not used for a call."""


class FallbackWarning(PlanWarning):
    """A call does not run by the candidate that the plan prefers for it."""


def tell(category: type[PlanWarning], text: str) -> None:
    """Warn at the innermost line that is not of this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(" ".join(text.split()), category, stacklevel=level)
