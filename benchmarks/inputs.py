"""What benchmarks train on: pairs of token ids in three shapes, the same for every contender, and a model from nothing.

    chat     a prompt with one good and one bad response, all three of uneven length: about 450 tokens a pair
    choice   a question and five options of a few tokens, the right one against each of the others: 4 pairs a question
    groups   a problem as of GSM8K with five pairs of its sampled responses, most of which occur in several of them

Lengths are lognormal and cut off at both ends; tokens are drawn evenly from the vocabulary. A user's own rows have the
layout of a run's `pairs.jsonl`: {id, prompt_ids, chosen_ids, rejected_ids}, those of a problem together.
"""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.corpus import Corpus
from allo_fast.device import pick_device
from allo_fast.model.saving import save_model
from allo_fast.runs.rows import read_jsonl

LLAMAS = {  # the shapes of: a small model, Llama-3.2-1B, Llama-3.1-8B
    "11M": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SPECIAL = 3  # token ids below it are a tokenizer's own


@dataclass(frozen=True)
class Length:
    """Tokens: a lognormal distribution, cut off."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        return min(self.most, max(self.least, round(source.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True)
class Shape:
    """Of problems: tokens of their prompts and responses, and which (chosen, rejected) of the responses are pairs."""

    prompt: Length
    response: Length
    responses: int
    pairs: Callable[[random.Random], list[tuple[int, int]]]


def _sampled_pairs(source: random.Random) -> list[tuple[int, int]]:
    """As the stage `pairs` draws them: five of every right response against every wrong one, of six."""
    right = source.randint(2, 4)
    return source.sample([*product(range(right), range(right, 6))], 5)


SHAPES = {
    "chat": Shape(Length(170, 0.35, 32, 512), Length(128, 0.4, 16, 512), 2, lambda _: [(0, 1)]),
    "choice": Shape(
        Length(72, 0.2, 40, 128), Length(4, 0.6, 1, 12), 5, lambda _: [(0, wrong) for wrong in range(1, 5)]
    ),
    "groups": Shape(Length(100, 0.35, 40, 256), Length(120, 0.35, 30, 400), 6, _sampled_pairs),
}


def draw_rows(shape: Shape, count: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """At least `count` pairs, of whole problems."""
    source, rows = random.Random(seed), []

    def tokens(length: Length) -> list[int]:
        return [source.randrange(SPECIAL, vocabulary) for _ in range(length.draw(source))]

    while len(rows) < count:
        prompt, responses = tokens(shape.prompt), [tokens(shape.response) for _ in range(shape.responses)]
        shared = {"id": str(len(rows)), "prompt_ids": prompt}
        for chosen, rejected in shape.pairs(source):
            rows.append({**shared, "chosen_ids": responses[chosen], "rejected_ids": responses[rejected]})
    return rows


def read_rows(path: Path, count: int) -> list[dict]:
    """The first `count` pairs of a run's pairs.jsonl."""
    names = ("id", "prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: row[name] for name in names} for row in islice(read_jsonl(path), count)]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def useful_tokens(rows: Iterable[dict]) -> int:
    """Each distinct prompt once, and its distinct responses once each but for the last token, which predicts nothing.

    What responses begin with in common counts for each of them.
    """
    prompts, responses = set(), set()
    for row in rows:
        prompts.add(prompt := tuple(row["prompt_ids"]))
        responses |= {(prompt, tuple(row[name])) for name in ("chosen_ids", "rejected_ids")}
    return sum(map(len, prompts)) + sum(len(response) - 1 for _, response in responses)


def few_pairs(vocabulary: int) -> Corpus:
    """Four problems of 64 tokens with two responses of 48 each."""
    draw = torch.Generator().manual_seed(0)
    corpus = Corpus()
    for _ in range(4):
        prompt, *responses = (torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in (64, 48, 48))
        corpus.examples.append(tuple(corpus.add(prompt, responses)))
    return corpus


def random_llama(folder: Path, size: str = "11M") -> Path:
    """Of `LLAMAS`, with a tokenizer; a new folder in `folder`. The larger ones have bfloat16 weights."""
    torch.manual_seed(0)
    with torch.device(pick_device("auto")):
        config = LlamaConfig(**LLAMAS[size])
        dtype = torch.float32 if size == "11M" else torch.bfloat16
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    save_model(model, character_tokenizer(), folder / "llama")
    return folder / "llama"
