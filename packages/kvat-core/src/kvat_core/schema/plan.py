"""The plan: what kvat decided, why, and on what evidence (published format 1)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from kvat_core.errors import NotDecided, NothingFeasible, UsageError
from kvat_core.schema._base import FORMAT, Record
from kvat_core.schema.fallback import Rule, Situation, needed_bytes
from kvat_core.schema.fidelity import FidelityLimits, FidelityVerdict
from kvat_core.schema.machine import Machine
from kvat_core.schema.measurement import Failure
from kvat_core.schema.model import ModelDimensions
from kvat_core.schema.workload import Profile, Scenario

State = Literal["ok", "failed", "excluded", "pruned", "not_reached", "undecided"]
Verdict = Literal["better", "tie", "undecided", "infeasible"]
LimitName = Literal[
    "max_device_bytes", "max_host_bytes", "max_ttft_s", "max_tpot_s", "min_decode_tps", "min_context_tokens"
]
"""A limit by its key in the profile."""
Kept = Literal["pass", "fail", "undecided"]
ContextMethod = Literal["predicted", "probed"]
BoundedBy = Literal["model", "user", "device_memory", "host_memory", "time", "failure"]


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
    another_length_s: float | None = Field(
        default=None,
        description="first call of another prompt length, in a process that is at full speed with this one, less a "
        "call at full speed; null = not measured",
    )
    another_length_graphs: int | None = Field(
        default=None, description="graphs compiled during that call; null = not measured"
    )


class ScenarioResult(Record):
    """What one candidate did in one scenario."""

    prompt_tokens: int
    output_tokens: int
    batch_size: int
    shortest_prompt_tokens: int | None = Field(
        default=None, description="of a batch of unequal prompts, which are spread evenly from it to the longest"
    )
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

    @property
    def key(self) -> str:
        """Name of the scenario, as in its profile."""
        return Scenario.model_validate(self.model_dump(include=_SHAPE)).key


_SHAPE = {"prompt_tokens", "output_tokens", "batch_size", "shortest_prompt_tokens"}


class LimitResult(Record):
    """Whether one candidate keeps one limit; of several scenarios, the one that is furthest from keeping it."""

    name: LimitName
    limit: float = Field(description="unit as in the name")
    percentile: float | None = Field(description="share of calls that has to keep it, in %; null where it is not calls")
    scenario: str | None = Field(description="where it was observed; null for what belongs to no scenario")
    observed: float | None = Field(description="unit as in the name, at that percentile; null = not known")
    verdict: Kept
    missed_by: float | None = Field(description="|observed - limit| ÷ limit; null unless it fails")
    reason: str = Field(description="the same in words; where it is undecided, what would decide")


class NearMiss(Record):
    """A candidate that only limits keep from being recommended."""

    id: str
    label: str
    misses: tuple[LimitResult, ...] = Field(description="the limits that it fails, at least one")


class FidelityResult(Record):
    """Whether a candidate says what its reference says; figures are null where it was not judged."""

    lossy: bool = Field(default=False, description="whether it may lose output that what runs today does not")
    verdict: FidelityVerdict | None = Field(default=None, description="null = not judged")
    kl_nats: float | None = Field(default=None, description="mean KL(reference ‖ candidate) with the same text forced")
    top1_agreement: float | None = Field(default=None, description="share of its tokens with the same first choice")
    first_divergence: int | None = Field(
        default=None, description="first token, from 0, of the reference's own choice that is another; null = none"
    )
    tokens: int | None = Field(
        default=None, description="of the text, of all requests: those that kl_nats and top1_agreement are of"
    )
    full_precision_kl_nats: float | None = Field(
        default=None, description="of its reference against full precision; null where it is that, or unknown"
    )
    reason: str | None = Field(default=None, description="why it was not judged, or not against full precision")


class CandidateResult(Record):
    """Everything known of one candidate."""

    id: str
    label: str
    settings: dict[str, str]
    state: State
    reason: str | None = Field(default=None, description="why it is excluded, not reached, not eligible, or an alias")
    failure: Failure | None = None
    aliases: tuple[str, ...] = Field(default=(), description="candidates that turned out to run the very same thing")
    fidelity: FidelityResult = Field(default_factory=lambda: FidelityResult())
    rejected_share: float = Field(default=0.0, description="of its timed calls, rejected for a recorded cause")
    unstable: bool = Field(default=False, description="too many were rejected for its figures to be relied on")
    score: Ratio | None = Field(default=None, description="score ÷ incumbent's score")
    limits: tuple[LimitResult, ...] = Field(default=(), description="empty without limits, or without figures")
    max_context_tokens: int | None = Field(
        default=None, description="longest context that is shown to run; null = not measured"
    )
    max_context_bounded_by: BoundedBy | None = Field(
        default=None, description="what ends it, as in max_context of the plan; null = not measured"
    )
    scenarios: tuple[ScenarioResult, ...] = ()

    @property
    def eligible(self) -> bool:
        """Whether it may be recommended: measured in all scenarios, and nothing speaks against it."""
        return self.state == "ok" and self.reason is None

    @property
    def peak_device_bytes(self) -> int | None:
        """The largest known of its scenarios."""
        return max((one.peak_device_bytes for one in self.scenarios if one.peak_device_bytes is not None), default=None)

    @property
    def peak_host_bytes(self) -> int | None:
        """The largest known of its scenarios."""
        return max((one.peak_host_bytes for one in self.scenarios if one.peak_host_bytes is not None), default=None)

    def lacking_bytes(self, situation: Situation) -> int | None:
        """Memory that is short for it, 0 if none is; None = its peak is not known.

        Of device and host the one that is shorter counts; with nothing known of free memory, nothing is short.
        """
        pairs = (
            (self.peak_device_bytes, situation.device_memory_free_bytes),
            (self.peak_host_bytes, situation.host_memory_free_bytes),
        )
        told = [(peak, free) for peak, free in pairs if free is not None]
        short = max((needed_bytes(peak) - free for peak, free in told if peak is not None), default=0)
        return None if short <= 0 and any(peak is None for peak, _ in told) else max(0, short)

    def holds(self, prompt_tokens: int | None) -> bool | None:
        """Whether a prompt fits its longest context, with room for a token; None = nobody has tried so long a one."""
        longest = self.max_context_tokens
        if prompt_tokens is None or (longest is not None and prompt_tokens < longest):
            return True
        return None if longest is None or self.max_context_bounded_by in ("user", "time") else False

    def runs_without(self, features: tuple[str, ...]) -> bool:
        """Whether it has none of these settings, each KNOB=VALUE."""
        return not any(f"{knob}={value}" in features for knob, value in self.settings.items())


def eligible_by_score(candidates: Iterable[CandidateResult]) -> list[CandidateResult]:
    """Those that may be recommended, the best score first."""
    eligible = [candidate for candidate in candidates if candidate.eligible]
    return sorted(eligible, key=lambda one: one.score.value if one.score else 0.0, reverse=True)


class Choice(Record):
    """A candidate, named so that a script needs no look-up."""

    id: str
    label: str
    settings: dict[str, str]


class Confidence(Record):
    """How sure the choice is, by this run's own measurements."""

    level: Literal["high", "medium", "low"]
    probability: float = Field(description="that the winner is within ε of the best measured; never above 0.99")
    noise_floor: float | None = Field(
        description="relative spread between launches of one candidate; null = not known, from fewer than two"
    )
    epsilon: float = Field(description="relative difference below which nothing is claimed: max(1 %, 2 × noise floor)")


