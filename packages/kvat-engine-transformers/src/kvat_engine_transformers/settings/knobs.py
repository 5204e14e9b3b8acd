"""What can be set, and what of it can run here: pure functions of model shape and probe."""

from __future__ import annotations

from collections.abc import Mapping

from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.schema import Knob, KnobValue, ModelShape, Space
from kvat_engine_transformers.settings.caches import (
    CACHES,
    CHUNKED,
    COMPILED,
    GROUP_SIZE,
    GROUPED,
    OF_GENERATE,
    RESIDUAL_LENGTH,
)

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KERNELS = {
    "sdpa_math": "MATH",
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_mem_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
"""Attention value to the member of `torch.nn.attention.SDPBackend` that it forces."""

FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
"""Attention value to the distribution that brings it; Transformers knows it by the value's own name."""

_HALF_ONLY = ("sdpa_flash", "sdpa_cudnn", *FLASH_PACKAGES)
_OF_BATCHES = ("sdpa", "eager", *FLASH_PACKAGES)
"""Attention that `generate_batch` takes; it computes in a thread of its own, which no context of the caller reaches."""
NO_CHUNKS = "off"
PREFILL_CHUNKS = (128, 512, 2048)

PLAIN = {
    "attention": "sdpa",
    "cache": "dynamic",
    "residual_length": str(RESIDUAL_LENGTH),
    "group_size": str(GROUP_SIZE),
    "block_sharing": "off",
    "prefill_chunk": NO_CHUNKS,
    "compile": "off",
    "grad_mode": "no_grad",
}
"""What Transformers does by itself with most models; of all knobs but dtype and threads, which have no default."""

_ANYWHERE = Probe(device="cpu", versions={})
"""For what does not depend on the machine."""
_ANY_MODEL = ModelShape(architecture="any", layers=1, attention=("other",))
"""For what does not depend on the model."""
OWN_THREADS = "own"
"""Value of `threads` that leaves torch the number it takes by itself."""


def space(shape: ModelShape, probe: Probe, threads: int | None) -> tuple[Knob, ...]:
    """All knobs with all values, each unavailable one with its reason.

    Args:
        shape: of the model.
        probe: of the machine.
        threads: CPU threads that the user asked for, None if nobody did.
    """
    return (
        _dtype(shape, probe),
        _attention(shape, probe),
        _cache(shape, probe),
        _residual_length(),
        _group_size(),
        _block_sharing(shape),
        _prefill_chunk(shape),
        _compile(probe),
        _grad_mode(),
        _threads(probe, threads),
    )


def defaults(shape: ModelShape = _ANY_MODEL) -> dict[str, str]:
    """What Transformers does by itself with a model; of one that is not known, what it does with most."""
    return {knob.name: knob.default for knob in space(shape, _ANYWHERE, None)}


def reference(settings: Mapping[str, str], incumbent: Mapping[str, str], shape: ModelShape) -> dict[str, str]:
    """The plainest way to compute the same in the same dtype, with as many threads as the incumbent."""
    return {**defaults(shape), "dtype": settings["dtype"], "threads": incumbent["threads"]}


def in_full_precision(settings: Mapping[str, str], shape: ModelShape) -> dict[str, str]:
    """The same in float32, unless the model is in its own dtype only."""
    full = _dtype(shape, _ANYWHERE).value("float32")
    return {**settings, "dtype": "float32"} if full is not None and full.unavailable is None else dict(settings)


def require_known(settings: Mapping[str, str]) -> None:
    """Refuse settings that these recipes could not carry out as they are.

    Raises:
        UsageError: a knob is missing, or a knob or value is none of this engine's.
    """
    known = {knob.name: knob for knob in space(_ANY_MODEL, _ANYWHERE, None)}
    missing = next((name for name in known if name not in settings), None)
    strange = next(
        (f"{name}={one}" for name, one in settings.items() if name not in known or not _is_value(known[name], one)),
        None,
    )
    if strange is not None:
        raise UsageError(f"this kvat-engine-transformers does not know {strange}; use the version that wrote the plan")
    if missing is not None:
        raise UsageError(f"the plan says nothing of {missing}; use the kvat-engine-transformers that wrote it")


def _is_value(knob: Knob, text: str) -> bool:
    # Any number of threads will do; which of them are worth a trial is a question of the machine.
    is_number = text.isascii() and text.isdigit() and int(text) > 0
    return knob.value(text) is not None or (knob.name == "threads" and is_number)


def check(settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
    """Why this combination of single values that could each run cannot, or None."""
    needed, free = _weight_bytes(settings["dtype"], shape), probe.facts.get("free_bytes")
    if needed is not None and isinstance(free, int) and needed > free:
        return f"{needed / 2**30:.1f} GiB of weights in {settings['dtype']} do not fit the {free / 2**30:.1f} GiB free"
    if _kind(probe) == "cuda" and settings["dtype"] == "float32" and settings["attention"] in _HALF_ONLY:
        return f"{settings['attention']} needs bfloat16 or float16 on cuda"
    on_cuda = _kernel_reason(settings, shape) if _kind(probe) == "cuda" else None
    return on_cuda or _cache_reason(settings, shape, probe)


def _cache_reason(settings: Mapping[str, str], shape: ModelShape, probe: Probe) -> str | None:
    """What a kind of cache does not go together with, by Transformers 5.17 to 5.24.

    Before 5.24 `prepare_inputs_for_generation` takes the mask of a static cache for a tensor, which that of flex
    attention is not.
    """
    cache, attention = settings["cache"], settings["attention"]
    if cache == "paged" and attention not in _OF_BATCHES:
        return f"generate_batch takes no {attention}, only {', '.join(_OF_BATCHES)}"
    if attention == "flex_attention" and CACHES[cache].static and (reason := _reason(probe, "flex_static")):
        return reason
    numbers = None if shape.kv_heads is None or shape.head_dim is None else shape.kv_heads * shape.head_dim
    if cache in GROUPED and numbers is not None and numbers % int(settings["group_size"]):
        return f"groups of {settings['group_size']} do not divide the {numbers} keys of a token in a layer"
    return None


def _kernel_reason(settings: Mapping[str, str], shape: ModelShape) -> str | None:
    """What keeps Transformers from a fused kernel of cuda, by its `integrations.sdpa_attention`, 5.17 to 5.24.

    A step of a static cache always has a mask, and so has a chunk of the prompt after the first one; where there is no
    mask, fewer KV heads are passed on as they are.
    """
    if settings["attention"] == "sdpa_flash" and CACHES[settings["cache"]].static:
        return "PyTorch's flash kernel takes no mask on cuda, and each step of a static cache has one"
    if settings["attention"] == "sdpa_flash" and settings["prefill_chunk"] != NO_CHUNKS:
        return "PyTorch's flash kernel takes no mask on cuda, and each chunk of a prompt after its first has one"
    grouped = (
        shape.kv_heads is not None and shape.attention_heads is not None and shape.kv_heads < shape.attention_heads
    )
    if settings["attention"] == "sdpa_mem_efficient" and grouped:
        return f"the memory-efficient kernel needs as many KV heads as query heads, {shape.architecture} has fewer"
    return None


def _weight_bytes(dtype: str, shape: ModelShape) -> int | None:
    """Bytes of the weights in another dtype than the stored one."""
    if shape.weight_bytes is None or shape.dtype is None:
        return None
    return shape.weight_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[shape.dtype]


def _kind(probe: Probe) -> str:
    return probe.device.partition(":")[0]


def _reason(probe: Probe, fact: str) -> str | None:
    """The probe states what cannot run as text and what can as null."""
    reason = probe.facts.get(fact)
    return None if reason is None else str(reason)


def _limit(shape: ModelShape, fact: str) -> str | None:
    """Why Transformers cannot do something with this architecture, or None."""
    reason = shape.facts.get(fact)
    return None if reason is None else str(reason)


def _dtype(shape: ModelShape, probe: Probe) -> Knob:
    stored = shape.dtype or "float32"

    def value(name: str) -> KnobValue:
        exact = name in (stored, "float32")
        safe = name == stored or (exact and _kind(probe) == "cpu")
        return KnobValue(
            name=name,
            space="safe" if safe else "full",
            lossy=not exact,
            simplicity=int(name != stored),
            unavailable=_packed_reason(shape, name) or _reason(probe, name),
        )

    return Knob(name="dtype", values=tuple(value(name) for name in DTYPES), default=stored)


def _packed_reason(shape: ModelShape, dtype: str) -> str | None:
    if shape.quantization is None or dtype == shape.dtype:
        return None
    return f"the checkpoint is quantised ({shape.quantization}) to be computed with in {shape.dtype}"


def _attention(shape: ModelShape, probe: Probe) -> Knob:
    """What Transformers takes by itself is the default: SDPA, or eager for the architectures that have no SDPA."""
    kind = _kind(probe)
    without_sdpa = shape.facts.get("sdpa")
    unavailable = _unavailable_packages(probe) | (
        dict.fromkeys(("sdpa", *KERNELS), str(without_sdpa)) if without_sdpa else _unavailable_kernels(probe)
    )
    for name in ("sdpa_flash", "flex_attention", "xformers"):
        if limit := _limit(shape, name):
            unavailable.setdefault(name, limit)
    default = "eager" if without_sdpa else "sdpa"

    def value(name: str, simplicity: int, where: Space = "safe", compiles: bool = False) -> KnobValue:
        rank = 0 if name == default else simplicity
        return KnobValue(name=name, space=where, simplicity=rank, compiles=compiles, unavailable=unavailable.get(name))

    return Knob(
        name="attention",
        values=(
            value("sdpa", 1),
            value("eager", 1),
            # On the CPU, flash is what SDPA chooses by itself: a candidate that is most often an alias.
            *(value(name, 2, "default" if (name, kind) == ("sdpa_flash", "cpu") else "safe") for name in KERNELS),
            *(value(name, 2) for name in FLASH_PACKAGES),
            value("flex_attention", 2, "full", compiles=True),
            value("xformers", 2, "full"),
        ),
        default=default,
    )


def _unavailable_packages(probe: Probe) -> dict[str, str]:
    """Attention that comes from elsewhere than PyTorch, and flex attention, which PyTorch compiles."""
    kind = _kind(probe)
    if kind == "cuda":
        facts = {name: _reason(probe, name) for name in (*FLASH_PACKAGES, "xformers")}
        facts["flex_attention"] = _reason(probe, "compile")
    else:
        facts = {name: f"{package} has kernels for cuda only" for name, package in FLASH_PACKAGES.items()}
        facts["xformers"] = "xFormers has kernels for cuda only"
        facts["flex_attention"] = (
            "PyTorch has flex attention for cuda and the CPU only" if kind == "mps" else _reason(probe, "compile")
        )
    return {name: reason for name, reason in facts.items() if reason is not None}


def _unavailable_kernels(probe: Probe) -> dict[str, str]:
    kind = _kind(probe)
    if kind == "cpu":
        return dict.fromkeys(("sdpa_mem_efficient", "sdpa_cudnn"), "PyTorch has this kernel for cuda only")
    if kind == "mps":
        names = ("sdpa_flash", "sdpa_mem_efficient", "sdpa_cudnn")
        return dict.fromkeys(names, "PyTorch has a single fused attention on mps, which sdpa uses")
    return {name: reason for name in KERNELS if (reason := _reason(probe, name)) is not None}


def _cache(shape: ModelShape, probe: Probe) -> Knob:
    simplicity = {"dynamic": 0, "static": 1, "offloaded": 1}
    spaces: dict[str, Space] = {"dynamic": "safe", "static": "safe", "offloaded": "default"}

    def value(name: str) -> KnobValue:
        return KnobValue(
            name=name,
            space=spaces.get(name, "full"),
            lossy=bool(CACHES[name].quantised),
            simplicity=simplicity.get(name, 2),
            unavailable=_cache_unavailable(name, shape, probe),
        )

    return Knob(name="cache", values=tuple(value(name) for name in CACHES), default="dynamic")


def _cache_unavailable(name: str, shape: ModelShape, probe: Probe) -> str | None:
    kind = CACHES[name]
    if kind.offloads and _kind(probe) != "cuda":
        return f"on {_kind(probe)} the cache is in the memory of the host as it is: offloading needs a cuda device"
    sorts = {"paged": kind.implementation is None, "static": kind.static, "quantised": bool(kind.quantised)}
    for sort in (sort for sort, applies in sorts.items() if applies):
        if limit := _limit(shape, sort):
            return limit
    if kind.static and kind.offloads and set(shape.attention) == {"sliding"}:
        return "Transformers offloads no sliding layer of a static cache, and this model has no others"
    if kind.implementation is None:
        return _reason(probe, "paged")
    return _reason(probe, str(kind.quantised["backend"])) if kind.quantised else None


def _residual_length() -> Knob:
    """Newest tokens that a grouped cache keeps unquantised."""
    return _of_groups("residual_length", RESIDUAL_LENGTH, RESIDUAL_LENGTH // 4)


def _group_size() -> Knob:
    """Numbers that share a scale in a grouped cache."""
    return _of_groups("group_size", GROUP_SIZE, GROUP_SIZE // 2)


def _of_groups(name: str, default: int, other: int) -> Knob:
    # Either may lose more than the default does; a cache that is quantised as it is today has been accepted as it is.
    changed = KnobValue(name=str(other), space="full", simplicity=1, lossy=True)
    values = (KnobValue(name=str(default), space="safe"), changed)
    return Knob(name=name, values=values, default=str(default), when={"cache": GROUPED})


def _block_sharing(shape: ModelShape) -> Knob:
    """Whether requests with an equal beginning share the blocks of a paged cache; `generate_batch` does so by itself.

    Off is the default here: a block that one request has filled can be noticed by another one's time to first token.
    """
    off = KnobValue(name="off", space="safe")
    limit = _limit(shape, "block_sharing")
    on = KnobValue(name="on", space="full", simplicity=1, shares_state=True, unavailable=limit)
    return Knob(name="block_sharing", values=(off, on), default="off", when={"cache": ("paged",)})


def _prefill_chunk(shape: ModelShape) -> Knob:
    """Tokens of the prompt per forward call; smaller activations for more calls."""
    limit = _limit(shape, "prefill_chunk")
    chunks = (KnobValue(name=str(one), space="full", simplicity=1, unavailable=limit) for one in PREFILL_CHUNKS)
    whole = KnobValue(name=NO_CHUNKS, space="safe")
    return Knob(name="prefill_chunk", values=(whole, *chunks), default=NO_CHUNKS, when={"cache": CHUNKED})


def _compile(probe: Probe) -> Knob:
    kind = _kind(probe)
    graphs = None if kind == "cuda" else f"works by CUDA graphs, which {kind} does not have"
    alias = None if kind == "cuda" else f"is max-autotune on {kind}, which has no CUDA graphs"
    compiler = "torch.compile for mps is a prototype" if kind == "mps" else _reason(probe, "compile")
    by_itself = None if kind == "cuda" else "generate compiles by itself on cuda only"

    def value(name: str, space: Space, simplicity: int, unavailable: str | None) -> KnobValue:
        return KnobValue(
            name=name, space=space, simplicity=simplicity, compiles=True, unavailable=unavailable or compiler
        )

    values = (
        KnobValue(name="off", space="safe"),
        value("auto", "default", 1, by_itself),
        value("default", "default", 2, None),
        value("reduce-overhead", "default", 3, graphs),
        value("max-autotune", "full", 3, None),
        value("max-autotune-no-cudagraphs", "full", 3, alias),
    )
    return Knob(name="compile", values=values, default="off", when={"cache": COMPILED})


def _grad_mode() -> Knob:
    no_grad = KnobValue(name="no_grad", space="safe")
    inference_mode = KnobValue(name="inference_mode", space="default", simplicity=1)
    # The thread in which generate_batch computes has a mode of its own, before Transformers 5.24; since, the caller's.
    return Knob(name="grad_mode", values=(no_grad, inference_mode), default="no_grad", when={"cache": OF_GENERATE})


def _threads(probe: Probe, asked: int | None) -> Knob:
    """What is used if nobody chooses, and in the full space of a CPU also one, half of the cores, and all of them."""
    default = asked or probe.threads
    cores = probe.facts.get("cores")
    numbers = {default} if default else set()
    if asked is None and default and _kind(probe) == "cpu" and isinstance(cores, int):
        numbers |= {1, max(1, cores // 2), cores}

    def value(number: int) -> KnobValue:
        is_default = number == default
        return KnobValue(name=str(number), space="safe" if is_default else "full", simplicity=int(not is_default))

    values = tuple(value(number) for number in sorted(numbers)) or (KnobValue(name=OWN_THREADS, space="safe"),)
    return Knob(name="threads", values=values, default=str(default or OWN_THREADS))
