"""Answers of several prompts in one tensor, as `generate` returns them. Snippets carry the text of this module."""

import torch
from transformers import GenerationConfig


def joined(
    input_ids: torch.Tensor, answers: list[list[int]], defaults: GenerationConfig, options: dict[str, object]
) -> torch.Tensor:
    """Each prompt as it was given, what follows it, and padding up to the longest answer.

    As `generate` does, it pads by the token for that, else by one that ends a sequence; what is in `options` comes
    before the `defaults`.
    """
    own = (defaults.pad_token_id, options.get("eos_token_id"), defaults.eos_token_id)
    padding = next((one for one in (options.get("pad_token_id"), *own) if one is not None), 0)
    if isinstance(padding, (list, tuple)):
        padding = padding[0]
    longest = max(len(ids) for ids in answers)
    padded = [[*ids, *[padding] * (longest - len(ids))] for ids in answers]
    # There are several for each prompt where `num_return_sequences` asks for them.
    prompts = input_ids.repeat_interleave(len(answers) // len(input_ids), dim=0)
    return torch.cat([prompts, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
