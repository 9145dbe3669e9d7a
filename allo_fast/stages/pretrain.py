"""A tiny Llama trained on generated arithmetic: the base model of a run that names none.

    L = -mean_t log p(y_t | problem, y_<t)
    `allo-fast pretrain CONFIG`

Not part of the paper; it lets the whole method run, and be measured over seeds, where there is nothing to download.
"""

import random
from collections.abc import Generator

import torch
from transformers import LlamaForCausalLM

from allo_fast.data.arithmetic import arithmetic_row, careless_solution, character_tokenizer
from allo_fast.data.corpus import Corpus
from allo_fast.device import pick_device
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Sft
from allo_fast.model.loading import llama_config
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import train, trainer_of
from allo_fast.stages.models import prompts_of, save_dense


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, tokenizer = unit.config.pretrain, character_tokenizer()
    prompts = prompts_of(unit.config, tokenizer)
    corpus = Corpus()
    for index in range(settings.problems):
        row = arithmetic_row("train", index)
        if random.Random(f"careless {index}").random() < settings.careless:
            row["solution"] = careless_solution(row["problem"])
        encoded = prompts.encode(row["problem"], [row["solution"]])
        corpus.examples.append(tuple(corpus.add(*encoded, f"arithmetic:train:{index}")))
    torch.manual_seed(unit.seed)
    model = LlamaForCausalLM(llama_config(settings)).to(pick_device(unit.config.model.device))
    policy = DensePolicy(model)
    trainer = trainer_of(unit, policy, corpus, Sft(), settings, seed=0)
    facts = yield from train(unit, trainer)
    save_dense(unit, policy, tokenizer, unit.config.model.dtype)
    trainer.backend.close()
    return facts
