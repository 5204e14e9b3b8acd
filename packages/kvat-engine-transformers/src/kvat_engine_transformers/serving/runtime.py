"""A plan at work: each call runs by the candidate that the plan names for the situation in which it is made."""

from __future__ import annotations

import gc
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvat_core.engine import EngineError, Probe
from kvat_core.errors import NothingFeasible, UsageError
from kvat_core.schema import (
    CandidateResult,
    FailureKind,
    ModelRef,
    ModelShape,
    Plan,
    Recipe,
    Scenario,
    Situation,
    Target,
    read_plan,
)
from kvat_engine_transformers.calling import kept, leftovers
from kvat_engine_transformers.calling.rows import seen
from kvat_engine_transformers.measuring.adapter import TransformersAdapter
from kvat_engine_transformers.model.description import describe_loaded, describe_model
from kvat_engine_transformers.model.naming import RANDOM
from kvat_engine_transformers.outputs.generation_config import DECODING
from kvat_engine_transformers.proving import live
from kvat_engine_transformers.serving import headroom
from kvat_engine_transformers.serving.calls import NotBegun, carry_out, decodes_otherwise, merged, new_tokens
from kvat_engine_transformers.serving.differences import differences
from kvat_engine_transformers.serving.plan_warnings import FallbackWarning, PlanWarning, tell
from kvat_engine_transformers.serving.usable import Usable, usable
from kvat_engine_transformers.settings import knobs
from kvat_engine_transformers.settings.devices import probe_device
from kvat_engine_transformers.settings.recipes import recipe

_FALLS_BACK: tuple[FailureKind, ...] = ("oom_device", "oom_host", "unsupported")
"""After these another candidate may do; whatever else happens is the caller's to know."""
_GREEDILY = {"do_sample": False, "num_beams": 1}
_PATCHED = "_kvat_original"
_METHODS = "_kvat_methods"
"""Attribute of a model: what its `generate` was, and those that blocks have put in its place, the latest last."""


def load_plan(
    plan: Path | str | Plan,
    *,
    model: PreTrainedModel | Path | str | None = None,
    requests: int | None = None,
    allow_download: bool = False,
) -> PlannedModel:
    """Make a plan ready to generate, and load its model unless there is one.

    A `PlanWarning` names whatever differs from what the plan was made for.

    Args:
        plan: a best_plan.json.
        model: loaded already, or where it is; None = as the plan names it, which of a local path keeps the last part
            only.
        requests: calls expected of this process, where that is known: compiling may not pay for few.
        allow_download: whether a hub model may be fetched.

    Raises:
        UsageError: no plan, one of another engine or with settings that this version does not know, no such model, or
            one that has nothing to tune.
        NothingFeasible: the plan has no winner, or none of its candidates can run here.
        EngineError: the model cannot be loaded; the reason is one line.
    """
    if not isinstance(plan, (Plan, Path, str)):
        raise UsageError(f"a {type(plan).__name__} is no plan and no path of one; name a best_plan.json")
    if requests is not None:
        _require_positive(requests=requests)
    made = plan if isinstance(plan, Plan) else read_plan(plan)
    if made.engine.name != "transformers":
        raise UsageError(f"the plan is for the engine {made.engine.name}; use that one's own means")
    knobs.require_known(made.require_winner().settings)
    if isinstance(model, PreTrainedModel):
        return _bound(made, model, requests)
    asked = ModelRef(id=_model_id(made, model), revision=made.model.revision, allow_download=allow_download)
    return _loaded(made, asked, requests)


