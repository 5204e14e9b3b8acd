"""One worker with one loaded model: asked one thing at a time, and what comes back made fit for a journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import ValidationError
from typing_extensions import Self

from kvat_core.errors import CannotWrite, UsageError
from kvat_core.measure.deadlines import Deadlines, Limits
from kvat_core.measure.messages import Operation, Started
from kvat_core.measure.redaction import anonymous, without_prompt
from kvat_core.measure.supervisor import Client, WorkerFailed
from kvat_core.outputs import is_path
from kvat_core.schema import Failure, PromptSource, Recipe, Record

_Answer = TypeVar("_Answer", bound=Record)

OpenWorker = Callable[[Mapping[str, str]], Client]
"""Starts a worker with these additional environment variables."""


class Session:
    """A worker from its start to its end; a context manager.

    Args:
        engine: name of the engine.
        load: recipe by whose environment and load the worker is started.
        scratch: folder of this process's part of the run.
        open_worker: how to start a worker.
        deadlines: limits per phase.
        source: of all prompts, with its text.
    """

    def __init__(
        self,
        engine: str,
        load: Recipe,
        scratch: Path,
        open_worker: OpenWorker,
        deadlines: Deadlines,
        source: PromptSource,
    ) -> None:
        self._engine = engine
        self._load = load
        self._scratch = scratch
        self._deadlines = deadlines
        self._source = source
        self._open_worker = open_worker
        self._sees_tokens = False

    def __enter__(self) -> Self:
        self._client = self._open_worker(self._load.environment).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.__exit__(kind, error, trace)

    @property
    def pid(self) -> int | None:
        """The process that measures, where it is another one than this."""
        return self._client.pid

    def start(self) -> float:
        """Import the engine; seconds that it took.

        Raises:
            WorkerFailed: it cannot be imported, or makes no adapter.
        """
        arguments = {"engine": self._engine, "scratch": str(self._folder())}
        seconds, started = self.ask("start", arguments, "start", Limits(self._deadlines.start_s))
        self._sees_tokens = validated(Started, started, "start").sees_tokens
        return seconds

    def load(self) -> float:
        """Load the model; seconds that it took.

        Raises:
            WorkerFailed: it cannot be loaded.
        """
        return self.ask("load", dict(self._load.load), "load", Limits(self._deadlines.load_s))[0]

    def prepare(self, recipe: Recipe) -> None:
        """Set up a recipe for the calls that follow.

        Raises:
            WorkerFailed: it cannot be set up.
        """
        self.ask("prepare", recipe.model_dump(mode="json"), "prepare", Limits(self._deadlines.load_s))

    def cleanup(self) -> None:
        """Let the worker release what it has.

        Raises:
            WorkerFailed: it does not end well.
        """
        self.ask("cleanup", {}, "cleanup", Limits(self._deadlines.other_s))

    def ask(self, operation: Operation, arguments: dict[str, Any], phase: str, limits: Limits) -> tuple[float, Any]:
        """Seconds that an operation took, and its value; unusable input found this late is a failure like any other.

        Raises:
            WorkerFailed: there is no value.
        """
        started = time.perf_counter()
        try:
            value = self._client.call(operation, arguments, phase, limits)
        except UsageError as error:
            failure = Failure(kind="unsupported", phase=phase, reason=str(error))
            raise WorkerFailed(failure, alive=True) from error
        return time.perf_counter() - started, value

    @property
    def compile_limits(self) -> Limits:
        """Of a call that may compile."""
        return Limits(self._deadlines.compile_s)

    @property
    def whole_limits(self) -> Limits:
        """Of a call that delivers no tokens one by one."""
        return Limits(self._deadlines.sample_s)

    @property
    def call_limits(self) -> Limits:
        """Of any other call."""
        deadlines = self._deadlines
        if not self._sees_tokens:
            return Limits(deadlines.sample_s)
        return Limits(deadlines.sample_s, deadlines.first_token_s, deadlines.gap_s)

    def scrubbed(self, failure: Failure) -> Failure:
        """Whatever an engine prints may echo a prompt; only beside our own sample texts may it be kept.

        A reason is the adapter's own words, and is kept unless it is the prompt's after all.
        """
        reason = anonymous(without_prompt(failure.reason, self._source), self.paths)
        if self._source.kind == "preset":
            tail = anonymous(failure.stderr_tail, self.paths)
        else:
            tail = failure.stderr_tail and "(withheld: the prompts are the user's own)"
        return failure.model_copy(update={"reason": reason, "stderr_tail": tail})

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the model lies, if it is a local one: with a scheme before its path, or without."""
        model_id = str(self._load.load.get("model_id"))
        return tuple(path for path in (model_id, model_id.partition(":")[2]) if path and is_path(path))

    def _folder(self) -> Path:
        """One directory per load, so that no other candidate has filled its compiler's cache."""
        return make_folder(self._scratch / self._load.load_key)


def make_folder(folder: Path) -> Path:
    """A folder below the temporary directory, with its parents.

    Raises:
        CannotWrite: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(
            f"the temporary directory cannot be written ({error.strerror}); mend that, or name another one in "
            "TMPDIR, then go on with --resume"
        ) from error
    return folder


def validated(kind: type[_Answer], value: Any, phase: str) -> _Answer:
    """The answer of an adapter as what it should be; anything else is a failure of the cell, not of kvat.

    Raises:
        WorkerFailed: it is not.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        failure = Failure(kind="invalid_output", phase=phase, reason=f"the adapter's answer is no {kind.__name__}")
        raise WorkerFailed(failure, alive=True) from error
