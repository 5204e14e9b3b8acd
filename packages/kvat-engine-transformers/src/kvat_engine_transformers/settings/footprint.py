"""What a candidate keeps alive in memory: tensors counted by hand, as the modelling code makes them.

Per token of a prompt, in numbers of the model's dtype, with R = residual width, I = MLP width, Q = query heads ·
head dimension. Everywhere in a layer there are alive: the embeddings (a frame above holds them), the layer's input
and a normalised copy of it, 3·R, and the tables of rotary positions, two head dimensions. The widest moments are

- the gated MLP, which also holds the residual after attention: R + activated gate, up and product, 3·I;
- the rotation of the queries: they, their product with the cosine, the half-turned ones, and their product, 4·Q;
- attention that materialises scores, see `_scores`.

One of them is the peak, and the KV cache comes on top. Verified by following every tensor of real calls, and by the
resident size of processes (benchmarks/memory_prediction.py); on the CPU alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvat_core.schema import Footprint, ModelShape, Scenario
from kvat_engine_transformers.settings.caches import CACHES
from kvat_engine_transformers.settings.knobs import DTYPE_BYTES, NO_CHUNKS, OWN_THREADS

_FLOAT_BYTES = 4
_VERIFIED = ("llama", "mistral", "qwen3")
"""Architectures whose layers were followed; another one may hold more, so nothing is said of it."""
_MATERIALISED = ("eager", "sdpa_math")
_FOLLOWED = {
    "attention": ("sdpa", "sdpa_flash", *_MATERIALISED),
    "cache": ("dynamic", "static"),
    "prefill_chunk": (NO_CHUNKS,),
    "compile": ("off",),
}
"""Values with which tensors were followed."""


def footprint(settings: Mapping[str, str], scenario: Scenario, shape: ModelShape, device: str) -> Footprint | None:
    """What follows from settings; activations only where they are verified: on the CPU, uncompiled.

    None where the model is spread over devices, as the shape does not tell which holds what; where its weights are
    packed, as it does not tell how much of them is unpacked when; and where the cache is offloaded, as most of it is in
    the memory of the host.
    """
    if CACHES[settings["cache"]].offloads:
        return None
    if shape.facts.get("devices", 1) != 1 or shape.quantization is not None:
        return None
    element_bytes = DTYPE_BYTES[settings["dtype"]]
    known = (
        device == "cpu"
        and shape.architecture in _VERIFIED
        and all(settings[knob] in values for knob, values in _FOLLOWED.items())
    )
    layer = _Layer.of(shape, element_bytes) if known else None
    return Footprint(
        dtype=settings["dtype"],
        element_bytes=element_bytes,
        kv_element_bytes=_kv_element_bytes(settings, element_bytes),
        reserved_tokens=scenario.total_tokens if CACHES[settings["cache"]].static else None,
        prefill_bytes=None if layer is None else layer.prefill_bytes(settings, scenario),
        step_bytes=None if layer is None else layer.step_bytes(settings, scenario),
        threads=None if settings["threads"] == OWN_THREADS else int(settings["threads"]),
    )


def _kv_element_bytes(settings: Mapping[str, str], element_bytes: int) -> float:
    """Of a quantised cache its packed numbers, with their share of scale and zero point, where these are per group."""
    kind = CACHES[settings["cache"]]
    if not kind.quantised:
        return element_bytes
    bits = kind.quantised.get("nbits")
    return 1 if bits is None else int(str(bits)) / 8 + 2 * element_bytes / int(settings["group_size"])


class _Layer:
    """One layer at work; numbers per token unless their name says otherwise."""

    def __init__(self, shape: ModelShape, element_bytes: int, widths: tuple[int, int, int, int, int, int]) -> None:
        self._residual, self._mlp, self._vocabulary, self._heads, kv_heads, head_dim = widths
        self._element_bytes = element_bytes
        self._window = shape.sliding_window
        self._windowed_layers = shape.attention.count("sliding")
        self._masks = len(set(shape.attention))
        self._head_dim = head_dim
        self._queries = self._heads * head_dim
        self._keys = kv_heads * head_dim
        # Keys and values, once for each query head that shares them.
        self._repeats = 2 * self._queries if self._queries > self._keys else 0
        # Else SDPA with the mask of unfilled slots repeats them in each step.
        self._packs_queries = bool(shape.facts.get("packs_queries", True))

    @classmethod
    def of(cls, shape: ModelShape, element_bytes: int) -> _Layer | None:
        """None where the shape does not tell all widths."""
        widths = (shape.hidden_size, shape.mlp_size, shape.vocab_size)
        heads = (shape.attention_heads, shape.kv_heads, shape.head_dim)
        known = [width for width in (*widths, *heads) if width is not None]
        if len(known) < len(widths) + len(heads) or "other" in shape.attention:
            return None
        residual, mlp, vocabulary, attention_heads, kv_heads, head_dim = known
        return cls(shape, element_bytes, (residual, mlp, vocabulary, attention_heads, kv_heads, head_dim))

    def prefill_bytes(self, settings: Mapping[str, str], scenario: Scenario) -> int:
        tokens, numbers = scenario.prompt_tokens, self._element_bytes
        always = 3 * self._residual + 2 * self._head_dim
        pointwise = max(self._residual + 3 * self._mlp, 4 * self._queries) * tokens * numbers
        attention = self._attention_bytes(settings, scenario)
        lasting = self._lasting_mask_bytes(settings, tokens) + self._behind_windows_bytes(settings, tokens)
        return scenario.batch_size * (always * tokens * numbers + lasting + max(pointwise, attention))

    def step_bytes(self, settings: Mapping[str, str], scenario: Scenario) -> int:
        """The logits with their copy in float32; and a growing cache holds one layer's keys twice for a moment.

        Transformers before 5.23 repeats those of a static one for every query head; its `pack_gqa` ended that.
        """
        positions = scenario.total_tokens - 1
        logits = self._vocabulary * (self._element_bytes + _FLOAT_BYTES)
        if settings["cache"] == "static" and settings["attention"] != "eager":
            repeated = 0 if self._packs_queries else self._repeats * scenario.total_tokens * self._element_bytes
            return scenario.batch_size * (logits + repeated)
        copied = max(self._keys, self._repeated(settings)) * positions * self._element_bytes
        return scenario.batch_size * (logits + copied)

    def _repeated(self, settings: Mapping[str, str]) -> int:
        return self._repeats if settings["attention"] in _MATERIALISED else 0

    def _attention_bytes(self, settings: Mapping[str, str], scenario: Scenario) -> int:
        """Of attention itself, where it holds more than the fused kernel does without a mask, else 0."""
        tokens = scenario.prompt_tokens
        if settings["attention"] == "eager":
            slots = scenario.total_tokens if settings["cache"] == "static" else tokens
            return self._eager_bytes(tokens, slots, settings)
        if settings["attention"] == "sdpa_math":
            return self._math_bytes(tokens)
        if self._is_masked(tokens):
            # The kernel turns the mask into numbers; queries, output, and repeated keys and values.
            return (tokens * tokens + (2 * self._queries + self._repeats) * tokens) * (self._element_bytes)
        return 0

    def _eager_bytes(self, tokens: int, slots: int, settings: Mapping[str, str]) -> int:
        """Scores twice: with and without scale; half dtypes have the softmax in float32, before and after."""
        score_bytes = 2 * _FLOAT_BYTES + (self._element_bytes if self._element_bytes < _FLOAT_BYTES else 0)
        others = self._queries * tokens + self._repeated(settings) * slots
        return self._heads * tokens * slots * score_bytes + others * self._element_bytes

    def _math_bytes(self, tokens: int) -> int:
        """All in float32: scores with and without mask, the mask, scaled queries, keys and values for each head.

        Half dtypes are converted first, and what was converted stays.
        """
        pairs = tokens * tokens
        converted = (self._queries + 2 * self._keys) * tokens if self._element_bytes < _FLOAT_BYTES else 0
        in_float = (2 * self._heads + 1) * pairs + 3 * self._queries * tokens + converted
        return in_float * _FLOAT_BYTES + self._queries * tokens * self._element_bytes

    def _lasting_mask_bytes(self, settings: Mapping[str, str], tokens: int) -> int:
        """Masks that live as long as the prefill: of numbers for eager attention, of truth values for a window."""
        if settings["attention"] == "eager":
            return self._masks * tokens * tokens * self._element_bytes
        return tokens * tokens if self._is_masked(tokens) else 0

    def _behind_windows_bytes(self, settings: Mapping[str, str], tokens: int) -> int:
        """What a growing cache keeps of a prompt beyond its windows: it slices, and the first step frees the rest."""
        if settings["cache"] == "static" or self._window is None:
            return 0
        cut = max(0, tokens - self._window)
        return self._windowed_layers * 2 * self._keys * cut * self._element_bytes

    def _is_masked(self, tokens: int) -> bool:
        """A window that a prompt fills is the one thing that a causal kernel cannot do without a mask."""
        return self._window is not None and tokens >= self._window
