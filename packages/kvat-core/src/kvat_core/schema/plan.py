"""The plan: what kvat decided, why, and on what evidence (published format 1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from kvat_core.errors import UsageError
from kvat_core.schema._base import FORMAT, Record
from kvat_core.schema.machine import Machine
from kvat_core.schema.measurement import Failure
from kvat_core.schema.workload import Profile

State = Literal["ok", "failed", "excluded", "pruned", "not_reached", "undecided"]
Verdict = Literal["better", "tie", "undecided"]


class Estimate(Record):
    """A measured quantity over launches; unit as in the key that holds it."""

    median: float = Field(description="median of the launch medians")
    low: float = Field(description="lower end of the 95 % interval over launches")
    high: float = Field(description="upper end of the 95 % interval over launches")
    n: int = Field(description="launches")


class Ratio(Record):
    """A paired comparison as speed: above 1 the numerator is better."""

    value: float
    low: float | None = Field(description="lower end of the 95 % interval; null with a single block")
    high: float | None = Field(description="upper end of the 95 % interval; null with a single block")
    n: int = Field(description="paired blocks")


class Ratios(Record):
    """Winner ÷ incumbent."""

    score: Ratio
    ttft: Ratio
    decode: Ratio


class CompileCost(Record):
    """What compiling costs before it pays: in a new process, on top of a call at full speed."""

    first_call_s: float = Field(description="first call, when nothing was cached")
    cached_first_call_s: float | None = Field(
        description="first call of a later process, with the compiler's cache filled; null = not measured"
    )
    compile_s: float = Field(description="first_call_s less a call at full speed")
    break_even_requests: int | None = Field(
        description="requests of this shape after which a new process has won back compile_s against the incumbent; "
        "null = never, or the incumbent has no figures"
    )


class ScenarioResult(Record):
    """What one candidate did in one scenario."""

    prompt_tokens: int
    output_tokens: int
    batch_size: int
    ttft_s: Estimate
    tpot_s: Estimate
    decode_tps: Estimate
    e2e_s: Estimate
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None
    ready_host_bytes: int | None = Field(default=None, description="resident size before the calls of that peak")
    kv_cache_bytes: int | None = None
    kv_cache_predicted_bytes: int | None = Field(default=None, description="by the model's shape; null = no prediction")
    energy_per_token_j: float | None = Field(
        default=None, description="of the whole card, per output token, prefill included; null where nobody tells"
    )
    compile_cost: CompileCost | None = Field(default=None, description="null for what does not compile")
    bandwidth_use: float | None = Field(
        default=None,
        description="bytes that decoding must read per second ÷ the best that this machine reads; null = not known, or "
        "so few bytes that caches serve them",
    )
    flop_use: float | None = Field(
        default=None, description="operations of prefill ÷ (ttft_s · the best rate of a large matrix product)"
    )


class CandidateResult(Record):
    """Everything known of one candidate."""

    id: str
    label: str
    settings: dict[str, str]
    state: State
    reason: str | None = Field(default=None, description="why it is excluded, not reached, not eligible, or an alias")
    failure: Failure | None = None
    aliases: tuple[str, ...] = Field(default=(), description="candidates that turned out to run the very same thing")
    fidelity: dict[str, JsonValue] = Field(default_factory=dict)
    rejected_share: float = Field(default=0.0, description="of its timed calls, rejected for a recorded cause")
    unstable: bool = Field(default=False, description="too many were rejected for its figures to be relied on")
    score: Ratio | None = Field(default=None, description="score ÷ incumbent's score")
    scenarios: tuple[ScenarioResult, ...] = ()


class Choice(Record):
    """A candidate, named so that a script needs no look-up."""

    id: str
    label: str
    settings: dict[str, str]


class Confidence(Record):
    """How sure the choice is, by this run's own measurements."""

    level: Literal["high", "medium", "low"]
    probability: float = Field(description="that the winner is within ε of the best measured; never above 0.99")
    noise_floor: float = Field(description="relative spread between launches of one candidate")
    epsilon: float = Field(description="relative difference below which nothing is claimed: max(1 %, 2 × noise floor)")


class PlanModel(Record):
    """The model that was measured."""

    id: str = Field(description="as named; of a local path only the last part")
    revision: str | None
    weights: Literal["checkpoint", "random"]
    sha256: str | None


class PlanEngine(Record):
    """The engine and the versions of what it stands on."""

    name: str
    versions: dict[str, str]


class WinnerMetrics(Record):
    """Stability of the winner."""

    error_rate: float = Field(description="failed share of its timed calls")
    jitter: float | None = Field(description="p95 / p50 of the token gaps; null where the engine gives totals only")


class JournalRef(Record):
    """The evidence."""

    file: str
    sha256: str
    samples: int


class Rule(Record):
    """A fallback: when the situation holds, use that measured candidate."""

    when: dict[str, JsonValue]
    use: str
    because: str


class MaxContext(Record):
    """Longest context of the winner."""

    tokens: int
    method: str
    bounded_by: str


class Plan(Record):
    """The published plan. A pure function of the journal it names."""

    format: Literal[1] = FORMAT
    kvat: str
    partial: bool = Field(default=False, description="the run was ended before it had measured all it meant to")
    created: str = Field(description="start of the run, UTC, ISO 8601")
    engine: PlanEngine
    model: PlanModel
    machine: Machine
    profile: Profile
    incumbent: Choice
    winner: Choice
    verdict: Verdict
    ratio: Ratios | None = Field(description="winner ÷ incumbent; null when the incumbent has no figures")
    confidence: Confidence
    equivalents: tuple[str, ...] = Field(description="candidates that cannot be told from the winner, itself apart")
    max_context: MaxContext | None = Field(default=None, description="null: not determined in this run")
    metrics: WinnerMetrics
    rules: tuple[Rule, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="what a reader must know before trusting the figures")
    candidates: tuple[CandidateResult, ...]
    journal: JournalRef

    def candidate(self, candidate_id: str) -> CandidateResult:
        """The entry with that id.

        Raises:
            KeyError: no candidate of the plan has it.
        """
        for candidate in self.candidates:
            if candidate.id == candidate_id:
                return candidate
        raise KeyError(candidate_id)


def read_plan(path: Path) -> Plan:
    """Read and validate a plan file.

    Raises:
        UsageError: unreadable, not JSON, of a newer format, or not a plan.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read plan {path}: {error.strerror}; name a best_plan.json") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON; name a best_plan.json written by kvat tune") from error
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise UsageError(
            f"{path} has plan format {found}, this kvat reads up to {FORMAT}; upgrade kvat-core and kvat-cli"
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UsageError(f"{path} is not a plan: {where}: {first['msg']}; write it again with kvat tune") from error
