"""Scores of weights from the gradients of a stage's steps, all taken at the frozen base theta0.

    g_t: the gradient of step t's loss at theta0, in fp32; t = 1..T

linear     |d_T|, what AdamW fed with g_1..g_T would have moved, the linearised warm-up:
             m = b1 m + (1 - b1) g_t    v = b2 v + (1 - b2) g_t^2
             d = d - lr_t (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
           In a short stage at a low rate weights hardly move: to first order every gradient is that at theta0, and d is
           theta' - theta0, by whose magnitude ALLO ranks (arXiv 2406.12606).
snr        |sum_t g_t| / sqrt(sum_t g_t^2), a gradient's signal over its noise; 0 where all are 0
grad_sum   |sum_t g_t|, the best static score of SPEFT (arXiv 2412.13488)
fisher     sum_t g_t^2, the empirical Fisher information, as of FISH masks (arXiv 2111.09839), but of steps

Each keeps `states` fp32 numbers a weight, beside the step's gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from allo_fast.config import TrainConfig
from allo_kernels import masked_adamw_


@dataclass(frozen=True)
class Step:
    """number: from 1. scale: what the gradient is multiplied by, as by clipping; 0-d fp32."""

    number: int
    learning_rate: float
    scale: Tensor


class Family(Protocol):
    states: int
    needs_norm: bool  # does a step's clip scale matter?

    def update(self, states: Sequence[Tensor], gradient: Tensor, step: Step) -> None:
        """In place, of one piece: fp32 [entries] each."""

    def score(self, states: Sequence[Tensor], base: Callable[[], Tensor]) -> Tensor:
        """fp32 [entries]; base: the piece at theta0."""


class Linear:
    """rates: the learning rate of every step."""

    states, needs_norm = 3, True

    def __init__(self, config: TrainConfig, rates: Sequence[float]):
        self.settings = {"beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.adam_epsilon}
        self.decay = config.weight_decay * sum(rates)

    def update(self, states: Sequence[Tensor], gradient: Tensor, step: Step) -> None:
        moved, exp_avg, exp_avg_sq = states
        masked_adamw_(
            moved,
            gradient,
            exp_avg,
            exp_avg_sq,
            step=step.number,
            lr=step.learning_rate,
            weight_decay=0.0,
            grad_scale=step.scale,
            **self.settings,
        )

    def score(self, states: Sequence[Tensor], base: Callable[[], Tensor]) -> Tensor:
        return (states[0] - self.decay * base().float() if self.decay else states[0]).abs()


class Snr:
    states, needs_norm = 2, False

    def update(self, states: Sequence[Tensor], gradient: Tensor, step: Step) -> None:
        states[0].add_(gradient)
        states[1].addcmul_(gradient, gradient)

    def score(self, states: Sequence[Tensor], base: Callable[[], Tensor]) -> Tensor:
        total, squares = states
        return torch.where(squares == 0, 0.0, total.abs() / squares.sqrt())  # what is not finite stays so


class GradSum:
    states, needs_norm = 1, False

    def update(self, states: Sequence[Tensor], gradient: Tensor, step: Step) -> None:
        states[0].add_(gradient)

    def score(self, states: Sequence[Tensor], base: Callable[[], Tensor]) -> Tensor:
        return states[0].abs()


class Fisher:
    states, needs_norm = 1, False

    def update(self, states: Sequence[Tensor], gradient: Tensor, step: Step) -> None:
        states[0].addcmul_(gradient, gradient)

    def score(self, states: Sequence[Tensor], base: Callable[[], Tensor]) -> Tensor:
        return states[0]


FAMILIES = {"linear": Linear, "snr": Snr, "grad_sum": GradSum, "fisher": Fisher}


def make_family(name: str, config: TrainConfig, rates: Sequence[float]) -> Family:
    return Linear(config, rates) if name == "linear" else FAMILIES[name]()
