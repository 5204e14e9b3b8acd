"""The heavy halves of the faulty engines: each hands `generate` another static cache than it asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import JsonValue
from transformers import Cache, DynamicCache

from kvat_engine_transformers import TransformersAdapter
from kvat_engine_transformers.calling.prompts import NONCE_TOKENS

SHARED = slice(NONCE_TOKENS, 2 * NONCE_TOKENS)
"""Positions of another request's tokens: beyond the block in which prompts of one text differ."""


class _Faulty(TransformersAdapter):
    def load_model(
        self, model_id: str, dtype: str | None, device: str, attn_backend: str | None, extra: Mapping[str, JsonValue]
    ) -> None:
        super().load_model(model_id, dtype, device, attn_backend, extra)
        prepare: Any = self.model._prepare_static_cache
        vars(self.model)["_prepare_static_cache"] = lambda *given, **named: self.spoil(prepare(*given, **named))

    @abstractmethod
    def spoil(self, cache: Cache) -> Cache:
        """What is used instead of a new static cache."""


class SecretlyDynamic(_Faulty):
    """See `SecretlyDynamicEngine`."""

    def spoil(self, cache: Cache) -> Cache:
        return DynamicCache(config=self.model.config)


class Forgetful(_Faulty):
    """See `ForgetfulEngine`."""

    def spoil(self, cache: Cache) -> Cache:
        for layer in cache.layers:
            layer.update = _forgetting(layer, layer.update)
        return cache


class Sharing(_Faulty):
    """See `SharingEngine`."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def spoil(self, cache: Cache) -> Cache:
        for index, layer in enumerate(cache.layers):
            layer.update = self._sharing(index, layer.update)
        return cache

    def _sharing(self, index: int, update: Callable[..., Any]) -> Callable[..., Any]:
        def share(keys: torch.Tensor, values: torch.Tensor, *given: Any, **named: Any) -> Any:
            if keys.shape[-2] > 1:
                first = (keys[..., SHARED, :].clone(), values[..., SHARED, :].clone())
                keys, values = keys.clone(), values.clone()
                keys[..., SHARED, :], values[..., SHARED, :] = self._first.setdefault(index, first)
            return update(keys, values, *given, **named)

        return share


def _forgetting(layer: Any, update: Callable[..., Any]) -> Callable[..., Any]:
    def forget(keys: torch.Tensor, values: torch.Tensor, *given: Any, **named: Any) -> Any:
        held_keys, held_values = update(keys, values, *given, **named)
        oldest = layer.get_seq_length() // 10
        for held in (held_keys, held_values):
            held[..., :oldest, :] = 0
        return held_keys, held_values

    return forget
