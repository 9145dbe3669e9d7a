"""Supervised fine-tuning: makes of the given model the base of all that follows, where the configuration has `sft`.

    L = -mean_t log p(y_t | prompt, y_<t),  y: the gold solution; where responses are given, each right one
    `allo-fast sft CONFIG`

The paper begins with models after SFT of all weights. Departs from that: `sft.ratio` of the weights train, located by
`linear` with this loss; at 1 all, in float32. One model for all seeds; the first of them draws and shuffles. Writes
model/, whole and in model.dtype, and of a sparse training delta.safetensors over the given model; problems.jsonl and
quarantine.jsonl, as `sample` does.
"""

import random
from collections.abc import Generator, Iterable
from pathlib import Path

from allo_fast.data.corpus import Corpus
from allo_fast.method.objectives import Sft
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import train, trainer_of
from allo_fast.stages.gradients import located_policy
from allo_fast.stages.models import base_path, prompts_of, save_trained
from allo_fast.stages.problems import first_row, right_responses, unit_problems


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, path = unit.config.sft, base_path(unit)
    prompts = prompts_of(unit.config, load_tokenizer(path))
    rows, quarantined = unit_problems(unit, "train", prompts, unit.config.sample.max_new_tokens)
    corpus = corpus_of_right_responses(rows, settings.max_examples, unit.seed, unit.folder)
    policy, locating = yield from located_policy(unit, path, corpus, Sft(), settings, settings.ratio)
    trainer = trainer_of(unit, policy, corpus, Sft(), settings)
    facts = yield from train(unit, trainer)
    save_trained(unit, policy, prompts, dtype=unit.config.model.dtype)
    trainer.backend.close()
    first = first_row(rows, prompts, right_responses)
    return {**facts, **locating, "problems": len(rows), "quarantined": quarantined, "first_row": first}


def corpus_of_right_responses(rows: Iterable[dict], limit: int | None, seed: int, folder: Path | None = None) -> Corpus:
    """Each right response of the rows of `encode_problems` is an example; limit: of these so many, drawn at random.

    folder: where its numbers lie; None: in memory.
    """
    corpus = Corpus.on_disk(folder) if folder else Corpus()
    for row in rows:
        responses = [response["ids"] for response in right_responses(row)]
        corpus.examples += [(index,) for index in corpus.add(row["prompt_ids"], responses, row["id"])]
    if limit is not None and limit < len(corpus.examples):
        return corpus.only(random.Random(seed).sample(range(len(corpus.examples)), limit))
    return corpus
