"""The records of a journal: everything that happened in a run, in order."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvat_core.schema._base import FORMAT, Record
from kvat_core.schema.fidelity import CanaryVerdict, Fidelity
from kvat_core.schema.machine import Machine
from kvat_core.schema.measurement import Applied, Failure, Resources, Sample
from kvat_core.schema.model import ModelRef, ModelShape
from kvat_core.schema.roofline import Ceilings, Footprint
from kvat_core.schema.space import Candidate, Space
from kvat_core.schema.workload import Profile


class Target(Record):
    """What is tuned, and on what: with candidate and scenario, all that a recipe may depend on."""

    model: ModelRef
    device: str
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null = the engine's default")
    options: dict[str, str] = Field(default_factory=dict, description="--engine-option: for the engine alone")


class ContextBound(Record):
    """Up to where the longest context is searched for."""

    up_to_tokens: int | None = Field(description="prompt and output together; null = the model does not tell")
    by: Literal["model", "user"] = Field(description="whose bound it is")


class Header(Record):
    """First record: the request and where it is carried out. Holds no prompt text."""

    format: Literal[1] = FORMAT
    kvat: str
    created: str
    engine: str
    versions: dict[str, str]
    target: Target
    shape: ModelShape
    machine: Machine
    profile: Profile
    space: Space
    pinned: dict[str, str] = Field(description="--set")
    excluded: tuple[tuple[str, str], ...] = Field(description="--exclude")
    seed: int
    search: str = Field(default="grid", description="--search: who decides what is measured next")
    request: str = Field(
        default="", description="digest of all that decides what is measured; only an equal request may be resumed"
    )
    prompt_digest: str | None = Field(
        default=None, description="HMAC-SHA256 of the user's own prompt text, with a key that stays on their machine"
    )
    probe_s: float = Field(description="spent in the child that probed machine and model, most of it importing")
    instrument: tuple[str, ...] = Field(description="what a timed call adds to the recipe")
    ceilings: Ceilings | None = Field(
        default=None, description="what this machine can do at most; null where nobody has measured it"
    )
    longest_context: ContextBound | None = Field(
        default=None, description="--max-context: whether the longest context is measured, and up to where; null = not"
    )
    notes: tuple[str, ...] = ()


class CandidateEntry(Record):
    """A candidate of this run; with an exclusion it is never tried."""

    candidate: Candidate
    incumbent: bool = False
    exclusion: str | None = None
    reference: dict[str, str] | None = Field(
        default=None, description="settings whose output it must have; null = the engine cannot judge that"
    )
    recipes: str | None = Field(
        default=None, description="digest of what is done for it in all scenarios; null if nothing can be"
    )
    footprints: dict[str, Footprint] = Field(
        default_factory=dict, description="by scenario; without those of which the engine says nothing"
    )
    predicted_peak_bytes: int | None = Field(
        default=None,
        description="weights, KV cache and activations at the peak of its largest scenario, libraries apart; null = no "
        "prediction",
    )
    predicted_context_tokens: int | None = Field(
        default=None,
        description="longest context, prompt and output together, that the memory is predicted to hold; null = no "
        "prediction",
    )

    @property
    def is_reference(self) -> bool:
        """Whether it is what others are held against, so that there is nothing to judge."""
        return self.reference == self.candidate.settings


class Cell(Record):
    """One candidate in one scenario."""

    candidate: str
    scenario: str


Purpose = Literal["pilot", "screening", "timing", "run_off", "memory", "context", "fidelity", "canary"]


class LaunchOrder(Record):
    """One load of the model in a fresh process, and the cells to measure in it.

    What a launch is for: `pilot`: the incumbent alone, for noise and drift; `screening`: every candidate once;
    `timing`: those that can still win, in interleaved blocks; `run_off`: the last ones, in blocks that had no part in
    choosing them; `memory`: one cell, for its peak; `context`: one candidate in a scenario of its own, to see whether
    it runs; `fidelity`: one candidate, beside its reference; `canary`: one candidate, to see whether a request leaves
    anything behind for the next. The last two load the model several times, one after the other.
    """

    launch: int
    round: int = Field(description="block: candidates are compared by what they did in the same one")
    purpose: Purpose
    cells: tuple[Cell, ...] = Field(min_length=1)
    samples: int | None = Field(default=None, ge=1, description="calls per cell; null = as the profile says")


class Loaded(Record):
    """A worker is ready."""

    launch: int
    start_s: float = Field(description="spawn until the engine's libraries are imported")
    load_s: float = Field(description="load_model")


class Proof(Record):
    """Read-back of the untimed proof call of a cell."""

    launch: int
    cell: Cell
    applied: Applied


class FirstCall(Record):
    """The first call of a cell that compiles code, before its proof and its warm-up."""

    launch: int
    cell: Cell
    duration_s: float
    compilations: int = Field(ge=0)
    cold: bool = Field(description="whether the compiler found nothing cached: the first such call of the run")


class AnotherLength(Record):
    """The first call of another prompt length, in the first process of a cell that compiles code.

    It comes after all else in that process, because a second length may change for good what was compiled for the
    first.
    """

    launch: int
    cell: Cell
    prompt_tokens: int = Field(description="of the call, as in a scenario; slots and output tokens are the cell's")
    duration_s: float | None = Field(description="null = the call failed")
    compilations: int | None = Field(ge=0, description="graphs compiled during the call; null = the call failed")
    failure: Failure | None = Field(default=None, description="why; it costs the candidate none of its figures")


class Failed(Record):
    """A cell ended without its samples, or without its peak memory."""

    launch: int
    cell: Cell
    failure: Failure

    @property
    def phase_is_of_a_cell(self) -> bool:
        """Whether the cell was at work: a failure to start or load is told to each cell of the launch."""
        return self.failure.phase not in ("start", "load")


class Measured(Record):
    """Peak memory: of one cell in a process of its own, or of all cells of a shared launch together."""

    launch: int
    cells: tuple[Cell, ...]
    resources: Resources


class ContextTrial(Record):
    """Whether a candidate ran at a length, all calls in one process. What fails costs the candidate nothing else."""

    launch: int
    candidate: str
    tokens: int = Field(description="prompt and output together")
    calls: int = Field(ge=1, description="in a row; of a trial that failed, those that were wanted")
    failure: Failure | None = Field(description="null = it ran")


class Judged(Record):
    """How near a candidate's predictions are to those of its reference."""

    launch: int
    candidate: str
    fidelity: Fidelity | None = Field(description="null = it could not be told")
    failure: Failure | None = Field(default=None, description="why not; it costs the candidate none of its figures")