@contextmanager
def patch_generate(
    model: PreTrainedModel, plan: Path | str | Plan, *, requests: int | None = None
) -> Iterator[PlannedModel]:
    """Have `model.generate` follow a plan inside the block; afterwards it is what it was.

    The plan decides how tokens come about, not which: sampling, beams and lengths stay those of the caller and of the
    model's generation_config. Calls with a cache of their own, and assisted or custom decoding, pass unchanged, with a
    `PlanWarning`. Of several blocks the one that began last counts.

    Raises:
        UsageError, NothingFeasible: as `load_plan`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a {type(model).__name__} is no model that is loaded; load it, or use load_plan")
    planned = load_plan(plan, model=model, requests=requests)
    with _patched(model, planned._in_place_of_generate()):
        yield planned


@contextmanager
def _patched(model: PreTrainedModel, generate: Callable[..., Any]) -> Iterator[None]:
    """The method of the model inside the block, in whichever order blocks begin and end."""
    own = vars(model)
    methods: list[Any] = own.setdefault(_METHODS, [own.get("generate")])
    methods.append(generate)
    own["generate"] = generate
    try:
        yield
    finally:
        methods.remove(generate)
        if len(methods) == 1:
            del own[_METHODS]
        if methods[-1] is None:
            del own["generate"]
        else:
            own["generate"] = methods[-1]


class PlannedModel:
    """A loaded model whose calls follow a plan, one at a time. Made by `load_plan`."""

    def __init__(
        self, plan: Plan, model: PreTrainedModel, shape: ModelShape, probe: Probe, requests: int | None
    ) -> None:
        self.plan = plan
        self.model = model
        self._requests = requests
        # Within `patch_generate` the method that the model shows leads back to a plan.
        generate: Any = model.generate
        self._original: Callable[..., Any] = getattr(generate, _PATCHED, generate)
        self._usable = usable(plan, shape, probe, str(model.dtype).removeprefix("torch."))
        named = ModelRef(id=plan.model.id, revision=plan.model.revision)
        self._target = _target(plan, named, live.name_of(model.device))
        if (reason := self._usable.against_winner()) is not None:
            told = f"{plan.require_winner().label} cannot run here: {reason}"
            try:
                self._usable.resolve(Situation(requests=requests))
            except NothingFeasible:
                raise NothingFeasible(f"{told}; nor can any other candidate of the plan") from None
            tell(FallbackWarning, f"{told}; other candidates of the plan are used")

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **options: Any) -> Any:
        """What `model.generate` returns, greedily and as it was measured.

        Where memory runs out, or a kernel cannot serve the call, the next candidate of the plan is tried, and a
        `FallbackWarning` says so, but not once a `streamer` may have passed tokens on.

        Args:
            input_ids: one row per prompt.
            max_new_tokens: at most, per prompt.
            options: for `model.generate`; they come before what was measured. Without an `attention_mask`,
                padding is found as `generate` finds it.

        Raises:
            UsageError: there are no rows of tokens.
            NothingFeasible: no candidate of the plan can serve such a call.
            torch.OutOfMemoryError: and whatever else `model.generate` raises, once no other candidate is left.
        """
        _require_tensor(input_ids)
        found = {"attention_mask": seen(input_ids, self.model.generation_config, options)}
        return self._follow(input_ids, max_new_tokens, {**found, **options, "max_new_tokens": max_new_tokens}, leave=())

    def choose(self, prompt_tokens: int, batch_size: int = 1) -> CandidateResult:
        """By whom a call of this shape would run now.

        Raises:
            UsageError: a number is not positive.
            NothingFeasible: no candidate of the plan can serve it.
        """
        _require_positive(prompt_tokens=prompt_tokens, batch_size=batch_size)
        return self._usable.resolve(self._situation(prompt_tokens, batch_size))

    def _in_place_of_generate(self) -> Callable[..., Any]:
        names = list(inspect.signature(self._original).parameters)

        @wraps(self._original)
        def generate(*arguments: Any, **options: Any) -> Any:
            given = {**dict(zip(names, arguments, strict=False)), **options}
            input_ids = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
            if not isinstance(input_ids, torch.Tensor):
                tell(PlanWarning, "the call has no tensor of input_ids; the plan is not used for it")
                return self._original(*arguments, **options)
            rest = {name: value for name, value in given.items() if name not in ("inputs", "input_ids")}
            count = new_tokens(self.model, input_ids.shape[-1], rest)
            return self._follow(input_ids, count, rest, leave=(*DECODING, "max_new_tokens"))

        setattr(generate, _PATCHED, self._original)
        return generate

    def _follow(
        self, input_ids: torch.Tensor, new_tokens: int, options: Mapping[str, Any], leave: tuple[str, ...]
    ) -> Any:
        """Call by one candidate after another, until one has an answer."""
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids have {input_ids.dim()} dimensions; give one row per prompt")
        if input_ids.numel() == 0:
            raise UsageError(f"input_ids of shape {tuple(input_ids.shape)} hold no token; give at least one per prompt")
        if (unplanned := self._unplanned(options)) is not None:
            return self._by_itself(f"the call {unplanned}", input_ids, options, leave)
        batch_size, prompt_tokens = input_ids.shape
        # A scenario has a decode step at least; how many tokens come about is the options' to say.
        scenario = Scenario(prompt_tokens=prompt_tokens, output_tokens=max(2, new_tokens), batch_size=batch_size)
        left, situation = self._usable, self._situation(prompt_tokens, batch_size)
        candidate = left.resolve(situation)
        _tell_shortage(left, situation, candidate)
        failures: list[EngineError] = []
        while True:
            made = recipe(candidate.settings, scenario, self._target)
            try:
                return carry_out(made, self.model, self._original, input_ids, new_tokens, options, leave)
            except EngineError as error:
                streamed = options.get("streamer") is not None and not isinstance(error, NotBegun)
                if streamed or error.kind not in _FALLS_BACK:
                    raise _original_of(error) from None
                failure = error
            failures.append(failure)
            left = left.after(candidate, failure.kind)
            situation = situation.model_copy(update={"error_kind": failure.kind})
            try:
                failed, candidate = candidate, left.resolve(situation)
            except NothingFeasible:
                if serious := [one for one in failures if not isinstance(one, NotBegun)]:
                    raise _original_of(serious[0]) from None
                reason = f"no candidate can serve the call: {failure.reason}"
                return self._by_itself(reason, input_ids, options, leave)
            self._release(failure)
            tell(FallbackWarning, f"{failed.label} failed: {failure.reason}; going on with {candidate.label}")

    def _by_itself(
        self, reason: str, input_ids: torch.Tensor, options: Mapping[str, Any], leave: tuple[str, ...]
    ) -> Any:
        """The call as Transformers makes it without a plan."""
        tell(PlanWarning, f"{reason}; the plan is not used for it")
        greedily = {name: value for name, value in _GREEDILY.items() if name not in leave}
        return self._original(input_ids=input_ids, **merged(self.model, greedily, options))

    def _unplanned(self, options: Mapping[str, Any]) -> str | None:
        """What a call does that no plan was made for, or None."""
        if any(options.get(name) is not None for name in kept.NAMES):
            return "brings a cache of its own"
        if decodes_otherwise(self.model, options):
            return "asks for assisted or custom decoding"
        return None

    def _situation(self, prompt_tokens: int, batch_size: int) -> Situation:
        return Situation(
            device_memory_free_bytes=headroom.device_bytes(self.model),
            host_memory_free_bytes=headroom.host_bytes(self.plan),
            prompt_tokens=prompt_tokens,
            batch_size=batch_size,
            requests=self._requests,
        )

    def _release(self, failure: EngineError) -> None:
        """Let go of what a failed call holds, before another one needs the room."""
        error: BaseException | None = failure
        while error is not None:
            # Its frames hold the cache and the activations.
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        leftovers.forget_compiled(self.model)
        leftovers.forget_length(self.model)
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _model_id(plan: Plan, model: Path | str | None) -> str:
    if model is not None and not isinstance(model, (Path, str)):
        raise UsageError(f"a {type(model).__name__} is no Transformers model and no path; give one of these")
    scheme = RANDOM if plan.model.weights == "random" else ""
    if model is not None:
        return scheme + str(model).removeprefix(scheme)
    if plan.model.id.removeprefix(scheme).startswith("./"):
        raise UsageError(f"of {plan.model.id} the plan keeps the last part only; say where it is with model=PATH")
    return plan.model.id


def _target(plan: Plan, model: ModelRef, device: str) -> Target:
    return Target(model=model, device=device, threads=plan.machine.threads, options=plan.engine.options)


def _bound(plan: Plan, model: PreTrainedModel, requests: int | None) -> PlannedModel:
    probe, shape = probe_device(live.name_of(model.device), {}), describe_loaded(model)
    _tell(differences(plan, probe, shape))
    return PlannedModel(plan, model, shape, probe, requests)


def _loaded(plan: Plan, asked: ModelRef, requests: int | None) -> PlannedModel:
    try:
        probe = probe_device(plan.machine.device, plan.engine.options)
    except UsageError:  # not here; the one that is taken instead is named
        probe = probe_device(None, plan.engine.options)
    shape = describe_model(asked, probe.device, plan.engine.options)
    _tell(differences(plan, probe, shape))
    first = usable(plan, shape, probe, loaded_dtype=None).resolve(Situation(requests=requests))
    made = recipe(first.settings, plan.profile.scenarios[0], _target(plan, asked, probe.device))
    return PlannedModel(plan, _load(made), shape, probe, requests)


def _load(made: Recipe) -> PreTrainedModel:
    """As a worker does; the number of threads goes back to what it was."""
    adapter, threads = TransformersAdapter(), torch.get_num_threads()
    load: Any = adapter.load_model
    try:
        load(**made.load)
    finally:
        torch.set_num_threads(threads)
    return adapter.model


def _require_tensor(input_ids: object) -> None:
    if not isinstance(input_ids, torch.Tensor):
        raise UsageError(f"a {type(input_ids).__name__} is no tensor; of what a tokenizer returns pass its input_ids")


def _require_positive(**counts: object) -> None:
    if wrong := next((name for name, count in counts.items() if not isinstance(count, int) or count < 1), None):
        raise UsageError(f"{wrong} is {counts[wrong]!r}; give a number from 1 on")


def _tell(found: Iterable[str]) -> None:
    if different := "; ".join(found):
        tell(PlanWarning, f"not what the plan was made for: {different}; tune again for figures that hold here")


def _tell_shortage(left: Usable, situation: Situation, chosen: CandidateResult) -> None:
    """Say so where only want of memory keeps a call from the candidate that the plan prefers for it."""
    unknown = {"device_memory_free_bytes": None, "host_memory_free_bytes": None}
    preferred = left.resolve(situation.model_copy(update=unknown))
    if preferred.id != chosen.id:
        tell(FallbackWarning, f"too little memory is free for {preferred.label}; {chosen.label} is used")


def _original_of(error: EngineError) -> BaseException:
    """What `generate` itself has raised, where it was that."""
    return error.__cause__ or error
