"""Forgetting: push down the unaligned tokens of wrong responses, training the selected weights only.

    L = sum_t w_t (-log sigmoid(-beta (logp_t - ref_t))) / #{t: w_t != 0}
    `allo-fast forget CONFIG`

paper: w_t = 1[p_t < 0.5], the tokens a rewriter would change. release: w_t = p_t, which weighs the kept tokens most
and contradicts the paper's figure. Writes delta.safetensors, with `save_models: all` also model/.
"""

from collections.abc import Generator

from allo_fast.config import UserError
from allo_fast.data.batch import Corpus
from allo_fast.method.objectives import Npo
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.driving import train
from allo_fast.stages.models import base_path, frozen_reference, prompts_of, save_trained, sparse_policy
from allo_fast.training.engine import Trainer


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, protocol = unit.config.forget, unit.config.protocol
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    rows = read_jsonl(unit.needed("rewards") / "rewards.jsonl")
    corpus, weights = weighted_corpus(rows, settings.threshold if protocol == "paper" else None)
    if not corpus.examples:
        raise UserError(f"nothing to forget: no token's reward is below forget.threshold {settings.threshold}")
    policy = sparse_policy(unit, settings)
    trainer = Trainer(
        policy,
        corpus,
        Npo(settings.beta),
        settings,
        unit.folder,
        seed=unit.seed,
        protocol=protocol,
        token_weights=weights,
        zero=unit.zero,
        reference=frozen_reference(unit, settings.reference),
    )
    facts = yield from train(unit, trainer)
    save_trained(unit, policy, prompts)
    trainer.backend.close()
    forgotten = sum(weight != 0 for row in weights for weight in row)
    return {**facts, "forgotten_tokens": forgotten, "tokens": sum(map(len, weights))}


def weighted_corpus(rows: list[dict], threshold: float | None) -> tuple[Corpus, list[list[float]]]:
    """Wrong responses with the weight of each token; those where no token weighs are left out.

    rows: {id, prompt_ids, response_ids, rewards}. threshold None: the reward itself is the weight (release).
    """
    by_id: dict[str, list[tuple[list[int], list[float]]]] = {}
    for row in rows:
        weights = row["rewards"] if threshold is None else [float(reward < threshold) for reward in row["rewards"]]
        if any(weights):
            by_id.setdefault(row["id"], []).append((row["response_ids"], weights))
    prompts = {row["id"]: row["prompt_ids"] for row in rows}
    corpus, token_weights = Corpus(), []
    for name, members in by_id.items():
        corpus.examples += [(index,) for index in corpus.add(prompts[name], [ids for ids, _ in members])]
        token_weights += [weights for _, weights in members]
    return corpus, token_weights
