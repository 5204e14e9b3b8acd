"""xFormers' memory-efficient attention as one that Transformers knows by the name ``xformers``, once this is imported.

The code below the imports is what a snippet carries, so it needs nothing of kvat.
"""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from xformers.ops import LowerTriangularMask, memory_efficient_attention


def xformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend by xFormers: from batch × heads × tokens × head size to batch × tokens × heads × head size.

    Raises:
        NotImplementedError: the model asks for something that xFormers' attention does not have, or none of its kernels
            can serve these shapes, this mask or this device.
    """
    for name in ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"):
        if options.get(name) is not None:
            raise NotImplementedError(f"xformers_attention has no {name}")
    queries, bias = query.shape[2], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        bias = xformers_bias(attention_mask, query)
    elif queries > 1 and causal:
        # Without a mask there are no earlier tokens; what follows the queries are free slots of a static cache.
        key, value, bias = key[:, :, :queries], value[:, :, :queries], LowerTriangularMask()
    output = xformers_by_heads(query, key, value, bias, dropout, scaling)
    return output.reshape(query.shape[0], queries, query.shape[1], -1), None


def xformers_by_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | LowerTriangularMask | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attend in the layout that xFormers has for these heads; none of the keys is copied for a second head."""
    heads, queries, groups = query.shape[1], query.shape[2], key.shape[1]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    as_queries = queries == 1 and groups < heads
    if groups < heads:
        query = query.unflatten(1, (groups, -1))
        bias = bias.unflatten(1, (groups, -1)) if isinstance(bias, torch.Tensor) else bias
    if groups == heads:
        query = query.transpose(1, 2)
    elif as_queries:
        # The heads of a group look at the same keys.
        query, bias = query.squeeze(3).transpose(1, 2), None if bias is None else bias.squeeze(3)
    else:
        query = query.permute(0, 3, 1, 2, 4)
        key, value = (one.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1) for one in (key, value))
    output: torch.Tensor = memory_efficient_attention(query, key, value, bias, dropout, scaling)
    return output.transpose(1, 2) if as_queries else output


def xformers_bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask as numbers to add, batch × heads × queries × keys, of which each row begins at a multiple of 16 bytes."""
    keys = mask.shape[-1]
    # Half of the lowest: a kernel multiplies it, and a row that is masked all over must not become infinite.
    lowest = torch.finfo(query.dtype).min / 2
    bias = query.new_zeros(*mask.shape[:-1], -(-keys // 8) * 8)[..., :keys]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, lowest)
    else:
        bias.copy_(mask.clamp(min=lowest))
    return bias.expand(*query.shape[:3], keys)


AttentionInterface.register("xformers", xformers_attention)
AttentionMaskInterface.register("xformers", sdpa_mask)
