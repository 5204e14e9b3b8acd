"""What can be set, and what of it can run here: pure functions of model shape and probe."""

from __future__ import annotations

from collections.abc import Mapping

from kvat_core.engine import Probe
from kvat_core.errors import UsageError
from kvat_core.schema import Knob, KnobValue, ModelShape, Space

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

KERNELS = {
    "sdpa_math": "MATH",
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_mem_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
}
"""Attention value to the member of `torch.nn.attention.SDPBackend` that it forces."""

_HALF_ONLY = ("sdpa_flash", "sdpa_cudnn")


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
        _cache(),
        _compile(probe),
        _grad_mode(),
        _threads(probe, threads),
    )


def require_known(settings: Mapping[str, str]) -> None:
    """Refuse settings that these recipes could not carry out as they are.

    Raises:
        UsageError: a knob is missing, or a knob or value is none of this engine's.
    """
    any_model = ModelShape(architecture="any", layers=1, attention=("other",))
    known = {knob.name: knob for knob in space(any_model, Probe(device="cpu", versions={}), None)}
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
    return _kernel_reason(settings, shape) if _kind(probe) == "cuda" else None


def _kernel_reason(settings: Mapping[str, str], shape: ModelShape) -> str | None:
    """What keeps Transformers from a fused kernel of cuda, by its `integrations.sdpa_attention`, 5.17 to 5.24.

    A step of a static cache always has a mask; and where there is none, fewer KV heads are passed on as they are.
    """
    if settings["attention"] == "sdpa_flash" and settings["cache"] == "static":
        return "PyTorch's flash kernel takes no mask on cuda, and each step of a static cache has one"
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
            unavailable=_reason(probe, name),
        )

    return Knob(name="dtype", values=tuple(value(name) for name in DTYPES), default=stored)


def _attention(shape: ModelShape, probe: Probe) -> Knob:
    """What Transformers takes by itself is the default: SDPA, or eager for the architectures that have no SDPA."""
    kind = _kind(probe)
    without_sdpa = shape.facts.get("sdpa")
    unavailable = dict.fromkeys(("sdpa", *KERNELS), str(without_sdpa)) if without_sdpa else _unavailable_kernels(probe)
    default = "eager" if without_sdpa else "sdpa"

    def value(name: str, simplicity: int) -> KnobValue:
        # On the CPU, flash is what SDPA chooses by itself: a candidate that is most often an alias.
        where: Space = "default" if (name, kind) == ("sdpa_flash", "cpu") else "safe"
        rank = 0 if name == default else simplicity
        return KnobValue(name=name, space=where, simplicity=rank, unavailable=unavailable.get(name))

    return Knob(
        name="attention",
        values=(value("sdpa", 1), value("eager", 1), *(value(name, 2) for name in KERNELS)),
        default=default,
    )


def _unavailable_kernels(probe: Probe) -> dict[str, str]:
    kind = _kind(probe)
    if kind == "cpu":
        return dict.fromkeys(("sdpa_mem_efficient", "sdpa_cudnn"), "PyTorch has this kernel for cuda only")
    if kind == "mps":
        names = ("sdpa_flash", "sdpa_mem_efficient", "sdpa_cudnn")
        return dict.fromkeys(names, "PyTorch has a single fused attention on mps, which sdpa uses")
    return {name: reason for name in KERNELS if (reason := _reason(probe, name)) is not None}


def _cache() -> Knob:
    dynamic = KnobValue(name="dynamic", space="safe")
    static = KnobValue(name="static", space="safe", simplicity=1)
    return Knob(name="cache", values=(dynamic, static), default="dynamic")


def _compile(probe: Probe) -> Knob:
    kind = _kind(probe)
    graphs = None if kind == "cuda" else f"works by CUDA graphs, which {kind} does not have"
    compiler = "torch.compile for mps is a prototype" if kind == "mps" else _reason(probe, "compile")
    values = (
        KnobValue(name="off", space="safe"),
        KnobValue(name="default", space="default", simplicity=2, compiles=True, unavailable=compiler),
        KnobValue(name="reduce-overhead", space="default", simplicity=3, compiles=True, unavailable=graphs or compiler),
    )
    return Knob(name="compile", values=values, default="off", when={"cache": ("static",)})


def _grad_mode() -> Knob:
    no_grad = KnobValue(name="no_grad", space="safe")
    inference_mode = KnobValue(name="inference_mode", space="default", simplicity=1)
    return Knob(name="grad_mode", values=(no_grad, inference_mode), default="no_grad")


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
