"""Checkpoints whose weights are stored packed: their kind, and whether they can be loaded here as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from kvat_core.errors import UsageError


def kind(config: PreTrainedConfig) -> str | None:
    """Method of the quantisation, with what it says of its numbers; None where weights are stored as plain ones."""
    stored = _stored(config)
    if stored is None:
        return None
    bits = stored.get("bits") or next((bits for bits in (4, 8) if stored.get(f"load_in_{bits}bit")), None)
    words = (stored.get("quant_method"), stored.get("format"), bits and f"{bits} bits")
    return " ".join(str(word) for word in words if word)


def require_loadable(model_id: str, config: PreTrainedConfig, device: str, options: Mapping[str, str]) -> None:
    """Refuse a quantised checkpoint whose library is missing, or that Transformers would not put on this device.

    Raises:
        UsageError: what is missing, in Transformers' words; or that the device needs a map.
    """
    if device != "cpu" and "device_map" not in options:
        # Kernels are chosen where the weights are loaded, which is the CPU without a map.
        raise UsageError(
            f"{model_id} is quantised ({kind(config)}), and Transformers loads it on {device} by a map only; add "
            "--engine-option device_map=sequential"
        )
    try:
        quantizer = AutoHfQuantizer.from_config(_stored(config) or {}, pre_quantized=True)
        quantizer.validate_environment(device_map=options.get("device_map"), weights_only=True)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and error.name:
            words = f"{words}; pip install {error.name.partition('.')[0]}"
        raise UsageError(f"{model_id} is quantised ({kind(config)}) and cannot be loaded: {words}") from error


def packed_by(model: torch.nn.Module) -> str | None:
    """Method by which Transformers has loaded a live model's weights packed; None for plain ones."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else str(getattr(quantizer.quantization_config.quant_method, "value", "unknown"))


def _stored(config: PreTrainedConfig) -> dict[str, Any] | None:
    text = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    return dict(found) if found else None
