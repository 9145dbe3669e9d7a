"""Vanilla DPO on all weights: the change that `locate` ranks, and the dense rival.

    L = -log sigmoid(beta [ sum_t rho_t(chosen) - sum_t rho_t(rejected) ]),  rho = logp - ref
    `allo-fast warmup CONFIG`

Writes model/ in float32, so that updates smaller than the model's own rounding are kept.
"""

from collections.abc import Generator

from allo_fast.method.objectives import Dpo
from allo_fast.model.loading import load_tokenizer, save_model
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.driving import pair_corpus, train
from allo_fast.stages.models import base_path, dense_policy, frozen_reference, make_prompts
from allo_fast.training.engine import Trainer


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    prompts = make_prompts(unit, load_tokenizer(base_path(unit)))
    corpus = pair_corpus(read_jsonl(unit.needed("pairs") / "pairs.jsonl"), prompts)
    settings = unit.config.warmup
    policy = dense_policy(unit, base_path(unit))
    trainer = Trainer(
        policy,
        corpus,
        Dpo(settings.beta),
        settings,
        unit.folder,
        seed=unit.seed,
        zero=unit.zero,
        reference=frozen_reference(unit, settings.reference),
    )
    facts = yield from train(unit, trainer)
    save_model(policy.model, prompts.tokenizer, unit.folder / "model", policy.full_weights())
    trainer.backend.close()
    return facts
