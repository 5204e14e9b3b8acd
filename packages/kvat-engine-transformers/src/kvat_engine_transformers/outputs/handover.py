"""A recipe's call as source code: the part of the snippet that users take over, and that is asked for leaks."""

from __future__ import annotations

import ast
import importlib.util
import json
import pprint
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kvat_core.schema import ContextCall, Recipe
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.recipes import BATCHING, SERVED_IN_BATCHES

_GENERATE = '''\
{padding_and_ends}


{seen}


def generate(model, input_ids, max_new_tokens, **options):
    """Generate greedily, as it was measured; every call has a cache of its own.

    `options` go to `model.generate` and come before what was measured: `do_sample=True`, for example, or what a
    `generation_config` sets. Without an `attention_mask`, padding is found as `generate` finds it.{notes}
    """
{body}
'''

_GENERATE_BATCH = '''\
{padding_and_ends}


{seen}


{spare_blocks}


def configured(model, max_new_tokens, options):
    """What a call comes to: the model's own habits, what was measured, and what the caller asks for."""
    served = {served}
    if strange := next((name for name in options if name not in served), None):
        raise TypeError(f"generate_batch does not serve {{strange}}; leave it out, or call model.generate")
    config = copy.deepcopy(model.generation_config)
    # As `generate` does, which takes the 50 likeliest tokens, for example, where nobody says otherwise.
    config.update(**config._get_default_generation_params(), defaults_only=True)
    measured = {generation}
    config.update(**{{**measured, "max_new_tokens": max_new_tokens, **options}})
    return config


def answers(model, input_ids, max_new_tokens, attention_mask=None, **options):
    """Answers of Transformers' continuous batching, in the order of the prompts, with the time of each token.

    `options` change its generation config and come before what was measured, `do_sample=True` for example; those
    that it cannot serve are a TypeError. Where `attention_mask` is 0 there is no token: nothing is padded here. Without
    one, padding is found as `generate` finds it.
    """
    config = configured(model, max_new_tokens, options)
    if attention_mask is None:
        attention_mask = seen(input_ids, model.generation_config, options)
    prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask)]
    if not all(prompts):
        raise ValueError("a prompt has no token; give at least one per prompt")
    pages = -(-(input_ids.shape[1] + max_new_tokens) // {page_tokens})
    # Left to itself, the pool takes nearly all the memory that is free.
    batching = ContinuousBatchingConfig(
        page_size={page_tokens},
        num_blocks=pages * len(prompts) + spare_blocks(model.config.get_text_config()),
        max_batch_tokens=max(input_ids.shape[1], min(input_ids.numel(), {step_tokens})),
        max_requests_per_batch=len(prompts),
{others}
    )
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, record_timestamps=True
    )
    # It happens in another thread, whose errors stop nothing here.
    failed = [answer.error for answer in found.values() if answer.error is not None]
    if failed:
        raise RuntimeError(failed[0])
    if len(found) < len(prompts):
        raise RuntimeError(f"{{len(prompts) - len(found)}} of {{len(prompts)}} prompts have no answer")
    return list(found.values())


{joined}


{left_out}


def generate(model, input_ids, max_new_tokens, **options):
    """Generate greedily, as it was measured; every call has a pool of its own.

    What it returns is what `model.generate` returns. `options` as in `answers`.
    """
    asked = {{name: value for name, value in options.items() if name != "attention_mask"}}
    if lacking := left_out(model, configured(model, max_new_tokens, asked)):
        raise ValueError(f"{{lacking}}; set that to None, or call model.generate")
    found = answers(model, input_ids, max_new_tokens, **options)
    return joined(input_ids, [answer.generated_tokens for answer in found], model.generation_config, options)
'''

_COMPILES = """

    The first call compiles, and so does the first one of another length; what was measured is one length at a time,
    compiled."""

_STATIC = """

    Transformers makes no static cache shorter than the longest one of the model before: after a long call, a short
    one takes as much memory, and more time than was measured."""

_WITH_CACHE = """\
# Outside inference mode its tensors cannot be changed in place: of ids there is a copy, a cache is made without.
with_cache = any(one.get("return_dict_in_generate") for one in (options, asked, vars(model.generation_config)))\
"""

_OF_THE_PROMPTS = ("page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch")


def source(shown: Recipe, step_tokens: int) -> str:
    """`generate(model, input_ids, max_new_tokens, **options)`, which returns prompt and output ids, batch × tokens.

    Args:
        shown: the recipe; lengths come from the call, everything else is as it says.
        step_tokens: of several prompts, those that continuous batching computes at a time.
    """
    if shown.call == "generate_batch":
        return _generate_batch(shown, step_tokens)
    carried = {name: _function("calling/rows.py", name) for name in ("padding_and_ends", "seen")}
    return _GENERATE.format(**carried, body="\n".join(_body(shown)), notes="".join(_notes(shown)))


