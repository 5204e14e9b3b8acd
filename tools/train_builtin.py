"""Train a built-in checkpoint on associative recall: `python tools/train_builtin.py llama`.

Everything is seeded and written into the package's `builtin/` folder. See tools/README.md.
"""

import argparse
import datetime
import json
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from kvat_engine_transformers.model import recall

BUILTIN = (
    Path(__file__).resolve().parents[1] / "packages/kvat-engine-transformers/src/kvat_engine_transformers/model/builtin"
)
SEED = 20
PAIRS = 24
LENGTH = 1024
LONGEST = 1100  # a little beyond what is promised, so that LENGTH is no edge of the training range
WINDOW = 512
TOKENS_PER_STEP = 4096
ANNEAL_STEPS = {"llama": 500, "mistral": 500}
GIVE_UP_STEPS = 20000

SHAPE: dict[str, Any] = {
    "vocab_size": recall.VOCAB,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4352,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "pad_token_id": recall.PAD,
    "bos_token_id": recall.BOS,
    "eos_token_id": recall.EOS,
    "dtype": "float32",
}


def new_model(name: str) -> Any:
    """A model with random weights; its window is the one thing that tells Mistral from Llama."""
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW))


# --- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """How hard the examples of a step are; without pairs it is the copying exercise."""

    pairs: int
    filler: int  # tokens

    @property
    def length(self) -> int:
        """Prompt tokens of an example."""
        return 2 * self.pairs + self.filler + 3  # three: begin mark, query mark, first key


def curriculum() -> list[Stage]:
    """Copying, then more and more pairs, then more and more filler.

    Starting with pairs stayed on a plateau: with few of them the model learned to name the values
    that are left instead of looking one up, and filler only hides what there is to learn.
    """
    longest = LONGEST - 2 * PAIRS - 3
    fillers = [16, 48, 96, 160, 256, 384, 512, 704, longest]
    return [Stage(0, 24), *(Stage(pairs, 0) for pairs in range(8, PAIRS + 1, 4))] + [
        Stage(PAIRS, filler) for filler in fillers
    ]


def draw_stage(rng: random.Random, stage: Stage) -> Stage:
    """Half of the steps train easier examples, so that recall holds at every length before."""
    if stage.pairs == 0:
        return Stage(0, rng.randint(4, stage.filler))
    if stage.filler == 0 or rng.random() < 0.5:
        return stage
    return Stage(rng.randint(4, stage.pairs), rng.randint(0, stage.filler))


