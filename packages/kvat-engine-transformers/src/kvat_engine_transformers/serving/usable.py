"""Which candidates of a plan can run with this model on this machine, and which are left after one has failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.pareto import MEMORY_STEP_BYTES
from kvat_core.schema import CandidateResult, FailureKind, ModelShape, Plan, Situation
from kvat_engine_transformers.settings import knobs


@dataclass(frozen=True)
class Usable:
    """A plan in which only those candidates are eligible that can run."""

    plan: Plan
    missing: Mapping[str, str]
    """Settings that cannot run, each KNOB=VALUE, to the reason."""

    def resolve(self, situation: Situation) -> CandidateResult:
        """As `Plan.resolve`, with the settings that are missing.

        Raises:
            NothingFeasible: no candidate can run in this situation.
        """
        return self.plan.resolve(situation.model_copy(update={"missing_features": tuple(self.missing)}))

    def against_winner(self) -> str | None:
        """Why the winner cannot run, or None."""
        winner = self.plan.candidate(self.plan.require_winner().id)
        own = (f"{knob}={value}" for knob, value in winner.settings.items())
        missing = (f"{setting} ({self.missing[setting]})" for setting in own if setting in self.missing)
        return next(missing, winner.reason)

    def after(self, failed: CandidateResult, kind: FailureKind) -> Usable:
        """Without the one that has failed and, if memory ran out, without those that are known to need as much."""
        return Usable(_judged(self.plan, lambda one: _hopeless(one, failed, kind)), self.missing)


def usable(plan: Plan, shape: ModelShape, probe: Probe, loaded_dtype: str | None) -> Usable:
    """What of a plan can run.

    Args:
        plan: it has a winner.
        shape: of the model. Its weights fit, or are there already.
        probe: of the machine.
        loaded_dtype: of the loaded model, which stays as it is; None = it is still to be loaded.
    """
    unavailable = {
        f"{knob.name}={value.name}": value.unavailable
        for knob in knobs.space(shape, probe, None)
        for value in knob.values
        if value.unavailable is not None
    }
    others = () if loaded_dtype is None else (name for name in knobs.DTYPES if name != loaded_dtype)
    loaded = {f"dtype={name}": f"the model is loaded in {loaded_dtype}" for name in others}
    without_weights = shape.model_copy(update={"weight_bytes": None})
    return Usable(_judged(plan, lambda one: _impossible(one, without_weights, probe)), {**unavailable, **loaded})


def _judged(plan: Plan, reason: Callable[[CandidateResult], str | None]) -> Plan:
    """The plan with a reason at each candidate that must not be chosen; the first one counts."""
    candidates = (one.model_copy(update={"reason": one.reason or reason(one)}) for one in plan.candidates)
    return plan.model_copy(update={"candidates": tuple(candidates)})


def _impossible(one: CandidateResult, shape: ModelShape, probe: Probe) -> str | None:
    """Why settings that could each run cannot together."""
    try:
        knobs.require_known(one.settings)
    except UsageError as error:
        return str(error)
    return knobs.check(one.settings, shape, probe)


def _hopeless(one: CandidateResult, failed: CandidateResult, kind: FailureKind) -> str | None:
    if one.id == failed.id:
        return f"it has failed ({kind})"
    peaks = {
        "oom_device": (one.peak_device_bytes, failed.peak_device_bytes),
        "oom_host": (one.peak_host_bytes, failed.peak_host_bytes),
    }
    own, of_failed = peaks.get(kind, (None, None))
    as_much = own is not None and of_failed is not None and own > of_failed - MEMORY_STEP_BYTES
    return f"it needs as much memory as {failed.label}" if as_much else None
