"""What the proof says of calls that were made up: of devices that are not here, and of faults that nobody planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvat_core.schema import ModelRef, Recipe, Scenario, Target
from kvat_engine_transformers.calling.batching import Pool
from kvat_engine_transformers.proving import proof
from kvat_engine_transformers.proving.live import Layer
from kvat_engine_transformers.proving.observation import Seen, kernels_of
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.knobs import PLAIN
from kvat_engine_transformers.settings.recipes import PAGE_TOKENS, recipe

SCENARIO = Scenario(prompt_tokens=48, output_tokens=6)
DEVICE = "cuda:0"


def on_cuda(**settings: str) -> Recipe:
    target = Target(model=ModelRef(id="builtin:llama"), device=DEVICE)
    return recipe({**PLAIN, "dtype": "bfloat16", "threads": "1", **settings}, SCENARIO, target)


def seen(made: Recipe, **changes: Any) -> Seen:
    """A call on a card that did what the recipe says."""
    kind = reading.cache_kind(made)
    layer = Layer("StaticLayer" if kind.static else "DynamicLayer", False, 54, "bfloat16", DEVICE)
    found = Seen(
        cache=kind.holds,
        layers=(layer, replace(layer, device="cpu") if kind.offloads else layer),
        pool=None,
        offloads=kind.offloads,
        prompt_tokens=SCENARIO.prompt_tokens,
        prefill_calls=1,
        attention=reading.attention(made),
        kernels=("FLASH_ATTENTION",),
        grad_mode="no_grad",
        dtypes=("bfloat16",),
        packed_by=None,
        devices=(DEVICE,),
        spread=None,
        strays=(),
        threads=1,
        compile="off",
        graphs=1 if made.compiles else 0,
    )
    return replace(found, **changes)


def mismatches(made: Recipe, **changes: Any) -> tuple[str, ...]:
    return proof.compare(seen(made, **changes), made).mismatches


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        # What `get_compiled_call` leaves on a model that was asked for no mode is a config of the default one.
        ({"compile": "auto"}, "reduce-overhead"),
        ({"compile": "default"}, "default"),
        ({"compile": "off"}, "off"),
        ({"cache": "dynamic", "attention": "flex_attention"}, "off"),
    ],
)
def test_the_mode_that_generate_compiles_by_is_the_recipes(settings: dict[str, str], left: str) -> None:
    made = on_cuda(**{"cache": "static", **settings})
    kernels = () if "attention" in settings else ("FLASH_ATTENTION",)
    assert mismatches(made, compile=left, kernels=kernels) == ()
    other = "max-autotune"
    assert mismatches(made, compile=other, kernels=kernels) == (f"compile: the recipe says {left}, it is {other}",)


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_a_cache_of_which_no_layer_has_left_the_device_was_not_offloaded(cache: str) -> None:
    made = on_cuda(cache=cache)
    assert mismatches(made) == ()
    resident = tuple(replace(layer, device=DEVICE) for layer in seen(made).layers if isinstance(layer, Layer))
    assert mismatches(made, layers=resident) == ("offloading: no layer waits in the memory of the host",)


@pytest.mark.parametrize(
    ("blocks", "spare", "wrong"),
    [(1, 0, False), (2, 0, True), (1, 2, True), (3, 2, False), (5, 2, False), (6, 2, True)],
)
def test_a_pool_has_what_the_recipe_says_up_to_whole_sectors(blocks: int, spare: int, wrong: bool) -> None:
    made = on_cuda(cache="paged")
    pool = Pool("PagedAttentionCache", PAGE_TOKENS, blocks, spare, False, 0, "bfloat16", DEVICE, "sdpa")
    told = f"pages: the recipe says 1 blocks and {spare} to spare, there are {blocks}"
    assert mismatches(made, pool=pool, layers=()) == ((told,) if wrong else ())


# Names as profiles of cards have them.
FLASH_2 = ("flash_attn::_flash_attn_forward", "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>")
FLASH_3 = ("flash_attn_3::fwd", "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<X>>>")
FLASH_4 = ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm100FlashAttentionForwardSm100_object_at__tensor0000_0",)
OTHERS = ("aten::mm", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>")


@pytest.mark.parametrize(
    ("version", "names", "others"), [(2, FLASH_2, FLASH_3), (3, FLASH_3, FLASH_4), (4, FLASH_4, FLASH_2)]
)
def test_flash_attention_is_proven_by_what_its_own_package_ran(
    version: int, names: tuple[str, ...], others: tuple[str, ...]
) -> None:
    made = on_cuda(attention=f"flash_attention_{version}")
    for name in names:
        kernels = kernels_of((name, *OTHERS), reading.attention(made))
        assert mismatches(made, kernels=kernels) == ()
    none = kernels_of((*others, *OTHERS), reading.attention(made))
    told = f"kernel: flash_attention_{version} was asked for, none of its kernels ran"
    assert mismatches(made, kernels=none) == (told,)


def test_sdpa_in_place_of_flash_attention_is_seen() -> None:
    made = on_cuda(attention="flash_attention_2")
    kernels = kernels_of(("aten::_scaled_dot_product_flash_attention",), "flash_attention_2")
    assert mismatches(made, kernels=kernels) == ("kernel: flash_attention_2 calls none of SDPA, FLASH_ATTENTION ran",)
