"""The contract between kvat and an engine adapter, and nothing else.

An adapter package registers a subclass of `Engine` under the entry-point group
`kvat.engines`:

    [project.entry-points."kvat.engines"]
    mine = "kvat_engine_mine:MineEngine"

**`Engine`** is the light half. Importing its module must import nothing heavy, because
`kvat engines` and the supervising process do it; they never run a model. Its methods
`probe` and `describe` are called in one short-lived child process per run and may
import anything; so is `ceilings`, in a child of its own, where no run before has asked
for the same. `probe` is called again in a new child after failures, to see whether the
device still works. **`EngineAdapter`** is the heavy half; it lives in a worker process.

Life of a worker: one `load_model`; then, for each candidate and scenario,
`prepare_cache(recipe)`, one `run_decode` if the recipe compiles, and `applied(prompt)`;
then, for each of them that is to be timed, `prepare_cache(recipe)` again, `run_decode`
for each warm-up and timed call, and `measure_resources`; then, where one of them has
compiled for the first time in this run, one `run_decode` of a prompt that is one token
shorter, with a `prepare_cache` and a `run_decode` of the usual length before it if the
worker has others; at the end one `cleanup`. A worker that tries how long a context may
be goes from `load_model` to one `prepare_cache` and then calls `run_prefill`, by a recipe
for that length. One that judges fidelity calls `token_ids`, `score` and `score_at_once`
after its `prepare_cache`, and one that looks for what requests leave behind calls
`answer`, several times. All calls come from one thread, one at a time, but for
`tokens_seen`. Between two candidates nothing but `prepare_cache` is called, so it must
undo everything the candidate before set.

Ownership: the adapter owns the model, its cache, and the prompts it made (core hands
them back unread). Core owns time limits and processes: an adapter never forks a
process that may outlive it, and never retries.

Exceptions: raise `EngineError` with the kind that fits and a message of your own.
Any other exception becomes a failure of kind ``error`` with its type alone, since
foreign texts may hold prompts. `UsageError` from `describe` or `probe` ends the run
as unusable input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from kvat_core.schema import (
    Applied,
    Ceilings,
    FailureKind,
    Footprint,
    Knob,
    ModelRef,
    ModelShape,
    Plan,
    PromptSource,
    Recipe,
    Record,
    Resources,
    Scenario,
    Space,
    Target,
    Timeline,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONTRACT = 1
"""Version of this contract. An engine states the one it was written for."""

Prompt = Any
"""A batch of prompts in the engine's own form; opaque to core."""


class EngineError(Exception):
    """A candidate cannot go on, and the adapter knows why.

    Args:
        kind: failure kind, as in a plan.
        reason: one line for the user; never prompt or output text.
    """

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.reason = reason


