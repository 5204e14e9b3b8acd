"""`generate_batch`, Transformers' continuous batching: its arguments, its outcome, and the pool while it lives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel

from kvat_core.engine import EngineError
from kvat_engine_transformers.calling.failures import from_text
from kvat_engine_transformers.calling.rows import left_out
from kvat_engine_transformers.settings.recipes import BATCHING
from kvat_engine_transformers.settings.sectors import spare_blocks

NO_END_OF_SEQUENCE = -1
"""The `eos_token_id` by which nothing ends a sequence early."""


@dataclass(frozen=True)
class Pool:
    """A paged cache as it was at the end of a call."""

    kind: str
    page_tokens: int
    blocks: int
    spare_blocks: int
    """As many as were asked for beside those that the tokens of the requests take."""
    shares_blocks: bool
    nbytes: int
    dtype: str
    device: str
    attention: str
    """Implementation by which the model attended meanwhile."""


class Request(NamedTuple):
    """One prompt with what was generated for it; times of its tokens by `time.perf_counter`, in seconds."""

    prompt_tokens: int
    output_ids: list[int]
    token_s: list[float]


class Watch:
    """Sees the manager that `generate_batch` makes, uses and destroys."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self._manager: Any = None

    def seen(self) -> int:
        """Tokens that the request that is furthest behind has so far; 0 before the first and after the last of all."""
        processor = getattr(self._manager, "batch_processor", None)
        active = list(processor.scheduler.active_requests.values()) if processor is not None else []
        return min((len(state.generated_tokens) for state in active), default=0)

    def follow(self, manager: Any) -> None:
        """Look at the pool when the manager is told to stop, which is before it lets go of it."""
        self._manager = manager
        stop = manager.stop

        def look_and_stop(*arguments: Any, **options: Any) -> None:
            if manager.batch_processor is not None:
                self.pool = _pool(manager)
            stop(*arguments, **options)

        manager.stop = look_and_stop


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Watch]:
    """Watch the calls of `generate_batch` in the block."""
    watch, own = Watch(), vars(model)
    init: Any = model.init_continuous_batching

    def init_and_follow(*arguments: Any, **options: Any) -> Any:
        manager = init(*arguments, **options)
        watch.follow(manager)
        return manager

    own["init_continuous_batching"] = init_and_follow
    try:
        yield watch
    finally:
        del own["init_continuous_batching"]


def arguments(model: PreTrainedModel, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `generate_batch`: what a recipe says, on top of the model's own generation_config.

    A recipe counts the blocks of its tokens; the pool has `spare_blocks` beside them, as far as the model needs any.
    """
    batch: Mapping[str, Any] = fields[BATCHING]
    blocks = batch["num_blocks"] + spare_blocks(model.config.get_text_config())
    config = copy.deepcopy(model.generation_config)
    # As generate does, which takes the 50 likeliest tokens, for example, where nobody says otherwise.
    config.update(**config._get_default_generation_params(), defaults_only=True)
    config.update(**{name: value for name, value in fields.items() if name != BATCHING})
    return {"generation_config": config, BATCHING: ContinuousBatchingConfig(**{**batch, "num_blocks": blocks})}


def unserved(model: PreTrainedModel, fields: Mapping[str, Any]) -> str | None:
    """What of a call `generate_batch` would leave out, so that it chose or ended otherwise than `generate`, or None.

    Args:
        model: the live model, whose generation_config counts where the fields say nothing.
        fields: arguments of a recipe, or of a call by one.
    """
    return left_out(model, arguments(model, fields)["generation_config"])


def generate(model: PreTrainedModel, rows: Sequence[Sequence[int]], fields: Mapping[str, Any]) -> list[Request]:
    """Generate for all rows; in their order.

    Args:
        model: the live model.
        rows: ids of each prompt.
        fields: arguments of a recipe, with what makes a call exact.

    Raises:
        EngineError: a request failed, or has no answer. It all happens in another thread, which raises nothing here.
    """
    batch: Any = model.generate_batch
    answers = batch([list(row) for row in rows], record_timestamps=True, **arguments(model, fields))
    failed = next((answer.error for answer in answers.values() if answer.error is not None), None)
    if failed is not None:
        raise from_text(failed) or EngineError("error", "generate_batch gave up a request")
    if len(answers) < len(rows):
        raise EngineError("no_output", f"generate_batch answered {len(answers)} of {len(rows)} requests")
    return [
        Request(len(answer.prompt_ids), list(answer.generated_tokens), list(answer.timestamps))
        for answer in answers.values()
    ]


def _pool(manager: Any) -> Pool:
    cache = manager.batch_processor.cache
    return Pool(
        kind=type(cache).__name__,
        page_tokens=int(manager.continuous_batching_config.page_size),
        blocks=int(cache.num_blocks),
        spare_blocks=spare_blocks(cache.config),
        shares_blocks=bool(cache.use_prefix_sharing),
        nbytes=int(cache.cache_tensor.nbytes),
        dtype=str(cache.dtype).removeprefix("torch."),
        device=str(torch.device(cache.device)),
        attention=str(manager.model.config._attn_implementation),
    )
