"""What every noun of the published formats has in common."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT: Literal[1] = 1
"""Version of the published formats (plan, profile, journal) that this kvat writes."""


class Record(BaseModel):
    """An immutable, validated value; unknown keys are an error, so a typo is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)


def digest(value: Any, length: int = 10) -> str:
    """Short stable name of a JSON value: the first hex digits of its canonical SHA-256."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]