class Probe(Record):
    """What can run here, as seen from inside the engine's libraries."""

    device: str
    """The device that will be used: the one asked for, or the best one present."""
    threads: int | None = None
    """CPU threads that the engine uses if nobody says otherwise; None where that is not its business."""
    device_memory_bytes: int | None = None
    """Memory of that device, where it has one of its own."""
    device_uuid: str | None = None
    """NVIDIA's name of that device, e.g. ``GPU-…``, by which its driver is asked; None for other devices."""
    versions: dict[str, str]
    """Distribution name to version, of everything that may change the figures."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """Whatever `space` needs to know of the machine; opaque to core."""


class ConfigFile(Record):
    """What of a plan's winner fits a JSON file that the engine's library reads beside a model."""

    name: str
    """Of the file, without a directory."""
    values: dict[str, JsonValue]
    """Keys to set in it."""
    replaces: tuple[str, ...] = ()
    """Keys that decide the same things: what an older file says of them, and `values` does not, is taken out."""
    lost: tuple[str, ...] = ()
    """What the winner needs beside the file, one line each."""
    left: tuple[str, ...] = ()
    """What stays with each call, and why nothing is lost by that, one line each."""


class Answer(Record):
    """What a request was answered, as digests: the answer itself stays in its worker."""

    tokens: str
    predictions: str | None = Field(
        default=None,
        description="of the scores by which they were chosen, in which less shows than in tokens; null = unknown",
    )


class SpaceRequest(Record):
    """How wide the user wants to search."""

    space: Space
    threads: int | None = None
    """CPU threads that the user asked for; None = nobody did."""


class Engine(ABC):
    """Light half of an adapter; see the module's text for the order of calls."""

    name: ClassVar[str]
    """Name under which the user selects it; equal to the entry point's name."""
    contract: ClassVar[int] = CONTRACT
    placement: ClassVar[Literal["in_process", "children", "remote"]] = "in_process"
    """Where the model runs: in the worker, in children of the worker, or at a remote endpoint."""
    own_models: ClassVar[tuple[str, ...]] = ()
    """Model ids (or prefixes ending in a colon) that only this engine understands, e.g. ``random:``.
    The first one is its demonstration model."""
    options: ClassVar[Mapping[str, str]] = {}
    """What `--engine-option` may set: name → what it does. Core refuses other names and knows nothing of the values.
    They reach `probe` and `describe`, and `recipe` in the target; journal and plan record them, without directories."""

    @abstractmethod
    def probe(self, device: str | None, options: Mapping[str, str]) -> Probe:
        """Find out what can run here, and compute something small on the device (in a child process).

        Args:
            device: device asked for, None for the best one present.
            options: those of `options` that the user has set.

        Raises:
            UsageError: that device is unknown, not there, or does not work; or an option has a value that cannot be
                carried out here.
        """

    @abstractmethod
    def describe(self, model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
        """Read the model's shape from its metadata, without loading weights (in a child process).

        Raises:
            UsageError: no such model, not usable by this engine or with these options, or it cannot fit the device.
        """

    @abstractmethod
    def space(self, shape: ModelShape, probe: Probe, request: SpaceRequest) -> Sequence[Knob]:
        """All knobs with all values; core filters by space. A value that cannot run says why."""

    @abstractmethod
    def check(self, settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
        """Why this combination is impossible, or None. Called before anything is tried."""

    @abstractmethod
    def recipe(self, settings: Mapping[str, str], scenario: Scenario, target: Target) -> Recipe:
        """The one place where settings become actions: the adapter executes it, `snippet` prints it."""

    def reference(
        self, settings: Mapping[str, str], incumbent: Mapping[str, str], shape: ModelShape
    ) -> Mapping[str, str] | None:
        """Settings whose output these must have: the plainest way to compute the same in the same precision.

        The plainest way is its own reference. What changes no output is as in the incumbent, so that candidates of one
        precision have one reference. None = the adapter cannot `score`, so nothing is judged, and what may
        lose output is not recommended.
        """
        return None

    def in_full_precision(self, settings: Mapping[str, str], shape: ModelShape) -> Mapping[str, str]:
        """The same settings in full precision: what a reference in less is held against. They may be just these."""
        return settings

    @abstractmethod
    def snippet(self, plan: Plan) -> Mapping[str, str]:
        """File name to text; `snippet.py` runs as it is and prints the plan's metrics. The plan has a winner.

        A plan holds only the last part of a local model's path, so there `snippet.py` takes the path as its argument.
        """

    def config_file(self, plan: Plan, folder: Path) -> ConfigFile | None:
        """The winner as defaults that the engine's library takes from a model's directory; None = it reads none.

        Called in the parent, and writes nothing: core merges the values into a file that may be there.

        Args:
            plan: it has a winner.
            folder: the directory, whose other files tell what holds there anyway.

        Raises:
            UsageError: nothing of the winner fits such a file, or it has settings that this version does not know.
        """
        return None

    @abstractmethod
    def adapter(self, scratch: Path) -> EngineAdapter:
        """A new heavy half; called only in a worker.

        Args:
            scratch: directory that the workers of equal loads share, empty at the start of a run and gone after its
                end, for caches that must neither come from elsewhere nor outlive the run, such as a compiler's.
        """

    def footprint(
        self, settings: Mapping[str, str], scenario: Scenario, shape: ModelShape, device: str
    ) -> Footprint | None:
        """What these settings make of the model, in bytes; None = no prediction, as for settings that nobody verified.

        Called in the parent, from the shape alone.
        """
        return None

    def ceilings(self, device: str, threads: int | None, dtypes: Sequence[str]) -> Ceilings | None:
        """Measure what the device can do at most (in a child process); None = this engine cannot.

        It may take ten seconds on a small machine; the result is kept for later runs.

        Args:
            device: as `probe` has named it.
            threads: CPU threads that the run uses, None for the engine's own number.
            dtypes: those whose arithmetic rate is wanted.
        """
        return None

    def instrument(self) -> Sequence[str]:
        """What a timed call adds to the recipe, one line each; listed in the journal."""
        return ()


class EngineAdapter(ABC):
    """Heavy half of an adapter: one loaded model in one process."""

    @abstractmethod
    def load_model(
        self,
        model_id: str,
        dtype: str | None,
        device: str,
        attn_backend: str | None,
        extra: Mapping[str, JsonValue],
    ) -> None:
        """Load the model; called once, with the recipe's `load`.

        Raises:
            EngineError: out of memory, unsupported setting, unreadable weights.
        """

    @abstractmethod
    def make_prompt(self, source: PromptSource, tokens: Sequence[int], nonce: int) -> Prompt:
        """Build a batch of prompts of exactly these lengths, outside any timed window.

        Padding, where an engine needs any, is its own business and counts in no timeline.

        Args:
            source: where the text comes from; ``text`` and ``preset`` carry it in `value`.
            tokens: of each prompt; they differ only in scenarios that say so.
            nonce: prompts with different nonces differ from their first tokens on, so that no prefix
                cache can hit by accident; equal arguments give equal prompts.
        """

    @abstractmethod
    def prepare_cache(self, strategy: Recipe) -> None:
        """Return to the state after load, forget peaks, then set up this recipe for the calls that follow."""

    @abstractmethod
    def run_decode(self, prompt: Prompt, max_new_tokens: int) -> Timeline:
        """The timed call: exactly `max_new_tokens` tokens per prompt, by the prepared recipe.

        Returns a timeline whose counts are what really happened; core rejects wrong ones. Requests that moved in step
        and have equal counts are told once, with their number as `count`.
        """

    def tokens_seen(self) -> int | None:
        """Tokens per prompt that the running `run_decode` or `run_prefill` has delivered; 0 from its start on.

        Called from another thread, once a second, while the call runs: it has to return at once and take no lock.
        None where single tokens cannot be seen; such an engine can be ended only by the deadline of a whole call.
        """
        return None

    @abstractmethod
    def run_prefill(self, prompt: Prompt, max_new_tokens: int = 0) -> Timeline:
        """Prefill with the recipe's cache size and `max_new_tokens` after it, or as few as the engine can do.

        Never timed: it shows whether so long a prompt runs at all.
        """

    @abstractmethod
    def applied(self, prompt: Prompt) -> Applied:
        """One untimed call with full read-back of what ran: cache, dtype, device, kernel, compilation."""

    def token_ids(self, prompt: Prompt) -> NDArray[np.int64]:
        """Ids of a batch of prompts of equal length, requests × tokens; they stay in the worker.

        Raises:
            EngineError: this engine cannot force tokens.
        """
        raise EngineError("unsupported", "this engine cannot force tokens")

    def score(
        self, ids: NDArray[np.int64], steps: int, forced: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probabilities of the next token in each of some steps after a prompt, by the prepared recipe.

        A prefill of the prompt, then one token per step through the same cache, kernel and compiled code as a timed
        call: whatever is lossy about a cache shows only in what is read back from it.

        Args:
            ids: of the prompts, requests × tokens.
            steps: tokens after each prompt.
            forced: those tokens, requests × steps; None = what the candidate chooses itself.

        Returns:
            Log-probabilities, requests × steps × vocabulary, and the tokens, requests × steps.
        """
        raise EngineError("unsupported", "this engine cannot force tokens")

    def score_at_once(self, ids: NDArray[np.int64], forced: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """The same as `score` of forced tokens, in one pass without a cache; None = this engine cannot.

        What it differs by is the rounding of the model, against which candidates are held.
        """
        return None

    def answer(self, prompt: Prompt, max_new_tokens: int, longest_tokens: int) -> Answer:
        """What one request is answered, by the very code that `snippet` hands over.

        Args:
            prompt: a batch of prompts.
            max_new_tokens: to generate, greedily.
            longest_tokens: prompt and output of the longest request that this process is asked for; what is sized in
                advance has that size for all.

        Raises:
            EngineError: this engine has no such code.
        """
        raise EngineError("unsupported", "this engine hands over no code that could be asked")

    @abstractmethod
    def measure_resources(self) -> Resources:
        """Peak memory since the last `prepare_cache`, and which processes were counted."""

    @abstractmethod
    def cleanup(self) -> None:
        """Release everything. Not called after a crash or a time-out."""
