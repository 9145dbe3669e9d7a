"""The losses of a stage's steps, a micro-batch at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.data.batch import Batch
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.model.logps import ResponseLogps
from allo_fast.training.examples import Examples
from allo_fast.training.steps import MicroBatch

Loss = Callable[[Tensor], Tensor]  # of response log-probabilities [R, L]
Part = tuple[MicroBatch, float]  # and its part in the loss of a step


class Losses:
    """divided: ranks divide the micro-batches of a step."""

    def __init__(self, logps: ResponseLogps, examples: Examples, objective: Sft | Npo | Preference, divided: bool):
        self.logps, self.examples, self.objective, self.divided = logps, examples, objective, divided
        examples.layout = logps.layout

    def step(self, number: int) -> list[Part]:
        """Those that this rank computes."""
        micros = self.examples.micro_batches(number)
        counts = {micro: self.examples.count(micro, self.objective.counts) for micro in micros}
        total = max(1, sum(counts.values()))
        shares = self.examples.share(number) if self.divided else [(micro, 1.0) for micro in micros]
        return [(micro, weight * counts[micro] / total) for micro, weight in shares]

    def parts(self) -> list[Part]:
        """Of all steps; a micro-batch has another part where its step is shorter, as an epoch's last."""
        return sorted({part for number in range(len(self.examples.steps)) for part in self.step(number)})

    def of(self, micro: MicroBatch, share: float) -> tuple[Batch, Loss]:
        """On the model's device."""
        batch = self.examples.collate(micro).to(self.logps.model.device)
        return batch, partial(self._loss, share, batch)

    def check(self, compute: Callable[[Batch], Tensor], score: str) -> None:
        """Raises UserError where no loss depends on the model, or one is not finite.

        Looks no further than the first micro-batch whose loss does.
        """
        examples = 0
        for micro in (micro for step in range(len(self.examples.steps)) for micro in self.examples.micro_batches(step)):
            batch, loss = self.of(micro, 1.0)
            examples += len(micro)
            with torch.no_grad():
                logps = compute(batch)
            value = loss(logps.requires_grad_())
            if not value.isfinite():
                raise UserError(f"locate.score: {score}: expected a finite loss at the frozen base, got {value.item()}")
            if value.requires_grad and torch.autograd.grad(value, logps)[0].any():
                return
        raise UserError(
            f"locate.score: {score}: expected a loss that depends on the model, got none in {examples} examples; "
            "do they differ, and does any token, and any loss_weight, weigh?"
        )

    def _loss(self, share: float, batch: Batch, logps: Tensor) -> Tensor:
        reference = logps.detach() if batch.reference is None else batch.reference
        return self.objective(logps, reference, batch)[0] * share