def draw_batch(rng: random.Random, stage: Stage, window: int | None) -> tuple[Any, int]:
    """Token ids and the position from which on the next token is to be predicted.

    The walk asks for every pair: a dense loss. Long examples come in smaller batches, so that the
    tokens per step do not grow with the length.
    """
    size = min(24, max(4, TOKENS_PER_STEP // (stage.length + 2 * stage.pairs)))
    if stage.pairs == 0:
        # What follows a token is what followed it before: the skill of which recall is made.
        ids = range(recall.FIRST_KEY, recall.FIRST_TEXT)
        copies = [rng.choices(ids, k=stage.filler) for _ in range(size)]
        return torch.tensor([[recall.BOS, *ids, *ids] for ids in copies]), stage.filler + 1
    examples = [
        recall.build_example(rng, length=stage.length, pairs=stage.pairs, answers=stage.pairs, window=window)
        for _ in range(size)
    ]
    return torch.tensor([example.tokens for example in examples]), stage.length - 1


def train(model: Any, name: str, window: int | None) -> dict[str, Any]:
    """Train in place; returns what happened."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    stages = curriculum()
    passed: list[dict[str, int]] = []
    recent: deque[float] = deque(maxlen=20)
    level, step, anneal, seen = 0, 0, 0, 0
    started = time.monotonic()
    model.train()
    while anneal < ANNEAL_STEPS[name]:
        final = level == len(stages)
        step, anneal = step + 1, anneal + final
        lr = 1e-3 * min(1.0, step / 100) * (1 - (anneal - 1) / ANNEAL_STEPS[name] if final else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        goal = stages[min(level, len(stages) - 1)]
        stage = draw_stage(rng, goal)
        tokens, first = draw_batch(rng, stage, window)
        hidden = model.model(tokens[:, :-1]).last_hidden_state[:, first:]
        logits, wanted = model.lm_head(hidden), tokens[:, first + 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += tokens.numel()
        right = (logits.argmax(-1) == wanted)[:, ::2].float().mean().item()  # values, not keys
        if stage is goal or goal.pairs == 0:
            recent.append(right)
        if step % 50 == 0:
            print(
                f"{name} {time.monotonic() - started:5.0f} s, step {step}: {goal}, "
                f"loss {loss.item():.4f}, recall {sum(recent) / max(1, len(recent)):.4f}",
                flush=True,
            )
        if not final and len(recent) == recent.maxlen and sum(recent) / len(recent) > 0.95:
            passed.append({"pairs": goal.pairs, "filler": goal.filler, "passed_at_step": step})
            recent.clear()
            level += 1
        if step > GIVE_UP_STEPS:
            raise SystemExit(f"{name}: no success after {step} steps, stuck at {goal}")
    model.eval()
    return {
        "curriculum": passed,
        "anneal_steps": anneal,
        "steps": step,
        "tokens": seen,
        "seconds": round(time.monotonic() - started),
    }


# --- evaluation -------------------------------------------------------------------------------


@torch.inference_mode()
def forced_recall(model: Any, examples: list[recall.Example]) -> float:
    """Recall from the logits of one forward pass over prompt and continuation."""
    right = total = 0
    for example in examples:
        logits = model(torch.tensor([example.tokens])).logits[0, list(example.queries)]
        right += (logits.argmax(-1) == torch.tensor(example.answers)).sum().item()
        total += len(example.answers)
    return right / total


def evaluate(model: Any, window: int | None) -> dict[str, Any]:
    """Recall on fresh examples, one pass and generated, and at other lengths than the longest."""
    rng = random.Random(SEED + 1)

    def draw(count: int, length: int, pairs: int, answers: int) -> list[recall.Example]:
        return [
            recall.build_example(rng, length=length, pairs=pairs, answers=answers, window=window) for _ in range(count)
        ]

    examples = draw(200, LENGTH, PAIRS, 8)
    static = recall.greedy(model, cache_implementation="static", disable_compile=True)
    return {
        "examples": len(examples),
        "prompt_tokens": LENGTH,
        "pairs": PAIRS,
        "answers_per_example": 8,
        "recall_teacher_forced": forced_recall(model, examples),
        "recall_generate_dynamic_cache": recall.recall(recall.greedy(model), examples),
        "recall_generate_static_cache": recall.recall(static, examples),
        "recall_teacher_forced_all_pairs": forced_recall(model, draw(200, LENGTH, PAIRS, PAIRS)),
        "recall_by_prompt_tokens": {
            length: forced_recall(model, draw(100, length, min(PAIRS, (length - 3) // 2), 8))
            for length in (32, 64, 128, 256, 384, 512, 640, 768, 896, 1000)
        },
    }


# --- tokenizer --------------------------------------------------------------------------------

SENTENCE_PARTS = (
    "the cache|a short prompt|this model|the first token|every layer|another machine",
    "keeps|reads|writes|compares|remembers|measures|returns|explains|finds|follows",
    "the answer|some of the words|a longer text|what was said before|nothing else",
    "in time|for the next question|with care|on its own|and then stops|when it can",
)


def sentences(count: int = 400) -> list[str]:
    """Plain English enough to learn merges from."""
    rng = random.Random(SEED)
    parts = [[rng.choice(p.split("|")) for p in SENTENCE_PARTS] for _ in range(count)]
    return [" ".join(words).capitalize() + "." for words in parts]


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose ids follow the layout in `recall`: lossless for any text."""
    keys_and_values = [f"<{kind}{n:02}>" for kind in "kv" for n in range(recall.KEYS)]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.train_from_iterator(
        sentences(),
        trainers.BpeTrainer(
            vocab_size=recall.VOCAB,
            special_tokens=[*recall.MARKS, *keys_and_values],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # The trainer makes all of these special. Keys and values are not: they are output to be read.
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(recall.MARKS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in keys_and_values])
    assert tokenizer.get_vocab_size() == recall.VOCAB, "too few sentences for all merges"
    assert tokenizer.token_to_id("<v00>") == recall.FIRST_VALUE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
    )


def main() -> None:
    """Train, evaluate and write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("llama", "mistral"))
    name = parser.parse_args().name
    window = WINDOW if name == "mistral" else None

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = new_model(name)
    history = train(model, name, window)
    quality = evaluate(model, window)
    print(json.dumps(quality, indent=2))

    out = BUILTIN / name
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        pad_token_id=recall.PAD, bos_token_id=recall.BOS, eos_token_id=recall.EOS
    )
    model.save_pretrained(out)
    new_tokenizer().save_pretrained(out)
    provenance = {
        "command": f"python tools/train_builtin.py {name}",
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "window": window,
        "training": history,
        "evaluation": quality,
    }
    (out / "training.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
