"""What Transformers cannot do with an architecture, as its class and config tell before anything is tried."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args, get_type_hints

from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvat_engine_transformers.calling import kept

_PAGED_LAYERS = {"full_attention", "sliding_attention"}
_BY_HEAD = {"head_dim", "num_key_value_heads"}
_OWN_ATTENTION = ("diffllama",)
"""Architectures that say that their attention can be exchanged, and compute it themselves all the same."""


def refusal(model: PreTrainedModel) -> str | None:
    """Why there is nothing to tune about the cache of a model, or None.

    Args:
        model: with or without memory for its weights.
    """
    if _is_encoder(model):
        return "is an encoder: its tokens see those after them, so nothing can be kept"
    if not _call(model, "_supports_default_dynamic_cache"):
        return "keeps a cache of its own kind, which Transformers lets nobody choose"
    if not kept.named(inspect.signature(model.forward).parameters):
        return "keeps no keys and values"
    return None


def limits(model: PreTrainedModel, device: str) -> dict[str, str | None]:
    """Reasons by what cannot be done: None where it can.

    Args:
        model: with or without memory for its weights.
        device: that it will run on.
    """
    return {
        "static": _static(model),
        "quantised": _quantised(model),
        "paged": _paged(model),
        "block_sharing": _block_sharing(model),
        "prefill_chunk": _prefill_chunk(model),
        "sdpa_flash": _sdpa_flash(model),
        "flex_attention": _flex_attention(model, device),
        "xformers": _xformers(model),
    }


def _is_encoder(model: PreTrainedModel) -> bool:
    """Some architectures are both, by their config; those with a decoder may have non-causal parts beside it."""
    causal = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    return causal == {False}


def _static(model: PreTrainedModel) -> str | None:
    if model.config.model_type == "gpt_neo":
        return "Transformers cuts the mask of gpt_neo by the cache's length, so that a static one gives other tokens"
    return None


def _quantised(model: PreTrainedModel) -> str | None:
    others = sorted(_layer_types(model) - {"full_attention"})
    if others:
        return f"Transformers quantises full attention only; {model.config.model_type} has {_named(others)} layers"
    return None


def _paged(model: PreTrainedModel) -> str | None:
    architecture, text = model.config.model_type, _text(model)
    if others := sorted(_layer_types(model) - _PAGED_LAYERS):
        return f"generate_batch keeps full and sliding attention only; {architecture} has {_named(others)} layers"
    if not _class_says(model, "_supports_attention_backend"):
        return f"generate_batch exchanges the attention function, which Transformers does not allow for {architecture}"
    if architecture in _OWN_ATTENTION:
        return f"generate_batch exchanges the attention function, and {architecture} calls one of its own"
    if hasattr(text, "kv_lora_rank"):
        return f"generate_batch keeps keys and values by heads; {architecture} has a projection common to them"
    if _BY_HEAD & set(getattr(text, "per_layer_attributes", None) or ()):
        return f"generate_batch takes heads of one size for all layers; those of {architecture} differ"
    return None


def _block_sharing(model: PreTrainedModel) -> str | None:
    if others := sorted(_layer_types(model) - {"full_attention"}):
        architecture = model.config.model_type
        return f"generate_batch shares blocks of full attention only; {architecture} has {_named(others)} layers"
    return None


def _prefill_chunk(model: PreTrainedModel) -> str | None:
    """Chunks go on with the cache that the forward pass before has handed back."""
    hints = get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    outputs = [kind for kind in get_args(hints) or (hints,) if dataclasses.is_dataclass(kind)]
    if outputs and not any(kept.named({field.name for field in dataclasses.fields(one)}) for one in outputs):
        return f"the forward pass of {model.config.model_type} hands back no cache that a second chunk could go on with"
    return None


def _sdpa_flash(model: PreTrainedModel) -> str | None:
    text = _text(model)
    keys = getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0)
    values = getattr(text, "v_head_dim", None)
    if keys and values and keys != values:
        return f"PyTorch's flash kernel takes heads of one size; {model.config.model_type} has {keys} and {values}"
    return None


def _flex_attention(model: PreTrainedModel, device: str) -> str | None:
    architecture = model.config.model_type
    if not _class_says(model, "_supports_flex_attn"):
        return f"Transformers has no flex attention for the architecture {architecture}"
    if device == "cpu" and any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return f"Transformers has no flex attention on the CPU for the attention sinks of {architecture}"
    return None


def _xformers(model: PreTrainedModel) -> str | None:
    architecture = model.config.model_type
    if not _class_says(model, "_supports_attention_backend"):
        return f"Transformers does not let the attention of {architecture} be exchanged for xFormers'"
    if architecture in _OWN_ATTENTION:
        return f"{architecture} calls attention of its own, which cannot be exchanged for xFormers'"
    if getattr(_text(model), "attn_logit_softcapping", None) is not None:
        return f"xFormers' attention does not cap logits, as {architecture} does"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return f"xFormers' attention does not have the attention sinks of {architecture}"
    return None


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(get_layer_types_and_kwargs(_text(model))[0])


def _named(layer_types: list[str]) -> str:
    # What Transformers calls a dummy is a layer that reads the keys of an earlier one.
    return " and ".join("shared" if one == "dummy" else one.replace("_", " ") for one in layer_types)


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _class_says(model: PreTrainedModel, name: str) -> bool:
    return bool(getattr(type(model), name))


def _call(model: PreTrainedModel, name: str) -> bool:
    return bool(getattr(model, name)())
