"""The page on settings names what the engine has."""

import re
from pathlib import Path

from kvat_core.engine import Probe, SpaceRequest
from kvat_core.schema import ModelShape
from kvat_engine_transformers import TransformersEngine

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def rows() -> dict[str, set[str]]:
    """Values by knob, from the first two columns of the first table; an empty first cell continues the knob above."""
    found: dict[str, set[str]] = {}
    knob = ""
    table = PAGE.read_text().partition("\n## ")[0]
    for first, second in re.findall(r"^\| ([^|]*)\| ([^|]*)\|", table, re.MULTILINE):
        knob = first.strip().strip("`") or knob
        found.setdefault(knob, set()).update(re.findall(r"`([^`]+)`", second))
    return {knob: values for knob, values in found.items() if values}


def test_every_knob_and_value_is_on_the_page_and_no_other() -> None:
    shape = ModelShape(architecture="llama", layers=1, attention=("full",), dtype="bfloat16")
    knobs = TransformersEngine().space(shape, Probe(device="cpu", versions={}), SpaceRequest(space="full"))
    listed = {knob.name: {value.name for value in knob.values} for knob in knobs if knob.name != "threads"}
    assert rows() == listed


def test_the_number_of_threads_is_on_the_page() -> None:
    assert re.search(r"^\| `threads` \| a number \|", PAGE.read_text(), re.MULTILINE)


def test_every_engine_option_is_on_the_page_and_no_other() -> None:
    listed = re.findall(r"^- `(\w+)`: ", PAGE.read_text().partition("## Engine options")[2], re.MULTILINE)
    assert listed == list(TransformersEngine.options)
