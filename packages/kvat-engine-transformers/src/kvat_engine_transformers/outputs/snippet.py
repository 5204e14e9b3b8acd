"""The winner's recipe as a script: the same calls that were measured, in plain Transformers code."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvat_core.schema import Plan, PlanModel, Recipe, Scenario
from kvat_engine_transformers.calling import registration
from kvat_engine_transformers.model.naming import BUILTIN, RANDOM
from kvat_engine_transformers.outputs import handover
from kvat_engine_transformers.outputs.handover import literal
from kvat_engine_transformers.settings import reading
from kvat_engine_transformers.settings.recipes import STEP_TOKENS
from kvat_engine_transformers.settings.winner import winners_recipe

_TEMPLATE = '''\
"""{title}

    python snippet.py{usage}

Loads the model as it was measured and, for each scenario of the plan, prints the time to first token and the
decode rate by the plan's definitions. Take `load` and `generate` over into your own code:

    model = load({load_example})
    output = generate(model, tokenizer(text, return_tensors="pt").input_ids.to(model.device), max_new_tokens=128)
{notes}"""

{copy_import}import os
{sys_import}import time
from statistics import median
from typing import Any

# Read when the libraries are imported, so it comes before them. This process fetches nothing.
os.environ.update({environment})

import torch
{imports}
{model_constant}
# Prompt tokens, output tokens, batch size{shortest_too}; by total length, because Transformers keeps the largest
# static cache of a process and would give a shorter scenario the longer one's.
SCENARIOS = {scenarios}
# As in a launch of the plan: calls before the clock, and timed calls whose median counts.
WARMUP = {warmup}
SAMPLES = {samples}


{registration}def load({load_parameter}):
    """Load the model with the measured dtype, attention and threads."""
{load_body}


{generate}

{clock}def measure(model, {shape}):
    """Time calls of an exact length; return the median TTFT and the median decode rate."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    input_ids = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(model.device)
{mask}    ttft_s, decode_tps = [], []
    for _ in range(WARMUP + SAMPLES):
{timed}
        decode_tps.append(batch_size * (output_tokens - 1) / (last_s - first_s))
    return median(ttft_s[WARMUP:]), median(decode_tps[WARMUP:])


def main():
    """Print one line per scenario."""
{check}    model = load({load_call})
    for {shape} in SCENARIOS:
{reset}        ttft_s, decode_tps = measure(model, {shape})
        shape = f"prompt_tokens={{prompt_tokens}} output_tokens={{output_tokens}} batch_size={{batch_size}}"
{shown_shortest}        print(f"{{shape}} ttft_s={{ttft_s:.6f}} decode_tps={{decode_tps:.3f}}")


if __name__ == "__main__":
    main()
'''

_RANDOM_NOTE = """
The weights are random: text is meaningless, speed and memory are those of the architecture.
"""

_CLOCK = '''
class TokenClock:
    """A streamer that notes when tokens reach the host; the first thing it gets is the prompt."""

    def __init__(self):
        self.times_s = []

    def put(self, tokens):
        self.times_s.append(time.perf_counter())

    def end(self):
        pass


