"""Plans to render: one decided plan on disk, and variations of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvat_core.schema import Plan

MakePlan = Callable[..., Plan]


@pytest.fixture
def make_plan() -> MakePlan:
    """The plan on disk, with top-level keys replaced."""

    def make(**changes: Any) -> Plan:
        data = json.loads((Path(__file__).parent / "data" / "plan.json").read_text(encoding="utf-8"))
        return Plan.model_validate(data | changes)

    return make
