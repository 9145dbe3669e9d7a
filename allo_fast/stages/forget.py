"""Forgetting: push down the unaligned tokens of wrong responses, training the selected weights only.

    L = sum_t w_t (-log sigmoid(-beta (logp_t - ref_t))) / #{t: w_t != 0}
    `allo-fast forget CONFIG`

paper: w_t = 1[reward_t < 0.5], as of tokens that a rewriter would change. release: w_t = reward_t, which weighs the
kept tokens most and contradicts the paper's figure. `forget.guard` watches meanwhile: where right responses lose too
much, or the model's own begin to repeat themselves, forgetting ends with what it was at the look before. Writes
delta.safetensors, with `save_models: all` also model/.
"""

import logging
import random
from collections.abc import Generator, Iterable
from itertools import groupby
from math import fsum
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import Config, UserError
from allo_fast.data.arrays import Ragged
from allo_fast.data.corpus import Corpus
from allo_fast.data.prompts import Prompts
from allo_fast.method.objectives import Npo
from allo_fast.model.generation import greedy_tokens
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import train, trainer_of
from allo_fast.stages.models import base_path, prompts_of, save_trained, sparse_policy
from allo_fast.stages.problems import distinct_responses
from allo_fast.stages.sample import RESPONSES
from allo_fast.training.guard import CHANGE, REPEATED, Guard
from allo_fast.training.metrics import LOG

logger = logging.getLogger(__name__)

_ASKED, _NEW_TOKENS = 8, 64  # of the guard: problems that the model answers, and tokens of an answer, at most


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings, protocol = unit.config.forget, unit.config.protocol
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    rows = read_jsonl(unit.needed("rewards") / "rewards.jsonl")
    corpus, weights = weighted_corpus(rows, threshold_of(unit.config), unit.folder)
    if not corpus.examples:
        raise UserError(f"nothing to forget: no token's reward is below forget.threshold: {settings.threshold}")
    forgotten, tokens = int(np.count_nonzero(weights.flat.values)), len(weights.flat)
    if ranks.is_main() and protocol == "paper" and forgotten > 0.9 * tokens:
        logger.warning(
            "forget.threshold: %s: %d of %d tokens of the responses that are left have a reward below it; "
            "forget.threshold=mean forgets those below their response's own mean",
            settings.threshold,
            forgotten,
            tokens,
        )
    policy = sparse_policy(unit, settings)
    guard = guard_of(unit, prompts, policy.model)
    more = {"protocol": protocol, "token_weights": weights, "guard": guard}
    trainer = trainer_of(unit, policy, corpus, Npo(settings.beta), settings, **more)
    facts = yield from train(unit, trainer)
    save_trained(unit, policy, prompts)
    trainer.backend.close()
    changes = ranks.on_main(lambda: _changes_at(read_jsonl(unit.folder / LOG), trainer.made))
    if guard and ranks.is_main() and guard.ends(changes):
        lost = f"right responses lost {-changes[CHANGE]:.3g} nats a token, forget.guard.max_drop is {guard.max_drop}"
        if -changes[CHANGE] <= guard.max_drop:
            lost = f"the repeated share of greedy responses rose by {changes[REPEATED]:.3g}, "
            lost += f"forget.guard.max_repeated is {guard.max_repeated}"
        logger.warning(
            "forgetting ended after %d of %d steps: %s; what it was after step %d is left; a smaller "
            "forget.learning_rate or forget.threshold forgets less, with smaller forget.guard.steps more of it is left",
            trainer.made,
            len(trainer.steps),
            lost,
            guard.leaves,
        )
    left = ranks.on_main(lambda: trainer.watches.leaves)
    if left not in (None, trainer.made):
        facts |= {"left_step": left}
        changes = ranks.on_main(lambda: _changes_at(read_jsonl(unit.folder / LOG), left))
    return {**facts, **changes, "forgotten_tokens": forgotten, "tokens": tokens}


def _changes_at(rows: Iterable[dict], step: int) -> dict[str, float]:
    """What was seen after a step, as far as its row is there; nothing changed before the first."""
    row = next((row for row in rows if row["step"] == step), {} if step else {CHANGE: 0.0})
    return {name: row[name] for name in (Npo.CHANGE, CHANGE, REPEATED) if name in row}


def guard_of(unit: Unit, prompts: Prompts, model: PreTrainedModel) -> Guard | None:
    """Of right responses to the problems that train, of each at most one, which forgetting never sees; or solutions.
    model: the policy's."""
    settings = unit.config.forget.guard
    if settings is None or unit.config.protocol == "release":
        return None
    rows = read_jsonl(unit.needed("sample") / RESPONSES)
    draw, corpus = random.Random(f"{unit.seed} guard"), Corpus()
    for number in draw.sample(range(len(rows)), len(rows)):
        row = rows[number]
        given = [{"ids": row["solution_ids"]}] if "solution_ids" in row else []
        if right := distinct_responses(row, True) or given:
            corpus.add(row["prompt_ids"], [draw.choice(right)["ids"]], row["id"])
        if len(corpus.responses) == settings.responses:
            break
    if not len(corpus.responses):
        if ranks.is_main():
            logger.warning("forget.guard: no problem has a right response or a solution; nothing is watched")
        return None
    asked = [corpus.prompts[number] for number in range(min(_ASKED, len(corpus.prompts)))]
    new = min(_NEW_TOKENS, unit.config.sample.max_new_tokens)
    sharded = unit.zero is not None and unit.zero.sharded

    def speak() -> list[list[int]]:
        return greedy_tokens(model, asked, prompts.end_tokens, new, sharded)

    speaking = {} if settings.max_repeated is None else {"speak": speak, "max_repeated": settings.max_repeated}
    return Guard(corpus, settings.steps, settings.max_drop, **speaking)


Threshold = float | Literal["mean"] | None


def threshold_of(config: Config) -> Threshold:
    """None where the reward itself is the weight (protocol: release)."""
    return config.forget.threshold if config.protocol == "paper" else None


def token_weights(rewards: list[float], threshold: Threshold) -> list[float]:
    """Of a response's tokens; "mean": 1 below the mean of their rewards (ConfPO's rule, arXiv 2506.08712)."""
    if threshold is None:
        return rewards
    if threshold == "mean":  # in sums, of which equal rewards make an exact one
        return [float(reward * len(rewards) < fsum(rewards)) for reward in rewards]
    return [float(reward < threshold) for reward in rewards]


def weighted_corpus(rows: Iterable[dict], threshold: Threshold, folder: Path | None = None) -> tuple[Corpus, Ragged]:
    """Wrong responses with the weight of each token; those where no token weighs are left out.

    rows: {id, prompt_ids, response_ids, rewards}, those of a problem together. folder: where both lie; None: in memory.
    """
    corpus, every_weight = Corpus.on_disk(folder) if folder else Corpus(), Ragged("f", folder)
    for name, members in groupby(rows, key=itemgetter("id")):
        weighted = [(row, token_weights(row["rewards"], threshold)) for row in members]
        weighted = [(row, weights) for row, weights in weighted if any(weights)]
        if weighted:
            responses = [row["response_ids"] for row, _ in weighted]
            corpus.examples += [(index,) for index in corpus.add(weighted[0][0]["prompt_ids"], responses, name)]
        for _, weights in weighted:
            every_weight.append(weights)
    return corpus, every_weight
