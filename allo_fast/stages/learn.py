"""Learning: DPO whose rejected side keeps only its key tokens, training the selected weights only.

    L = -log sigmoid(beta [ sum_t rho_t(chosen) - sum_{t in S} rho_t(rejected) ]),  rho = logp - ref
    S = the fraction epsilon of the rejected tokens with the lowest rho, chosen anew every step
    `learn.loss_type`: other losses of the same sums (method/pair_losses.py)
    `allo-fast learn CONFIG`

Policy and reference both start from the forgetting stage's output, its selected weights from their fp32 values; with
`method: sparse-dpo` from the base, and S is all tokens. Departs from the release: the fraction is of the response's
tokens, not of the padded batch. Writes delta.safetensors (over the base model, of both stages) and, but for
`save_models: none`, model/.
"""

from collections.abc import Generator

from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import objective_of, train, trainer_of
from allo_fast.stages.models import DELTA, base_path, prompts_of, save_trained, sparse_policy
from allo_fast.stages.pairs import PAIRS


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, protocol = unit.config.learn, unit.config.protocol
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / PAIRS), unit.folder)
    start = unit.needed("forget") / DELTA if unit.config.method == "allo" else None
    policy = sparse_policy(unit, settings, start)
    objective = objective_of(settings, unit.config.epsilon, protocol)
    trainer = trainer_of(unit, policy, corpus, objective, settings, protocol=protocol)
    facts = yield from train(unit, trainer)
    save_trained(unit, policy, prompts, start)
    trainer.backend.close()
    return facts
