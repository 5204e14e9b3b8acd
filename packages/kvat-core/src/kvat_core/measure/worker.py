"""The child process: one engine, one model, one request after the other.

Requests and answers have pipes of their own, which no program that the worker starts inherits; whatever
the engine prints goes elsewhere, and whatever it reads is empty. While a request is carried out, a thread
sends a heartbeat once a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from pathlib import Path, PurePath
from typing import IO, Any

from pydantic import BaseModel, JsonValue

from kvat_core import discovery
from kvat_core.engine import Engine, EngineAdapter, EngineError, Prompt
from kvat_core.errors import KvatError
from kvat_core.measure import messages
from kvat_core.measure.messages import Beat, PromptSpec, Reply, Request, ScoreTask, Started
from kvat_core.schema import ModelRef, Recipe

BEAT_S = 1.0
OOM_SCORE = 1000
"""Of all processes the kernel's out-of-memory killer takes a worker first, and never its parent."""


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
                if arguments["scratch"] is not None:
                    self._adapter = self._engine.adapter(Path(arguments["scratch"]))
                return Started(sees_tokens=self.beat().tokens is not None)
            case "probe":
                return self.engine.probe(arguments["device"], arguments["options"])
            case "describe":
                model = ModelRef.model_validate(arguments["model"])
                return self.engine.describe(model, arguments["device"], arguments["options"])
            case "ceilings":
                return self.engine.ceilings(**arguments)
            case "load":
                self.adapter.load_model(**arguments)
            case "prepare":
                self.adapter.prepare_cache(Recipe.model_validate(arguments))
            case "prove":
                return self.adapter.applied(self._prompt(arguments))
            case "decode":
                return self.adapter.run_decode(self._prompt(arguments["prompt"]), arguments["max_new_tokens"])
            case "prefill":
                return self.adapter.run_prefill(self._prompt(arguments["prompt"]), arguments["max_new_tokens"])
            case "score":
                from kvat_core.measure import scorer  # numpy, which most workers do without

                return scorer.score(ScoreTask.model_validate(arguments), self.adapter)
            case "answer":
                lengths = {name: arguments[name] for name in ("max_new_tokens", "longest_tokens")}
                return self.adapter.answer(self._prompt(arguments["prompt"]), **lengths)
            case "resources":
                return self.adapter.measure_resources()
            case "cleanup":
                self.adapter.cleanup()
        return None

    def beat(self) -> Beat:
        """The heartbeat of the running call; an adapter that fails to count its tokens is one that cannot."""
        try:
            return Beat(tokens=None if self._adapter is None else self._adapter.tokens_seen())
        except Exception:
            return Beat(tokens=None)

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
        return self.adapter.make_prompt(spec.source, spec.tokens, spec.nonce)


def _reason(operation: messages.Operation, error: Exception) -> str:
    """What is told of a foreign exception: its text only while there is no prompt that it could hold."""
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    if operation in ("probe", "describe", "ceilings"):
        return " ".join(f"{name}: {error}".split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name} at {PurePath(frame.filename).name}:{frame.lineno}"


def _to_json(value: Any) -> JsonValue:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else None


class _Line:
    """Where answers go: a reply from the main thread, beats from another one."""

    def __init__(self, sink: IO[bytes], worker: Worker) -> None:
        self._sink = sink
        self._worker = worker
        self._lock = threading.Lock()
        self._busy = threading.Event()

    def beat_forever(self) -> None:
        """Send beats while the worker is busy; the end of the process ends this."""
        pause = threading.Event()
        while True:
            self._busy.wait()
            pause.wait(BEAT_S)
            with self._lock:
                # Asked under the lock: after its reply a request has no more beats.
                if self._busy.is_set():
                    self._send(messages.encode(self._worker.beat()))

    def answer(self, request: Request) -> None:
        """Carry out a request and send its reply."""
        self._busy.set()
        reply = _encoded(self._worker.handle(request))
        with self._lock:
            self._busy.clear()
            self._send(reply)

    def _send(self, data: bytes) -> None:
        self._sink.write(data)
        self._sink.flush()


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer requests until the source ends."""
    line = _Line(sink, Worker())
    threading.Thread(target=line.beat_forever, daemon=True).start()
    while head := source.read(messages.LENGTH_BYTES):
        line.answer(Request.model_validate_json(source.read(messages.body_bytes(head))))


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


def _die_first() -> None:
    """Offer this process to the out-of-memory killer, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def main(requests: int, replies: int) -> None:
    """Entry point of the child process.

    Args:
        requests: descriptor to read requests from.
        replies: descriptor to write answers to.
    """
    _die_with_the_parent()
    _die_first()
    for descriptor in (requests, replies):
        os.set_inheritable(descriptor, False)
    # Ctrl-C of a terminal does not reach this session; what a parent ignores, such as a lost terminal, is inherited.
    serve(os.fdopen(requests, "rb"), os.fdopen(replies, "wb"))
    # The teardown of a large library takes a second that nobody needs: nothing is left to be saved.
    os._exit(0)
