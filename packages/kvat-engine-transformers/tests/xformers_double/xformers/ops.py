"""The attention of xFormers in plain PyTorch, as picky about its inputs as the kernels of xFormers 0.0.35 are."""

from __future__ import annotations

import math

import torch


class LowerTriangularMask:
    """Each query sees the keys up to its own place."""


@torch.library.custom_op("xformers_flash::flash_fwd", mutates_args=())
def _kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """From batch × tokens × heads × head size to the same."""
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    scores = (query.float() @ key.float().transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).contiguous()


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Batch × tokens × heads × head size, or batch × tokens × groups × heads of a group × head size."""
    _check(query, key, value, p)
    causal = isinstance(attn_bias, LowerTriangularMask)
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError("LowerTriangularMask for other keys than queries")
    bias = attn_bias if isinstance(attn_bias, torch.Tensor) else None
    if bias is not None:
        _check_bias(bias, query, key)
    heads = query.shape[2:-1]
    if query.dim() == 5:
        query, key, value = (one.flatten(2, 3) for one in (query, key, value))
        bias = None if bias is None else bias.flatten(1, 2)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _kernel(query, key, value, bias, causal, factor).unflatten(2, heads)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float) -> None:
    if p:
        raise ValueError("dropout while generating")
    if query.dim() not in (4, 5) or {query.dtype} != {key.dtype, value.dtype}:
        raise ValueError("dimensions or dtypes")
    if key.shape[:-1] != value.shape[:-1] or key.shape[0] != query.shape[0] or key.shape[2:] != query.shape[2:]:
        raise ValueError(f"shapes {tuple(query.shape)} {tuple(key.shape)} {tuple(value.shape)}; nothing is broadcast")
    for one in (query, key, value):
        if one.stride(-1) > 1 or one.stride(-2) % 8 or one.shape[-1] % 8:
            raise ValueError(f"strides {one.stride()}")
        if one.dim() == 5 and one.shape[3] > 1 and one.stride(3) and one.stride(2) != one.stride(3) * one.shape[3]:
            raise ValueError(f"groups that do not follow each other: strides {one.stride()}")


def _check_bias(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    if bias.shape != (query.shape[0], *query.shape[2:-1], query.shape[1], key.shape[1]):
        raise ValueError(f"a bias of {tuple(bias.shape)} for queries of {tuple(query.shape)}")
    if bias.dtype != query.dtype:
        raise ValueError(f"a bias in {bias.dtype} for queries in {query.dtype}")
    if bias.stride(-1) > 1 or any(stride * bias.element_size() % 16 for stride in bias.stride()[:-1]):
        raise ValueError(f"a bias with strides {bias.stride()}")
    if bias.data_ptr() % 16:
        raise ValueError("a bias that begins between multiples of 16 bytes")
    # The kernel's exponents are of base two.
    if not torch.isfinite(bias.float() * math.log2(math.e)).all():
        raise ValueError("a bias that becomes infinite, and a row of which nothing is left")
