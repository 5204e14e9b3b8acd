"""What torch raises in a call is told by its kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvat_core.engine import EngineError
from kvat_core.schema import FailureKind, PromptSource, Recipe, Scenario
from kvat_engine_transformers import TransformersAdapter

Prepared = Callable[..., tuple[TransformersAdapter, Recipe]]
TEXT = PromptSource(kind="text", value="the quick brown fox jumps over the lazy dog")
SCENARIO = Scenario(prompt_tokens=8, output_tokens=2)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."), "oom_device"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB."), "oom_device"),
        (RuntimeError("HIP out of memory. Tried to allocate 9.00 GiB."), "oom_device"),
        (torch.AcceleratorError("CUDA error: out of memory"), "oom_device"),
        (RuntimeError("HIP error: out of memory"), "oom_device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom_device"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)"), "oom_device"),
        (RuntimeError("Invalid buffer size: 19.38 GiB"), "oom_device"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"), "oom_host"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device_error"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device_error"),
        (RuntimeError("HIP error: an illegal memory access was encountered"), "device_error"),
        (RuntimeError("CppCompileError: C++ compile error"), "unsupported"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_failure_of_a_call_has_its_kind(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: FailureKind
) -> None:
    adapter, _ = prepared("builtin:llama", SCENARIO)

    def fail(**arguments: object) -> None:
        raise error

    prompt = adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)
    monkeypatch.setattr(adapter.model, "generate", fail)
    with pytest.raises(EngineError) as caught:
        adapter.run_decode(prompt, SCENARIO.output_tokens)
    assert caught.value.kind == kind


def test_the_status_of_a_library_breaks_no_device(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = prepared("builtin:llama", SCENARIO)

    def fail(**arguments: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`")

    prompt = adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)
    monkeypatch.setattr(adapter.model, "generate", fail)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
        adapter.run_decode(prompt, SCENARIO.output_tokens)


def test_a_prompt_for_which_there_is_no_room_is_one_of_them(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = prepared("builtin:llama", SCENARIO)

    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "tensor", fail)
    with pytest.raises(EngineError) as caught:
        adapter.make_prompt(TEXT, SCENARIO.prompt_lengths, 1)
    assert caught.value.kind == "oom_device"
