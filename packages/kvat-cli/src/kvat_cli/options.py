"""Values of options that are more than a word or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Deadlines

_DIGITS = 16
"""Of a number that anybody may mean; Python itself refuses to read thousands of them."""


def whole_numbers(option: str, text: str | None, example: str) -> tuple[int, ...]:
    """Numbers above 0, separated by commas; none where the option was not given.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < _DIGITS and int(word) > 0 for word in words):
        raise UsageError(f"{option} takes whole numbers above 0, separated by commas, e.g. {example}; got {text!r}")
    return tuple(map(int, words))


def context_bound(option: str, text: str) -> int | Literal["auto", "off"]:
    """Up to how many tokens the longest context is measured, or who decides that.

    Raises:
        UsageError: neither a number of tokens, nor auto or off.
    """
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if not (text.isascii() and text.isdigit() and len(text) < _DIGITS and int(text) > 0):
        raise UsageError(f"{option} takes auto, off, or a number of tokens, e.g. 32768; got {text!r}")
    return int(text)


_SETTING = "KNOB=VALUE, e.g. cache=static"
_DEADLINE = "PHASE=SECONDS, above 0, e.g. load=600"


def pairs(option: str, texts: Sequence[str] | None, form: str = _SETTING) -> tuple[tuple[str, str], ...]:
    """Knobs with one value each, in the order given.

    Raises:
        UsageError: a text without a knob, an equals sign or a value; it shows the form.
    """
    return tuple(_pair(option, text, form) for text in texts or ())


def settings(option: str, texts: Sequence[str] | None, form: str = _SETTING) -> dict[str, str]:
    """Knobs with one value each.

    Raises:
        UsageError: as for `pairs`, or two different values for one knob.
    """
    chosen: dict[str, str] = {}
    for knob, value in pairs(option, texts, form):
        if chosen.setdefault(knob, value) != value:
            raise UsageError(f"{option} gives {knob!r} two values, {chosen[knob]!r} and {value!r}; give one")
    return chosen


def deadlines(option: str, texts: Sequence[str] | None) -> Deadlines:
    """The deadlines with some phases' seconds replaced.

    Raises:
        UsageError: an unknown phase, or no number of seconds above 0.
    """
    fields = {name.removesuffix("_s").replace("_", "-"): name for name in Deadlines.model_fields}
    chosen: dict[str, float] = {}
    for phase, seconds in settings(option, texts, _DEADLINE).items():
        if phase not in fields:
            raise UsageError(f"{option} has no phase {phase!r}; choose one of {', '.join(fields)}")
        chosen[fields[phase]] = _seconds(option, seconds)
    return Deadlines.model_validate(chosen)


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(option: str, text: str | None) -> float | None:
    """Seconds of a duration with its unit, e.g. 90s, 10m or 1.5h; None where the option was not given.

    Raises:
        UsageError: no number above 0 with one of these units.
    """
    if text is None:
        return None
    unit = _UNITS_S.get(text[-1:])
    try:
        seconds = math.nan if unit is None else float(text[:-1]) * unit
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{option} takes a duration with its unit, s, m or h, e.g. 10m; got {text!r}")
    return seconds


def _seconds(option: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{option} takes {_DEADLINE}; got {text!r}")
    return seconds


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    knob, _, value = text.partition("=")
    if not knob or not value:
        raise UsageError(f"{option} takes {form}; got {text!r}")
    return knob, value
