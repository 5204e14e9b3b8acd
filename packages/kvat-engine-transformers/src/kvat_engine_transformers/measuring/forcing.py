"""What a model predicts where its tokens are forced: through the very call that is timed, one token after the other."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvat_core.engine import EngineError
from kvat_engine_transformers.calling import batching
from kvat_engine_transformers.settings.recipes import BATCHING

Ids = NDArray[np.int64]
Logprobs = NDArray[np.float32]

_IN_STEP = {"use_cuda_graph": False, "use_async_batching": False}
"""What lets each step's logits be read: a captured graph calls nothing, and a step ahead knows no forced token."""


class _Forcer(LogitsProcessor):
    """Notes the log-probabilities of each step, and leaves no choice but the forced token."""

    def __init__(self, forced: torch.Tensor | None) -> None:
        self.logprobs: list[torch.Tensor] = []
        self._forced = forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.logprobs)
        self.logprobs.append(torch.log_softmax(scores.float(), dim=-1).cpu())
        if self._forced is None:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, self._forced[:, step : step + 1].to(scores.device), 0.0)


class _Witness(LogitsProcessor):
    """Changes nothing, and digests all scores that it sees."""

    def __init__(self) -> None:
        self.seen = hashlib.sha256()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.update(scores.float().cpu().numpy().tobytes())
        return scores


@contextmanager
def witnessed(model: PreTrainedModel) -> Iterator[Callable[[], str]]:
    """Gives a digest of the scores of all calls of `generate` so far, as they are before the model's own processors."""
    witness, own = _Witness(), cast("Callable[..., LogitsProcessorList]", model._get_logits_processor)
    with _processing(model, lambda *arguments, **options: LogitsProcessorList([witness, *own(*arguments, **options)])):
        yield lambda: witness.seen.hexdigest()


def score(
    model: PreTrainedModel, ids: Ids, arguments: Mapping[str, Any], forced: Ids | None, *, batched: bool
) -> tuple[Logprobs, Ids]:
    """Generate as a recipe says, with forced tokens; see `EngineAdapter.score`.

    What the model itself predicts is compared: processors of its generation_config, such as a penalty for repetition,
    are left out. So are the CUDA graphs and the step ahead of `generate_batch`, in which nothing could be forced.

    Args:
        model: the live model, in the recipe's contexts.
        ids: of the prompts, requests × tokens.
        arguments: of the recipe's call, with as many new tokens as there are steps.
        forced: requests × steps; None = what the model chooses.
        batched: whether the call is `generate_batch`, whose requests are scored one by one: what it computes for
            several at a time comes in an order of its own.

    Raises:
        EngineError: other tokens came out than were forced.
    """
    if batched:
        wanted = [None] * len(ids) if forced is None else list(forced)
        scored = [_score_request(model, row, arguments, one) for row, one in zip(ids, wanted, strict=True)]
        return np.stack([logprobs for logprobs, _ in scored]), np.stack([tokens for _, tokens in scored])
    forcer = _Forcer(None if forced is None else torch.from_numpy(np.ascontiguousarray(forced)))
    inputs = torch.from_numpy(np.ascontiguousarray(ids)).to(model.device)
    generate: Any = model.generate
    with _processing(model, lambda *_, **__: LogitsProcessorList([forcer])):
        output = generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **arguments)
    tokens = output[:, ids.shape[1] :].cpu().numpy()
    _require_forced(tokens, forced)
    return torch.stack(forcer.logprobs, dim=1).numpy(), tokens


def score_at_once(model: PreTrainedModel, ids: Ids, forced: Ids) -> Logprobs:
    """All steps in one pass without a cache; see `EngineAdapter.score_at_once`."""
    steps = forced.shape[1]
    inputs = torch.from_numpy(np.concatenate([ids, forced], axis=1)[:, :-1]).to(model.device)
    # Logits of all positions of a long prompt would be gigabytes.
    last = {"logits_to_keep": steps} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False, **last)
    predicted = torch.log_softmax(output.logits[:, -steps:].float(), dim=-1).cpu().numpy()
    return np.asarray(predicted, dtype=np.float32)


def _score_request(
    model: PreTrainedModel, ids: Ids, arguments: Mapping[str, Any], forced: Ids | None
) -> tuple[Logprobs, Ids]:
    forcer = _Forcer(None if forced is None else torch.from_numpy(np.ascontiguousarray(forced[None])))
    in_step = {**arguments, BATCHING: {**arguments[BATCHING], **_IN_STEP}}
    with _processing(model, lambda *_, **__: LogitsProcessorList([forcer])):
        (answer,) = batching.generate(model, [ids.tolist()], in_step)
    tokens = np.array(answer.output_ids, dtype=np.int64)
    _require_forced(tokens[None], None if forced is None else forced[None])
    return torch.cat(forcer.logprobs).numpy(), tokens


@contextmanager
def _processing(model: PreTrainedModel, processors: Callable[..., LogitsProcessorList]) -> Iterator[None]:
    """Let `generate` and `generate_batch` find these processors instead of the model's own."""
    own = vars(model)
    own["_get_logits_processor"] = processors
    try:
        yield
    finally:
        del own["_get_logits_processor"]


def _require_forced(tokens: Ids, forced: Ids | None) -> None:
    if forced is not None and not np.array_equal(tokens, forced):
        raise EngineError("invalid_output", "other tokens came out than were forced")
