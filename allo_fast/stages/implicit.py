"""Token rewards by what DPO teaches: r_t = beta (log pi'(y_t) - log pi0(y_t)), on each response's own scale.

    reward_t = sigma((r_t - mean r) / std r): 0.5 is the mean of the response

pi' is the base after DPO on the run's own pairs, of `rewards.ratio` of its weights, located by `linear`.
The signal of SePO (arXiv 2408.13518), RTO (arXiv 2404.18922) and TIS-DPO (arXiv 2410.04350); it needs no gold solution.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from allo_fast.data.batch import Batch
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.method.objectives import Preference
from allo_fast.runs.rows import Rows, read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import train, trainer_of
from allo_fast.stages.gradients import located
from allo_fast.stages.models import base_path, selected_policy
from allo_fast.stages.pairs import PAIRS
from allo_fast.stages.responses import rewarded
from allo_fast.training.reference import Opened


def implicit(unit: Unit, responses: Rows) -> Generator[Progress, None, dict]:
    settings, path = unit.config.rewards.dpo, unit.config.rewards.model or base_path(unit)
    corpus = corpus_of_pairs(read_jsonl(unit.needed("pairs") / PAIRS), unit.folder)
    selection, locating = yield from located(
        unit, path, corpus, Preference(settings.beta), settings, unit.config.rewards.ratio
    )
    policy = selected_policy(unit, path, selection)
    trainer = trainer_of(unit, policy, corpus, Preference(settings.beta), settings)
    facts = yield from train(unit, trainer)

    def score(batch: Batch) -> Tensor:
        logps = policy.response_logps(batch)
        with policy.reference():
            change = logps - policy.response_logps(batch)
        return on_its_own_scale(settings.beta * change, batch.valid)

    yield from rewarded(unit, responses, Opened(score, policy.logps.layout, policy.model.device))
    trainer.backend.close()
    return {**facts, **locating}


def on_its_own_scale(rewards: Tensor, valid: Tensor) -> Tensor:
    """sigma of each response's standard scores, 0.5 where all are equal; rewards fp32 [R, L], valid bool [R, L]."""
    count, rewards = valid.sum(1, keepdim=True), rewards.double()  # where the mean of equal numbers is that number
    mean = (rewards * valid).sum(1, keepdim=True) / count
    deviations = torch.where(valid, rewards - mean, 0.0)
    spread = (deviations.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(spread == 0, 0.0, deviations / spread).sigmoid().float()
