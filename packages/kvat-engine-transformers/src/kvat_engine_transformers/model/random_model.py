"""A model of real shape with meaningless weights: same speed, same memory, no checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

_BLOCK = 1_048_583  # a prime, so that no two rows of a matrix are alike
_SEED = 0


def build_random_model(path: Path, *, dtype: torch.dtype, device: str, attention: str) -> PreTrainedModel:
    """Build the architecture of a configuration, with the same bytes at every launch.

    Args:
        path: directory that holds a config.json.
        attention: by the name under which Transformers knows it, or has been told of it.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    _fill(model, scale=getattr(config, "initializer_range", 0.02))
    model.eval()
    return model


@torch.no_grad()
def _fill(model: PreTrainedModel, scale: float) -> None:
    # One block, tiled: drawing eight billion numbers one by one would take longer than measuring.
    generator = torch.Generator().manual_seed(_SEED)
    block = torch.randn(_BLOCK, generator=generator).mul_(scale).to(model.device, model.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            _tile(parameter.view(-1), block)


def _tile(flat: torch.Tensor, block: torch.Tensor) -> None:
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    flat[whole:].copy_(block[: flat.numel() - whole])