class Canary(Record):
    """Whether a request is answered as in a fresh process after longer and shorter ones, by the code of the snippet."""

    launch: int
    candidate: str
    verdict: CanaryVerdict
    reason: str = Field(default="", description="what made it so; empty where all answers were alike")
    failure: Failure | None = Field(default=None, description="of the worker, which left it undetermined")


class LaunchEnd(Record):
    """A launch is over, in whatever way."""

    launch: int
    wall_s: float
    generate_s: float = Field(description="spent inside calls that generate, timed or not")
    failure: Failure | None = Field(
        default=None, description="of the worker after its work: to clean up, or to end; no cell is to blame for it"
    )


class Health(Record):
    """After failures in a row: can a fresh process still work on the device?"""

    ok: bool
    reason: str = ""


class Stopped(Record):
    """The run was ended before it had measured all it meant to. One that was killed has no such record."""

    kind: Literal["interrupted", "paused", "budget"]
    reason: str


class Resumed(Record):
    """A run that had been stopped, or killed, goes on from here."""

    created: str = Field(description="UTC, ISO 8601")


class End(Record):
    """Last record of a finished run."""

    wall_s: float


Event = (
    Header
    | CandidateEntry
    | LaunchOrder
    | Loaded
    | FirstCall
    | AnotherLength
    | Proof
    | Sample
    | Failed
    | Measured
    | ContextTrial
    | Judged
    | Canary
    | LaunchEnd
    | Health
    | Stopped
    | Resumed
    | End
)

EVENT_TYPES: dict[str, type[Record]] = {
    "header": Header,
    "candidate": CandidateEntry,
    "launch": LaunchOrder,
    "loaded": Loaded,
    "first_call": FirstCall,
    "another_length": AnotherLength,
    "proof": Proof,
    "sample": Sample,
    "failed": Failed,
    "measured": Measured,
    "context_trial": ContextTrial,
    "judged": Judged,
    "canary": Canary,
    "launch_end": LaunchEnd,
    "health": Health,
    "stopped": Stopped,
    "resumed": Resumed,
    "end": End,
}
"""Name of each record type in the journal."""
