"""What Transformers keeps on a model from one call to the next."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def forget_length(model: PreTrainedModel) -> None:
    """Let the next static cache be as long as asked; Transformers makes each as long as the longest one before."""
    vars(model).pop("_previous_max_cache_length", None)


def forget_compiled(model: PreTrainedModel) -> None:
    """Give up compiled code, and the memory that goes with it."""
    left_behind = vars(model)
    if left_behind.pop("_compiled_call", None) is not None:
        left_behind.pop("_last_compile_config", None)
        torch.compiler.reset()
