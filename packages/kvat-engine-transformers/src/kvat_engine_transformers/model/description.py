"""What the files of a model tell before any weights are loaded, and which models are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvat_core.errors import UsageError
from kvat_core.schema import ModelRef, ModelShape
from kvat_engine_transformers.model import architecture, quantisation
from kvat_engine_transformers.model.models import SHAPES, Source, load_tokenizer, resolve
from kvat_engine_transformers.model.widths import NO_COUNTS, mlp_size, parameter_counts
from kvat_engine_transformers.settings.devices import free_bytes, used_devices
from kvat_engine_transformers.settings.knobs import DTYPES

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def describe_model(model: ModelRef, device: str, options: Mapping[str, str]) -> ModelShape:
    """What the files tell without loading weights.

    Raises:
        UsageError: no such model, no model that generates text, or too large for the device.
    """
    source = resolve(model.id, model.revision, model.allow_download)
    if source.kind == "random" and "device_map" in options:
        raise UsageError("device_map spreads a checkpoint, and random weights are made on one device; leave it out")
    devices = used_devices(device, options)
    config = _read_config(model.id, source)
    packed = quantisation.kind(config)
    if source.kind != "random":
        _require_safetensors(model.id, source.path)
    if packed is not None:
        if source.kind == "random":
            raise UsageError(f"{model.id} has the config of a quantised checkpoint; random weights are plain numbers")
        quantisation.require_loadable(model.id, config, device, options)
    text = config.get_text_config(decoder=True)
    _require_attention(model.id, text)
    dtype = _dtype(model.id, config, source)
    skeleton, without_sdpa = _skeleton(config, getattr(torch, dtype))
    _require_cache(model.id, skeleton)
    plain_bytes = sum(parameter.nbytes for parameter in skeleton.parameters())
    # What a packed number takes is known of the files alone; some methods unpack them in memory.
    weight_bytes = plain_bytes if packed is None else _file_bytes(source.path)
    _require_memory(model.id, weight_bytes, devices)
    return ModelShape(
        **_dimensions(skeleton.config),
        mlp_size=mlp_size(skeleton),
        max_context_tokens=_longest_position(text),
        dtype=dtype,
        quantization=packed,
        weight_bytes=weight_bytes if packed is None else None,
        **(parameter_counts(skeleton) if packed is None else NO_COUNTS),
        weights="random" if source.kind == "random" else "checkpoint",
        revision=source.revision,
        local=source.kind == "directory" or (source.kind == "random" and source.path.parent != SHAPES),
        sha256=_digest(source.path) if source.kind in ("builtin", "directory") else None,
        has_tokenizer=load_tokenizer(source) is not None,
        facts={
            "sdpa": without_sdpa,
            "devices": len(devices),
            "packs_queries": hasattr(sdpa_attention, "pack_gqa"),
            **architecture.limits(skeleton, device),
        },
    )


def describe_loaded(model: PreTrainedModel) -> ModelShape:
    """What decides which settings a model that is loaded can be given; nothing of its weights, which are there.

    Raises:
        UsageError: it generates no text, or keeps no cache to tune.
    """
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    if not model.can_generate():
        raise UsageError(f"{name} does not generate text; choose a causal language model")
    _require_decoder_only(name, model.config.is_encoder_decoder)
    _require_attention(name, text)
    _require_cache(name, model)
    without_sdpa = None if type(model)._supports_sdpa else f"Transformers has no SDPA for {model.config.model_type}"
    return ModelShape(
        **_dimensions(model.config),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=quantisation.kind(model.config),
        facts={"sdpa": without_sdpa, **architecture.limits(model, str(model.device))},
    )


def _dimensions(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config alone tells; fields of `ModelShape` of the same names."""
    text = config.get_text_config(decoder=True)
    return {
        "architecture": str(config.model_type),
        "layers": text.num_hidden_layers,
        "attention": _attention_kinds(text),
        "kv_heads": _kv_heads(text),
        "head_dim": _head_dim(text),
        "attention_heads": _attention_heads(text),
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "sliding_window": _window(text),
    }


def _read_config(model_id: str, source: Source) -> PreTrainedConfig:
    file = source.path / "config.json"
    if not file.is_file():
        raise UsageError(f"{model_id} has no config.json; name a directory or repository of a Transformers model")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        _require_text_generation(model_id, data)
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"the config.json of {model_id} cannot be read ({type(error).__name__}); fetch it again"
        ) from error
    return config


def _require_text_generation(model_id: str, config: dict[str, Any]) -> None:
    model_type, architectures = str(config.get("model_type")), config.get("architectures") or []
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise UsageError(f"{model_id} needs code from its repository, which kvat never runs; choose another model")
        raise UsageError(f"this version of transformers does not know the model type {model_type} of {model_id}")
    _require_decoder_only(model_id, bool(config.get("is_encoder_decoder")))
    generating: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    names = generating if isinstance(generating, (tuple, list)) else (generating,)
    if generating is None or (architectures and not set(architectures) & set(names)):
        what = architectures[0] if architectures else model_type
        raise UsageError(f"{model_id} is a {what}, which does not generate text; choose a causal language model")


def _require_decoder_only(name: str, is_encoder_decoder: bool) -> None:
    if is_encoder_decoder:
        raise UsageError(f"{name} is an encoder-decoder; kvat tunes decoder-only models")


