"""The child process: one engine, one model, one request after the other.

Requests arrive on stdin and replies leave on stdout; before the engine is imported both are
moved away, so that whatever the engine prints lands on stderr and whatever it reads is empty.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from pathlib import PurePath
from typing import IO, Any

from pydantic import BaseModel, JsonValue

from kvat_core import discovery
from kvat_core.engine import Engine, EngineAdapter, EngineError, Prompt
from kvat_core.errors import KvatError
from kvat_core.measure import messages
from kvat_core.measure.messages import PromptSpec, Reply, Request
from kvat_core.schema import ModelRef, Recipe


class Worker:
    """Carries out requests; every failure becomes a reply."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._adapter: EngineAdapter | None = None

    def handle(self, request: Request) -> Reply:
        """Answer one request."""
        try:
            return Reply(value=_to_json(self._do(request.operation, request.arguments)))
        except EngineError as error:
            return Reply(failure=error.kind, reason=error.reason)
        except KvatError as error:
            return Reply(failure="unsupported", reason=str(error), usage=True)
        except MemoryError:
            return Reply(failure="oom_host", reason="the host ran out of memory")
        except Exception as error:
            return Reply(failure="error", reason=_reason(request.operation, error))

    def _do(self, operation: messages.Operation, arguments: dict[str, Any]) -> Any:
        match operation:
            case "start":
                self._engine = discovery.load_engine(arguments["engine"])
                if arguments["adapter"]:
                    self._adapter = self._engine.adapter()
            case "probe":
                return self.engine.probe(arguments["device"])
            case "describe":
                return self.engine.describe(ModelRef.model_validate(arguments["model"]), arguments["device"])
            case "load":
                self.adapter.load_model(**arguments)
            case "prepare":
                self.adapter.prepare_cache(Recipe.model_validate(arguments))
            case "prove":
                return self.adapter.applied(self._prompt(arguments))
            case "decode":
                return self.adapter.run_decode(self._prompt(arguments["prompt"]), arguments["max_new_tokens"])
            case "resources":
                return self.adapter.measure_resources()
            case "cleanup":
                self.adapter.cleanup()
        return None

    @property
    def engine(self) -> Engine:
        """The engine of this worker; only after "start"."""
        assert self._engine is not None
        return self._engine

    @property
    def adapter(self) -> EngineAdapter:
        """Its heavy half; only after "start" with an adapter."""
        assert self._adapter is not None
        return self._adapter

    def _prompt(self, arguments: dict[str, Any]) -> Prompt:
        spec = PromptSpec.model_validate(arguments)
        return self.adapter.make_prompt(spec.source, spec.tokens, spec.batch, spec.nonce)


def _reason(operation: messages.Operation, error: Exception) -> str:
    """What is told of a foreign exception: its text only while there is no prompt that it could hold."""
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    if operation in ("probe", "describe"):
        return " ".join(f"{name}: {error}".split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name} at {PurePath(frame.filename).name}:{frame.lineno}"


def _to_json(value: Any) -> JsonValue:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else None


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer requests until the source ends."""
    worker = Worker()
    while head := source.read(messages.LENGTH_BYTES):
        request = Request.model_validate_json(source.read(messages.body_bytes(head)))
        sink.write(_encoded(worker.handle(request)))
        sink.flush()


def _encoded(reply: Reply) -> bytes:
    try:
        return messages.encode(reply)
    except messages.BadMessage as error:
        return messages.encode(
            Reply(failure="invalid_output", reason=f"the engine's answer is {error}, which is too long")
        )


def _die_with_the_parent() -> None:
    """On Linux; elsewhere a worker whose parent was killed ends when it next waits for a request."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Entry point of the child process."""
    _die_with_the_parent()
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - lives as long as the process
    serve(source, sink)
    # The teardown of a large library takes a second that nobody needs: nothing is left to be saved.
    os._exit(0)
