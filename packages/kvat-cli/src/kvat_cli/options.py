"""Values of options that are more than a word or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvat_core.errors import UsageError
from kvat_core.measure.deadlines import Deadlines


def whole_numbers(option: str, text: str | None, example: str) -> tuple[int, ...]:
    """Numbers above 0, separated by commas; none where the option was not given.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{option} takes whole numbers above 0, separated by commas, e.g. {example}; got {text!r}")
    return tuple(map(int, words))


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
