"""Messages between the measuring parent and its worker: a length, then that many bytes of JSON.

Nothing but JSON crosses the pipes, and both sides validate what arrives. To one request the worker
sends any number of beats while it is busy, and then one reply.
"""

from __future__ import annotations

import json
import struct
from typing import Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from kvat_core.schema import FailureKind, Likeness, PromptSource, Record, Rounding

MAX_BYTES = 8 * 2**20
"""A longer message is an error of its sender."""

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size

Operation = Literal[
    "start",
    "probe",
    "describe",
    "ceilings",
    "load",
    "prepare",
    "prove",
    "decode",
    "prefill",
    "score",
    "answer",
    "resources",
    "cleanup",
]


class Request(Record):
    """One operation for the worker."""

    operation: Operation
    arguments: dict[str, JsonValue] = Field(default_factory=dict)


class Reply(Record):
    """Its answer: a value, or how it failed. `usage` marks input that no other candidate would survive either."""

    value: JsonValue = None
    failure: FailureKind | None = None
    reason: str = ""
    usage: bool = False


class Started(Record):
    """Answer to `start`."""

    sees_tokens: bool = Field(description="whether beats tell how many tokens a call has delivered")


class Beat(Record):
    """The worker is alive and busy."""

    tokens: int | None = Field(description="that the running call has delivered so far; null where nobody can tell")


class PromptSpec(Record):
    """What `make_prompt` needs; the text travels only here."""

    source: PromptSource
    tokens: tuple[int, ...] = Field(description="of each prompt")
    nonce: int


class ScoreTask(Record):
    """What `score` is to predict, and what becomes of it."""

    prompt: PromptSpec
    text_steps: int = Field(description="tokens of the text that are forced after the prompt")
    greedy_steps: int = Field(description="tokens of the reference's own choice")
    against: str | None = Field(description="folder of a reference; null = there is none")
    keep: str | None = Field(description="folder in which to keep it as a reference; null = it is a candidate")


class Scored(Record):
    """Answer to `score`."""

    text: Likeness | None = Field(default=None, description="null = it was held against nothing")
    greedy: Likeness | None = None
    rounding: Rounding | None = None


_ANSWER: TypeAdapter[Reply | Beat] = TypeAdapter(Reply | Beat)


class BadMessage(Exception):
    """The other side sent something that is not a message."""


def encode(message: Record) -> bytes:
    """Bytes of one message.

    Raises:
        BadMessage: it is longer than `MAX_BYTES`.
    """
    body = message.model_dump_json().encode()
    if len(body) > MAX_BYTES:
        raise BadMessage(f"a message of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def body_bytes(head: bytes) -> int:
    """Length of the body that a head announces.

    Raises:
        BadMessage: it is longer than `MAX_BYTES`.
    """
    length: int = _LENGTH.unpack(head)[0]
    if length > MAX_BYTES:
        raise BadMessage(f"a message of {length} bytes")
    return length


def decode_answer(body: bytes) -> Reply | Beat:
    """A validated beat or reply.

    Raises:
        BadMessage: the body is neither.
    """
    try:
        answer: Reply | Beat = _ANSWER.validate_python(json.loads(body))
    except (ValueError, ValidationError, RecursionError) as error:
        raise BadMessage("an answer that is not valid") from error
    return answer
