"""A tiny Llama trained on generated arithmetic: the base model of a run that names none.

    L = -mean_t log p(y_t | problem, y_<t)
    `allo-fast pretrain CONFIG`

Not part of the paper; it lets the whole method run, and be measured over seeds, where there is nothing to download.
"""

from collections.abc import Generator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allo_fast.data.arithmetic import arithmetic_row, character_tokenizer
from allo_fast.data.batch import Corpus
from allo_fast.engine import Trainer
from allo_fast.models import pick_device, save_model
from allo_fast.objectives import Sft
from allo_fast.policy import DensePolicy
from allo_fast.runs import Progress, Unit
from allo_fast.stages.common import make_prompts, train


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, tokenizer = unit.config.pretrain, character_tokenizer()
    prompts = make_prompts(unit, tokenizer)
    corpus = Corpus()
    for index in range(settings.problems):
        row = arithmetic_row("train", index)
        problem = prompts.encode_prompt(row["problem"])
        corpus.examples.append(tuple(corpus.add(problem, [prompts.encode_response(row["solution"])])))
    torch.manual_seed(unit.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(pick_device(unit.config.model.device))
    facts = yield from train(unit, Trainer(DensePolicy(model), corpus, Sft(), settings, unit.folder))
    save_model(model.to(getattr(torch, unit.config.model.dtype)), tokenizer, unit.folder / "model")
    return facts
