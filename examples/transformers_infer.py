"""Put a plan of the Transformers engine to use: load the model by its settings and continue a text.

    python examples/transformers_infer.py kvat-out/builtin-llama-ci-micro/best_plan.json "a text to continue"

The plan's own code does the loading and the generating, so what runs here is what was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from kvat_core import KvatError, Plan, read_plan, snippet


def main() -> None:
    """Read a plan, load its model, and continue the text."""
    options = _options()
    try:
        plan = read_plan(options.plan)
        code = _module(snippet(plan)["snippet.py"])
    except KvatError as error:
        sys.exit(f"error: {error}")
    local = plan.model.id.removeprefix("random:").startswith("./")
    where = [_directory(plan, options.model_directory)] if local else []
    model = code.load(*where)
    tokenizer = _tokenizer(plan, code, *where)
    prompt = _token_ids(options.text, tokenizer).to(model.device)
    output = code.generate(model, prompt, options.max_new_tokens)
    new_tokens = output[0, prompt.shape[1] :].tolist()
    print(tokenizer.decode(new_tokens) if tokenizer else f"token ids: {new_tokens}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="best_plan.json of a run")
    parser.add_argument("text", help="what to continue")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--model-directory", help="where the model is, if it was tuned from a local directory")
    return parser.parse_args()


def _module(source: str) -> ModuleType:
    """The snippet as a module. It sets environment variables, so nothing may have imported torch before."""
    module = ModuleType("plan_snippet")
    exec(compile(source, "snippet.py", "exec"), module.__dict__)
    return module


def _directory(plan: Plan, given: str | None) -> str:
    """A plan names a local model by the last part of its path only, so that it can be shown to others."""
    if given is None:
        sys.exit(f"error: the plan's model is a local directory ({plan.model.id}); name it with --model-directory")
    return given


def _tokenizer(plan: Plan, code: ModuleType, directory: str | None = None) -> Any:
    """The model's tokenizer; None where the weights are random, since no text belongs to them."""
    from transformers import AutoTokenizer

    scheme, _, name = plan.model.id.partition(":")
    if scheme == "random":
        return None
    if scheme == "builtin":
        return AutoTokenizer.from_pretrained(code.builtin_path(name))
    where = code.MODEL if directory is None else directory
    return AutoTokenizer.from_pretrained(where, revision=plan.model.revision, local_files_only=True)


def _token_ids(text: str, tokenizer: Any) -> Any:
    """One row of token ids; without a tokenizer the text's bytes."""
    import torch

    ids = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
    if not ids:
        sys.exit("error: the model's tokenizer makes no tokens of this text")
    return torch.tensor([ids])


if __name__ == "__main__":
    main()
