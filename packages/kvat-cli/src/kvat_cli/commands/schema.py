"""`kvat schema`: the published file formats as JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer


def schema(
    kind: Annotated[Literal["plan", "profile", "journal"], typer.Argument(help="Which file's format.")],
) -> None:
    """Print the JSON Schema of a file format.

    For a journal it is the schema of one line.
    """
    makers = {"plan": _plan, "profile": _profile, "journal": _journal_record}
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **makers[kind]()}
    print(json.dumps(found, indent=2))


def _plan() -> dict[str, Any]:
    from kvat_core.schema import Plan

    return Plan.model_json_schema()


def _profile() -> dict[str, Any]:
    from kvat_core.schema import Profile

    return Profile.model_json_schema()


def _journal_record() -> dict[str, Any]:
    from pydantic.json_schema import models_json_schema

    from kvat_core.schema import EVENT_TYPES

    references, shared = models_json_schema([(record, "validation") for record in EVENT_TYPES.values()])
    payloads = {name: references[record, "validation"] for name, record in EVENT_TYPES.items()}
    return {
        "title": "kvat journal record",
        "description": "One line of a journal. crc32 covers the canonical JSON of the other three keys.",
        "oneOf": [_envelope(name, payload) for name, payload in payloads.items()],
        **shared,
    }


def _envelope(name: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "seq": {"type": "integer", "minimum": 0},
            "crc32": {"type": "integer", "minimum": 0, "maximum": 0xFFFFFFFF},
            "type": {"const": name},
            "payload": payload,
        },
        "required": ["seq", "crc32", "type", "payload"],
        "additionalProperties": False,
    }
