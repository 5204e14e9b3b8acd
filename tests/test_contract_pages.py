"""The pages for those who write programs against kvat name what there is."""

import inspect
import re
from pathlib import Path

import pytest

from kvat_core.engine import Engine
from kvat_core.preview import DryRun

DOCS = Path(__file__).parents[1] / "docs"
CALLS = {name: call for name, call in vars(Engine).items() if inspect.isfunction(call) and not name.startswith("_")}


def section(page: str, heading: str) -> str:
    """What is under a heading, up to the next one."""
    return (DOCS / page).read_text().partition(f"\n{heading}")[2].partition("\n#")[0]


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_an_engine_is_on_the_page_with_its_arguments(name: str) -> None:
    page = section("writing-an-adapter.md", "## The light half")
    listed = re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", page, re.MULTILINE)
    arguments = [one for one in inspect.signature(CALLS[name]).parameters if one != "self"]
    assert (name, ", ".join(arguments)) in listed


def test_every_key_of_a_dry_run_is_on_the_page() -> None:
    first_cells = re.findall(r"^\| ([^|]*) \|", section("command-line.md", "### Before a run"), re.MULTILINE)
    assert DryRun.model_fields.keys() <= set(re.findall("`([^`]+)`", " ".join(first_cells)))