def _require_attention(name: str, text: PreTrainedConfig) -> None:
    if not _known(text, "num_attention_heads"):
        raise UsageError(f"{name} has no attention, so it keeps no KV cache to tune; choose a model with attention")


def _require_cache(name: str, model: PreTrainedModel) -> None:
    if refused := architecture.refusal(model):
        raise UsageError(f"{name} {refused}; choose a causal language model with a KV cache")


def _require_safetensors(model_id: str, path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise UsageError(f"{model_id} lacks {len(missing)} of {len(shards)} weight files; fetch it completely")
    elif not (path / "model.safetensors").is_file():
        if any(path.glob("*.bin")):
            raise UsageError(f"{model_id} has pickled weights only, which may run code; convert it to safetensors")
        raise UsageError(f"{model_id} has no model.safetensors; fetch its weights")


def _dtype(model_id: str, config: PreTrainedConfig, source: Source) -> str:
    """What Transformers loads if nobody says otherwise: the config's dtype, else that of the weights."""
    if config.dtype is not None:
        name = str(config.dtype).removeprefix("torch.")
    else:
        name = "float32" if source.kind == "random" else _first_dtype(source.path)
    if name not in DTYPES:
        raise UsageError(f"{model_id} has weights in {name}; choose a checkpoint in one of: {', '.join(DTYPES)}")
    return name


def _first_dtype(path: Path) -> str:
    """Dtype of the first floating-point tensor of a checkpoint."""
    with safe_open(min(path.glob("model*.safetensors")), framework="pt") as file:
        found = (str(file.get_slice(name).get_dtype()) for name in file.keys())  # noqa: SIM118 - not a mapping
        dtype = next((one for one in found if not one.startswith(("I", "U", "BOOL"))), "no floating-point type")
    return _SAFETENSORS_DTYPES.get(dtype, dtype)


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, str | None]:
    """The model without memory for its weights, and why its attention cannot be SDPA, or None.

    As Transformers does where nobody chooses: SDPA is tried, and eager taken where the architecture lacks it.
    """
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"), None
        except ValueError:
            eager = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            return eager, f"Transformers has no SDPA for the architecture {config.model_type}"


def _require_memory(model_id: str, weight_bytes: int, devices: Sequence[str]) -> None:
    free = free_bytes(devices)
    if weight_bytes > free:
        where = " and ".join(devices)
        raise UsageError(
            f"{model_id} has {weight_bytes / 2**30:.1f} GiB of weights and {where} {free / 2**30:.1f} GiB free; "
            "choose a smaller model"
        )


def _attention_kinds(text: PreTrainedConfig) -> tuple[Literal["full", "sliding", "other"], ...]:
    layers: int = text.num_hidden_layers
    # Some models have their last layers use the keys of earlier ones.
    if _latent(text) or getattr(text, "num_kv_shared_layers", None):
        return tuple("other" for _ in range(layers))
    kinds: dict[str, Literal["full", "sliding"]] = {"full_attention": "full", "sliding_attention": "sliding"}
    default = "full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"
    names = getattr(text, "layer_types", None) or [default] * layers
    return tuple(kinds.get(name, "other") for name in names)


def _window(text: PreTrainedConfig) -> int | None:
    return getattr(text, "sliding_window", None) if "sliding" in _attention_kinds(text) else None


def _longest_position(text: PreTrainedConfig) -> int | None:
    """None where positions have no limit, which some configs write as a missing and some as a negative number."""
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def _kv_heads(text: PreTrainedConfig) -> int | None:
    if (
        _latent(text)
        or hasattr(text, "multi_query")  # one head or all of them, by rules of its own
        or _differs_by_layer(text, "num_key_value_heads")
        or _differs_by_layer(text, "num_attention_heads")
    ):
        return None
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _attention_heads(text: PreTrainedConfig) -> int | None:
    return None if _differs_by_layer(text, "num_attention_heads") else int(text.num_attention_heads)


def _head_dim(text: PreTrainedConfig) -> int | None:
    if _latent(text) or _differs_by_layer(text, "head_dim"):
        return None
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


class CacheShape(NamedTuple):
    """What decides how much the cache of a model holds."""

    windows: tuple[int | None, ...]
    """Per layer: positions that it keeps at most, None for all."""
    kv_heads: int
    head_dim: int


def cache_shape(config: PreTrainedConfig) -> CacheShape | None:
    """Layers, heads and windows, or None where they do not tell what is kept: no guess is made."""
    text = config.get_text_config(decoder=True)
    kinds = _attention_kinds(text)
    if "other" in kinds:
        return None
    kv_heads, head_dim = _kv_heads(text), _head_dim(text)
    if kv_heads is None or head_dim is None:
        return None
    window = _window(text)
    return CacheShape(tuple(window if kind == "sliding" else None for kind in kinds), kv_heads, head_dim)


def _latent(text: PreTrainedConfig) -> bool:
    """Whether keys and values are kept as a common projection, whose size heads do not tell."""
    return hasattr(text, "kv_lora_rank")


def _known(text: PreTrainedConfig, name: str) -> bool:
    return _differs_by_layer(text, name) or getattr(text, name, None) is not None


def _differs_by_layer(text: PreTrainedConfig, name: str) -> bool:
    """Such a value cannot be read from the config as a whole: Transformers raises."""
    return name in (getattr(text, "per_layer_attributes", None) or ())


def _file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                sha256.update(block)
    return sha256.hexdigest()