'''

_TIMED = """\
        clock = TokenClock()
        start_s = time.perf_counter()
        generate(model, input_ids, output_tokens, eos_token_id=None, streamer=clock, attention_mask=mask)
        first_s, last_s = clock.times_s[1], clock.times_s[-1]
        ttft_s.append(first_s - start_s)"""

_TIMED_BATCH = """\
        start_s = time.perf_counter()
        found = answers(model, input_ids, output_tokens, eos_token_id=-1, attention_mask=mask)
        times_s = [one.timestamps for one in found]
        first_s, last_s = min(one[0] for one in times_s), max(one[-1] for one in times_s)
        ttft_s.append(max(one[0] for one in times_s) - start_s)"""

_MASK = """\
    # Lengths are spread evenly; the shorter prompts are padded on the left.
    lengths = shortest_tokens + torch.arange(batch_size) * (prompt_tokens - shortest_tokens) // max(1, batch_size - 1)
    mask = (torch.arange(prompt_tokens) >= prompt_tokens - lengths[:, None]).long().to(model.device)
"""

_WHOLE = """\
    # No prompt is padded, whatever id is drawn.
    mask = torch.ones_like(input_ids)
"""

_SHOWN_SHORTEST = """\
        shape += f" shortest_prompt_tokens={shortest_tokens}"
"""

_CHECK = """\
    directory = sys.argv[1] if len(sys.argv) > 1 else MODEL
    if not os.path.isdir(directory):
        sys.exit(f"there is no directory {directory}; say where the model is: python snippet.py MODEL_DIRECTORY")
"""

_RESET = """\
        # A second length would otherwise be compiled for variable lengths, which is not what was measured.
        torch.compiler.reset()
"""


def render(plan: Plan) -> str:
    """The script for a plan's winner.

    Raises:
        UsageError: the winner has settings that this version does not know.
    """
    winner, shown = plan.require_winner(), winners_recipe(plan)
    scenarios = sorted(plan.profile.scenarios, key=lambda scenario: scenario.total_tokens)
    batched = shown.call == "generate_batch"
    unequal = any(scenario.shortest_prompt_tokens for scenario in scenarios)
    path = plan.model.id.removeprefix(RANDOM)
    local = path.startswith("./")
    return _TEMPLATE.format(
        title=_prose(f"kvat's choice for {plan.model.id} and profile {plan.profile.name}: {winner.label}."),
        usage=" [MODEL_DIRECTORY]" if local else "",
        notes=_RANDOM_NOTE if plan.model.weights == "random" else "",
        copy_import="import copy\nimport math\n" if batched else "",
        sys_import="import sys\n" if local else "",
        load_example="MODEL_DIRECTORY" if local else "",
        load_parameter="model=MODEL" if local else "",
        load_call="directory" if local else "",
        check=_CHECK if local else "",
        environment=literal(shown.environment),
        imports="\n".join(_imports(plan.model.id, shown)),
        model_constant=_model_constant(path if local else plan.model.id, local),
        scenarios=_scenarios(scenarios, unequal),
        shape=f"prompt_tokens, output_tokens, batch_size{', shortest_tokens' if unequal else ''}",
        shortest_too=", tokens of the shortest prompt" if unequal else "",
        mask=_MASK if unequal else _WHOLE,
        shown_shortest=_SHOWN_SHORTEST if unequal else "",
        reset=_RESET if shown.compiles else "",
        registration=_registration(shown),
        load_body="\n".join([*_threads_line(shown), *_load_body(plan.model, local, shown)]),
        generate=handover.source(shown, STEP_TOKENS),
        clock="" if batched else _CLOCK.lstrip("\n"),
        timed=_TIMED_BATCH if batched else _TIMED,
        # The proof call of a launch warms up as well.
        warmup=1 + shown.warmup_calls(plan.profile.warmup),
        samples=plan.profile.samples,
    )


def _prose(text: str) -> str:
    """A name from outside as one line of a docstring."""
    return " ".join(text.replace("\\", "/").replace('"', "'").split())


def _scenarios(scenarios: Iterable[Scenario], unequal: bool) -> str:
    shapes = [(one.prompt_tokens, one.output_tokens, one.batch_size, one.prompt_lengths[0]) for one in scenarios]
    return literal(shapes if unequal else [shape[:3] for shape in shapes])


def _imports(model_id: str, shown: Recipe) -> list[str]:
    called, loaded = handover.imports(shown), registration.imports(reading.loaded_attention(shown))
    lines, names = [*called[0], *loaded[0]], [*called[1], *loaded[1]]
    if model_id.startswith(RANDOM):
        lines.append("from kvat_engine_transformers import build_random_model, random_path")
    elif model_id.startswith(BUILTIN):
        lines.append("from kvat_engine_transformers import builtin_path")
    if not model_id.startswith(RANDOM):
        names = ["AutoModelForCausalLM", *names]
    if names:
        lines.append(f"from transformers import {', '.join(sorted(names))}")
    return sorted(lines, key=lambda line: line.split()[1])


def _registration(shown: Recipe) -> str:
    code = registration.source(reading.loaded_attention(shown))
    return f"{code}\n\n\n" if code else ""


def _model_constant(model_id: str, local: bool) -> str:
    if local:
        return f"\nMODEL = {json.dumps(model_id)}"
    return f"\nMODEL = {json.dumps(model_id)}" if not model_id.startswith((BUILTIN, RANDOM)) else ""


def _threads_line(shown: Recipe) -> list[str]:
    threads = reading.threads(shown)
    return [] if threads is None else [f"    torch.set_num_threads({threads})"]


def _load_body(model: PlanModel, local: bool, shown: Recipe) -> list[str]:
    dtype, device = f"torch.{shown.load['dtype']}", json.dumps(shown.load["device"])
    attention = json.dumps(reading.loaded_attention(shown))
    named = "model" if local else json.dumps(model.id.removeprefix(BUILTIN).removeprefix(RANDOM))
    if model.id.startswith(RANDOM):
        how = f"dtype={dtype}, device={device}, attention={attention}"
        return [f"    return build_random_model(random_path({named}), {how})"]
    where = f"builtin_path({named})" if model.id.startswith(BUILTIN) else "model" if local else "MODEL"
    options = [where, f"dtype={dtype}", f"attn_implementation={attention}"]
    if model.revision is not None:
        options.append(f"revision={json.dumps(model.revision)}")
    options += ["local_files_only=True", "use_safetensors=True"]
    device_map = reading.device_map(shown)
    if device_map is not None:
        options.append(f"device_map={json.dumps(device_map)}")
    return [
        "    loaded = AutoModelForCausalLM.from_pretrained(",
        *(f"        {option}," for option in options),
        "    )",
        "    return loaded.eval()" if device_map is not None else f"    return loaded.to({device}).eval()",
    ]
