"""Learning: DPO whose rejected side keeps only its key tokens, training the selected weights only.

    L = -log sigmoid(beta [ sum_t rho_t(chosen) - sum_{t in S} rho_t(rejected) ]),  rho = logp - ref
    S = the fraction epsilon of the rejected tokens with the lowest rho, chosen anew every step
    `allo-fast learn CONFIG`

Policy and reference both start from the forgetting stage's output. Departs from the release: the fraction is of the
response's tokens, not of the padded batch. Writes model/ and delta.safetensors (over the base model).
"""

from collections.abc import Generator

from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.method.delta import Delta
from allo_fast.method.objectives import Dpo
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.driving import train
from allo_fast.stages.models import frozen_reference, prompts_of, save_trained, sparse_policy
from allo_fast.training.engine import Trainer


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, protocol, forgotten = unit.config.learn, unit.config.protocol, unit.needed("forget")
    prompts = prompts_of(unit.config, load_tokenizer(forgotten / "model"))
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / "pairs.jsonl"))
    policy = sparse_policy(unit, forgotten / "model", settings, after=Delta.load(forgotten / "delta.safetensors"))
    objective = Dpo(settings.beta, settings.epsilon, settings.label_smoothing, protocol)
    trainer = Trainer(
        policy,
        corpus,
        objective,
        settings,
        unit.folder,
        seed=unit.seed,
        protocol=protocol,
        zero=unit.zero,
        reference=frozen_reference(unit, settings.reference),
    )
    facts = yield from train(unit, trainer)
    save_trained(unit, policy, prompts)
    policy.save_delta(unit.folder / "delta.safetensors", before=forgotten / "delta.safetensors")
    trainer.backend.close()
    return facts
