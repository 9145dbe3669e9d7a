"""What training must not spoil: responses that do not train, whose log-probabilities are watched while it goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum

import numpy as np
import torch
from torch import Tensor

from allo_fast.data.batch import Batch, Corpus, Layout, collate
from allo_fast.training.reference import micro_batches

CHANGE = "logps/kept_change"  # nats per token, since the first step


@dataclass
class Guard:
    """every: steps between two looks. max_drop: nats per token; a mean that fell by more ends training."""

    corpus: Corpus
    every: int
    max_drop: float
    before: float | None = None  # the mean before the first step; a checkpoint keeps it

    @torch.no_grad()
    def look(
        self, compute: Callable[[Batch], Tensor], layout: Layout, device: torch.device, budget: int
    ) -> dict[str, float]:
        """compute: log-probabilities of a batch's responses, of at most `budget` tokens if none has more by itself. The
        first look is what later ones compare with."""
        corpus, sums = self.corpus, []
        for micro in micro_batches(corpus, np.arange(len(corpus.responses)), layout, budget):
            batch = collate(corpus, [(number,) for number in micro], layout).to(device)
            sums += compute(batch).double().sum(1).tolist()
        mean = fsum(sums) / len(corpus.responses.tokens.flat)
        self.before = mean if self.before is None else self.before
        return {CHANGE: mean - self.before}

    def ends(self, seen: dict[str, float]) -> bool:
        return seen.get(CHANGE, 0.0) < -self.max_drop