def imported(shown: Recipe, step_tokens: int) -> Any:
    """The same as a module that was written to a file and imported from there, as users import their snippet."""
    lines, names = imports(shown)
    of_transformers = [f"from transformers import {', '.join(names)}"] if names else []
    always = ["from typing import Any", *(f"import {name}" for name in ("copy", "math", "torch"))]
    text = "\n".join([*always, *lines, *of_transformers, source(shown, step_tokens)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "handed_over.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None, "a file that is there"
        assert spec.loader is not None, "a Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def imports(shown: Recipe) -> tuple[list[str], list[str]]:
    """What `source` needs beside torch, Any, and for batches copy and math: whole lines, and names of transformers."""
    if shown.call == "generate_batch":
        return [], ["ContinuousBatchingConfig", "GenerationConfig"]
    lines = []
    if reading.forced_kernel(shown) is not None:
        lines.append("from torch.nn.attention import SDPBackend, sdpa_kernel")
    return lines, [*(["CompileConfig"] if "compile_config" in shown.arguments else []), "GenerationConfig"]


def literal(value: object) -> str:
    """JSON-like data as Python source."""
    text = pprint.pformat(value, width=80, sort_dicts=False)
    return text.replace("'", '"')


def _generate_batch(shown: Recipe, step_tokens: int) -> str:
    config = reading.batching(shown)
    assert config is not None, "recipes of generate_batch size their pool"
    others = {name: value for name, value in config.items() if name not in _OF_THE_PROMPTS}
    generation = {name: value for name, value in shown.arguments.items() if name not in (BATCHING, "max_new_tokens")}
    return _GENERATE_BATCH.format(
        page_tokens=config["page_size"],
        step_tokens=step_tokens,
        generation=literal(generation),
        others="\n".join(f"        {name}={value!r}," for name, value in others.items()),
        seen=_function("calling/rows.py", "seen"),
        joined=_function("calling/rows.py", "joined"),
        left_out=_function("calling/rows.py", "left_out"),
        padding_and_ends=_function("calling/rows.py", "padding_and_ends"),
        served=literal(("num_return_sequences", *SERVED_IN_BATCHES)),
        spare_blocks=_function("settings/sectors.py", "spare_blocks"),
    )


def _function(file: str, name: str) -> str:
    """A function of this package as its source says it."""
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    (node,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return str(ast.get_source_segment(text, node))


def _notes(shown: Recipe) -> Iterator[str]:
    """What callers have to know of some recipes alone."""
    if shown.compiles:
        yield _COMPILES
    if reading.slots(shown) is not None:
        yield _STATIC


def _body(shown: Recipe) -> list[str]:
    measured = {name: value for name, value in shown.arguments.items() if name != "max_new_tokens"}
    setup = [
        *_compile_lines(shown.arguments.get("compile_config")),
        "measured = {",
        '    "attention_mask": seen(input_ids, model.generation_config, options),',
        *(f"    {json.dumps(name)}: {_argument(name, value)}," for name, value in measured.items()),
        "}",
        'asked = vars(options["generation_config"]) if options.get("generation_config") else {}',
        "measured = {name: value for name, value in measured.items() if asked.get(name) is None}",
    ]
    return [f"    {line}" for line in [*setup, *_call_lines(shown)]]


def _call_lines(shown: Recipe) -> list[str]:
    call = "model.generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **{**measured, **options})"
    if not shown.context:
        return [f"return {call}"]
    within = f"with {', '.join(_context(one) for one in shown.context)}:"
    if reading.grad_mode(shown) != "inference_mode":
        return [within, f"    return {call}"]
    return [
        *_WITH_CACHE.splitlines(),
        within,
        f"    output = {call}",
        "return output.clone() if isinstance(output, torch.Tensor) else output",
    ]


def _argument(name: str, value: JsonValue) -> str:
    """Lengths come from the call; everything else is as measured."""
    if name == "max_cache_len":
        return "input_ids.shape[1] + max_new_tokens"
    if name == "compile_config":
        return "compile_config"
    return literal(value)


def _compile_lines(config: JsonValue) -> list[str]:
    if not isinstance(config, Mapping):
        return []
    fields = dict(config)
    lines = [f"compile_config = CompileConfig(mode={json.dumps(fields.pop('mode'))})"]
    return [*lines, *(f"compile_config.{name} = {value}" for name, value in fields.items())]


def _context(call: ContextCall) -> str:
    if call.name == "torch.inference_mode":
        return "torch.inference_mode(not with_cache)"
    return f"sdpa_kernel(SDPBackend.{call.arguments[0]})"
