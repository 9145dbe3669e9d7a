"""Log-probabilities of given responses by a frozen model."""

import numpy as np
import torch

from allo_fast import ranks
from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.stages.models import Inference
from allo_fast.training.reference import micro_batches


@torch.no_grad()
def response_logps(frozen: Inference, chunk: list[dict]) -> list[list[float]]:
    """Of each row {prompt_ids, responses: [{ids}]}, the sum of the log-probabilities of each response's tokens.

    As many forward passes on every rank, where all share a sharded model. The same tokens are computed once: elsewhere
    in the row their sum could differ in its last bit, and a tie would be won.
    """
    corpus, numbers = Corpus(), []
    for row in chunk:
        distinct = list(dict.fromkeys(tuple(response["ids"]) for response in row["responses"]))
        numbers.append(dict(zip(distinct, corpus.add(row["prompt_ids"], map(list, distinct)), strict=True)))
    micros = list(micro_batches(corpus, np.arange(len(corpus.responses)), frozen.layout))
    passes = max(ranks.gather(len(micros))) if frozen.sharded else len(micros)
    sums: dict[int, float] = {}
    for micro in micros + micros[:1] * (passes - len(micros)):
        batch = collate(corpus, [(number,) for number in micro], frozen.layout).to(frozen.model.device)
        sums |= dict(zip(micro, frozen.compute(batch).cpu().double().sum(1).tolist(), strict=True))
    asked = zip(chunk, numbers, strict=True)
    return [[sums[number[tuple(response["ids"])]] for response in row["responses"]] for row, number in asked]
