"""What training must not spoil, watched while it goes on: how likely responses are that do not train, and whether the
model's own begin to repeat themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean

import numpy as np
import torch

from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.training.reference import Opened, micro_batches

CHANGE = "logps/kept_change"  # nats per token, since the first step
REPEATED = "repeated_change"  # of the mean `repeated`, since the first step
_GRAM = 4
_GOOD = "good"


@dataclass
class Guard:
    """every: steps between two looks. max_drop: nats per token; a mean that fell by more ends training. speak: tokens
    of responses by the model as it is; a mean of `repeated` that rose by more than max_repeated ends training; None: it
    is not asked. Training leaves the weights of the last look that had seen neither."""

    corpus: Corpus
    every: int
    max_drop: float
    speak: Callable[[], list[list[int]]] | None = None
    max_repeated: float = 1.0
    state: dict[str, float] | None = None  # what the first look saw, and the step of the last good one

    @property
    def leaves(self) -> int | None:
        return self.state and self.state.get(_GOOD)

    @torch.no_grad()
    def look(self, made: int, opened: Opened, budget: int) -> dict[str, float]:
        """After `made` steps. budget: tokens of a forward pass, if no response has more. The first look is what later
        ones compare with."""
        corpus, sums = self.corpus, []
        for micro in micro_batches(corpus, np.arange(len(corpus.responses)), opened.layout, budget):
            batch = collate(corpus, [(number,) for number in micro], opened.layout).to(opened.device)
            sums += opened.compute(batch).double().sum(1).tolist()
        seen = {CHANGE: fsum(sums) / len(corpus.responses.tokens.flat)}
        seen |= {REPEATED: fmean(map(repeated, self.speak()))} if self.speak else {}
        self.state = self.state or {**seen}
        changes = {name: value - self.state[name] for name, value in seen.items()}
        self.state |= {} if self.ends(changes) else {_GOOD: made}
        return changes

    def ends(self, seen: dict[str, float]) -> bool:
        is_good = seen.get(CHANGE, 0.0) >= -self.max_drop and seen.get(REPEATED, 0.0) <= self.max_repeated
        return not is_good  # as what is not a number is not


def repeated(tokens: Sequence[int]) -> float:
    """The share of a response's runs of four tokens that it has had before (seq-rep-4 of arXiv 1908.04319)."""
    grams = [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0
