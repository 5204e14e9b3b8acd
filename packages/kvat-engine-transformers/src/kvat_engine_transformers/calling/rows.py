"""Between `generate` and `generate_batch`: rows of one tensor, and what cannot be taken over.

Snippets carry these functions.
"""

import copy
from typing import Any

import torch
from transformers import GenerationConfig


def padding_and_ends(defaults: GenerationConfig, options: dict[str, object]) -> tuple[Any, list[Any]]:
    """The token that pads, or None, and those that end a sequence, as `generate` finds them."""
    asked = options.get("generation_config")
    configs = ({} if asked is None else vars(asked), vars(defaults))
    found: list[Any] = []
    for name in ("pad_token_id", "eos_token_id"):
        # An argument counts even where it is None; in a config, None leaves it to the next one.
        value = next((one[name] for one in configs if one.get(name) is not None), None)
        value = options.get(name, value)
        found.append(value.tolist() if isinstance(value, torch.Tensor) else value)
    padding, ends = found
    ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    return (ends[0] if padding is None and ends else padding), ends


def seen(input_ids: torch.Tensor, defaults: GenerationConfig, options: dict[str, object]) -> torch.Tensor:
    """Where there are tokens: as `generate` finds it, not where there is padding, unless that ends a sequence, too."""
    padding, ends = padding_and_ends(defaults, options)
    if padding is None or padding in ends:
        return torch.ones_like(input_ids)
    return torch.ne(input_ids, padding).long()


def joined(
    input_ids: torch.Tensor, answers: list[list[int]], defaults: GenerationConfig, options: dict[str, object]
) -> torch.Tensor:
    """Each prompt as it was given, what follows it, and padding up to the longest answer, as `generate` pads."""
    padding, _ = padding_and_ends(defaults, options)
    longest = max(len(ids) for ids in answers)
    padded = [[*ids, *[0 if padding is None else padding] * (longest - len(ids))] for ids in answers]
    # There are several for each prompt where `num_return_sequences` asks for them.
    prompts = input_ids.repeat_interleave(len(answers) // len(input_ids), dim=0)
    return torch.cat([prompts, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def left_out(model: Any, asked: GenerationConfig) -> str | None:
    """What `generate_batch` would leave out of what a config asks for, so that it chose or ended otherwise, or None."""
    config = copy.deepcopy(asked)
    if config.eos_token_id == -1:
        # So nothing is to end a sequence early; generate says that by None.
        config.eos_token_id = None
    if (config.num_beams or 1) > 1:
        return f"generate_batch has no beams, and num_beams is {config.num_beams}"
    for name in ("max_time", "stop_strings"):
        if getattr(config, name) is not None:
            return f"generate_batch does not stop by {name}, which the generation_config sets"
    # As generate does: without tensors of what ends a sequence, some processors would not be made.
    model._prepare_special_tokens(config, True, device=model.device)
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device=model.device)
    for one in processors:
        if not one.supports_continuous_batching:
            return f"generate_batch has no {type(one).__name__}, which the generation_config asks for"
    return None
