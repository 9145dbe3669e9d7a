"""Vanilla DPO on all weights: the rival, the result of `method: dpo`, and what `locate.score: delta` ranks.

    L = -log sigmoid(beta [ sum_t rho_t(chosen) - sum_t rho_t(rejected) ]),  rho = logp - ref
    `allo-fast warmup CONFIG`

`warmup.lora`: adapters instead of all weights, merged in the end. Writes model/ in float32, so that updates smaller
than the model's own rounding are kept.
"""

from collections.abc import Generator

from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import objective_of, train, trainer_of
from allo_fast.stages.models import base_path, dense_policy, lora_policy, prompts_of, save_trained
from allo_fast.stages.pairs import PAIRS


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / PAIRS), unit.folder)
    settings = unit.config.warmup
    base = base_path(unit)
    policy = lora_policy(unit, base, settings.lora) if settings.lora else dense_policy(unit, base)
    trainer = trainer_of(unit, policy, corpus, objective_of(settings), settings)
    facts = yield from train(unit, trainer)
    if settings.lora:
        policy.merge()
    save_trained(unit, policy, prompts)
    trainer.backend.close()
    return facts