class Drift(Record):
    """How much faster the machine was at the end of the run than at its start, by what runs today; 1 = no trend."""

    value: float
    low: float = Field(description="lower end of the 95 % interval")
    high: float = Field(description="upper end of the 95 % interval")
    launches: int = Field(description="of what runs today")


class PlanModel(Record):
    """The model that was measured."""

    id: str = Field(description="as named; of a local path only the last part")
    revision: str | None
    weights: Literal["checkpoint", "random"]
    quantization: str | None = Field(
        default=None, description="how the checkpoint stores its weights packed; null for plain numbers"
    )
    sha256: str | None
    dimensions: ModelDimensions | None = None


class PlanEngine(Record):
    """The engine and the versions of what it stands on."""

    name: str
    versions: dict[str, str]
    options: dict[str, str] = Field(default_factory=dict, description="--engine-option, without directories")


class WinnerMetrics(Record):
    """Stability of the winner."""

    error_rate: float = Field(description="failed share of its timed calls")
    jitter: float | None = Field(description="p95 / p50 of the token gaps; null where the engine gives totals only")


class JournalRef(Record):
    """The evidence."""

    file: str
    sha256: str
    samples: int


class MaxContext(Record):
    """Longest context of a candidate, prompt and output of one request together."""

    tokens: int
    safe_tokens: int = Field(
        description="what to rely on: less a reserve of 3 %, unless model or user bound it, where nothing runs out"
    )
    method: ContextMethod = Field(
        description="probed: it ran, 3 times in a row, and what is 1 % longer did not or was not wanted; predicted: by "
        "the model's shape and the machine's memory alone"
    )
    bounded_by: BoundedBy = Field(
        description="what ends it: model and user, a length; memory; time, a prefill that takes the incumbent "
        "more than 2 minutes, or a deadline; failure, anything else, of which the notes tell"
    )


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
    winner: Choice | None = Field(description="null if the verdict is infeasible, and only then")
    verdict: Verdict
    ratio: Ratios | None = Field(description="winner ÷ incumbent; null without a winner or figures of the incumbent")
    confidence: Confidence | None = Field(description="null without a winner")
    closest: tuple[NearMiss, ...] = Field(
        default=(), description="without a winner: up to 3 candidates, the one whose largest miss is smallest first"
    )
    equivalents: tuple[str, ...] = Field(description="candidates that cannot be told from the winner, itself apart")
    max_context: MaxContext | None = Field(
        default=None, description="of the winner; null: neither measured nor predicted"
    )
    metrics: WinnerMetrics | None = Field(description="null without a winner")
    canary: Literal["clean", "undetermined"] | None = Field(
        default=None,
        description="of the winner: clean, what earlier requests of its process said changes no answer, though their "
        "lengths may; undetermined, that could not be told; null = nobody looked",
    )
    fidelity_limits: FidelityLimits | None = Field(
        default=None, description="that were in force; null where any loss was allowed"
    )
    drift: Drift | None = Field(default=None, description="null: what runs today had too few launches to tell")
    pareto: tuple[str, ...] = Field(
        default=(),
        description="candidates that no other one is shown to beat in first token, decoding, peak memory and longest "
        "context alike, as far as these are known: the winner, if it is one of them, then by score",
    )
    rules: tuple[Rule, ...] = Field(default=(), description="in order; what holds in a situation is for resolve()")
    notes: tuple[str, ...] = Field(default=(), description="what a reader must know before trusting the figures")
    candidates: tuple[CandidateResult, ...]
    journal: JournalRef

    @model_validator(mode="after")
    def _rules_use_candidates(self) -> Self:
        known = {candidate.id for candidate in self.candidates}
        if unknown := {rule.use for rule in self.rules} - known:
            raise ValueError(f"a rule uses {min(unknown)!r}, which is no candidate of the plan")
        return self

    @model_validator(mode="after")
    def _winner_or_closest(self) -> Self:
        infeasible = self.verdict == "infeasible"
        of_a_winner = (self.winner, self.confidence, self.metrics)
        if any((part is None) != infeasible for part in of_a_winner) or bool(self.closest) != infeasible:
            raise ValueError("without a winner the verdict is infeasible and closest says why; with one it is not")
        return self

    def require_winner(self) -> Choice:
        """The winner.

        Raises:
            NothingFeasible: there is none, because no candidate keeps the limits.
            NotDecided: the same of those that were measured before the run was ended.
        """
        if self.winner is not None:
            return self.winner
        first = self.closest[0]
        misses = f"the closest, {first.label}, {' and '.join(miss.reason for miss in first.misses)}"
        if self.partial and any(candidate.state == "not_reached" for candidate in self.candidates):
            raise NotDecided(f"no candidate measured so far keeps the limits; {misses}; go on with --resume")
        raise NothingFeasible(
            f"no candidate keeps the limits; {misses}; decide again for wider ones with kvat plan, or tune anew with a "
            "wider --space"
        )

    def candidate(self, candidate_id: str) -> CandidateResult:
        """The entry with that id.

        Raises:
            KeyError: no candidate of the plan has it.
        """
        for candidate in self.candidates:
            if candidate.id == candidate_id:
                return candidate
        raise KeyError(candidate_id)

    def resolve(self, situation: Situation) -> CandidateResult:
        """The candidate to use: of the first rule that holds and whose candidate can run there, else the winner.

        Where the winner cannot either, it is the one with the best score of those that can, and whose output was
        looked at where that can be done; where memory is too short
        for all, the one for which least is lacking. A candidate whose peak is unknown counts as fitting wherever the
        winner does, and one of which nobody knows whether it holds the prompt as holding it wherever the winner is not
        known to fail. So with more free memory, and all else equal, nothing that is less preferred is ever chosen.
        After an error the winner, which has ended so, is chosen only where nothing else is left.

        Raises:
            NothingFeasible: there is no winner, or all candidates have a setting that is missing, or hold too little.
            NotDecided: there is no winner yet.
        """
        winner, longest = self.candidate(self.require_winner().id), self.max_context
        if longest is not None and longest.bounded_by == "model" and (situation.prompt_tokens or 0) >= longest.tokens:
            raise NothingFeasible(
                f"the model holds {longest.tokens} tokens, the prompt and one more; shorten the prompt"
            )
        unless_known = winner.holds(situation.prompt_tokens) is not False

        def holds(one: CandidateResult) -> bool:
            own = one.holds(situation.prompt_tokens)
            return unless_known if own is None else own

        usable = [
            one for one in self._by_preference(situation) if one.runs_without(situation.missing_features) and holds(one)
        ]
        if not usable:
            raise NothingFeasible("no candidate of the plan can run in this situation; tune again for it")
        if situation.error_kind is not None:
            usable.sort(key=lambda one: one.id == winner.id)
        of_winner = winner.lacking_bytes(situation) or 0

        def lacking_bytes(one: CandidateResult) -> int:
            own = one.lacking_bytes(situation)
            return of_winner if own is None else own

        return min(usable, key=lacking_bytes)

    def _by_preference(self, situation: Situation) -> list[CandidateResult]:
        """Eligible candidates, each once: those of the rules that hold, the winner, the others by their score.

        Where output was judged at all, it was that of each of them, but for a winner of which a note says why not.
        """
        winner, judged = self.require_winner().id, any(one.fidelity.verdict for one in self.candidates)
        eligible = {
            one.id: one
            for one in eligible_by_score(self.candidates)
            if one.fidelity.verdict is not None or one.id == winner or not judged
        }
        wanted = [rule.use for rule in self.rules if rule.when.holds(situation)]
        ranked = dict.fromkeys([*wanted, winner, *eligible])
        return [eligible[name] for name in ranked if name in eligible]


def read_plan(path: Path | str) -> Plan:
    """Read and validate a plan file.

    Raises:
        UsageError: unreadable, not JSON, of a newer format, or not a plan.
    """
    path = Path(path)
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
        said = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UsageError(f"{path} is not a plan: {where}: {said}; write it again with kvat tune") from error
