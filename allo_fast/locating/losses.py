"""The losses of a stage's steps, a micro-batch at a time."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.data.batch import Batch
from allo_fast.method.objectives import Dpo, Npo, Sft
from allo_fast.model.logps import ResponseLogps
from allo_fast.training.examples import Examples

Loss = Callable[[Tensor], Tensor]  # of response log-probabilities [R, L]
Part = tuple[int, float]  # a micro-batch, and its part in the loss of a step


class Losses:
    """reference: by micro-batch, of another model than the base. divided: ranks divide the micro-batches of a step."""

    def __init__(
        self,
        logps: ResponseLogps,
        examples: Examples,
        objective: Sft | Npo | Dpo,
        reference: Mapping[int, Tensor],
        divided: bool,
    ):
        self.logps, self.examples, self.objective, self.reference = logps, examples, objective, reference
        self.divided = divided
        self.positions, self._counts = [], []
        for batch in map(self._collate, range(len(examples.micro_batches))):
            self.positions.append(batch.input_ids.numel())
            self._counts.append(objective.count(batch))

    def step(self, number: int) -> list[Part]:
        """Those that this rank computes."""
        micros = self.examples.steps[number]
        total = max(1, sum(self._counts[micro] for micro in micros))
        shares = self.examples.share(number) if self.divided else [(micro, 1.0) for micro in micros]
        return [(micro, weight * self._counts[micro] / total) for micro, weight in shares]

    def parts(self) -> list[Part]:
        """Of all steps; a micro-batch has another part where its step is shorter, as an epoch's last."""
        return sorted({part for number in range(len(self.examples.steps)) for part in self.step(number)})

    def of(self, micro: int, share: float) -> tuple[Batch, Loss]:
        """On the model's device."""
        batch = self._collate(micro).to(self.logps.model.device)
        return batch, partial(self._loss, micro, share, batch)

    def check(self, compute: Callable[[Batch], Tensor], score: str) -> None:
        """Raises UserError where no loss depends on the model, or one is not finite.

        Looks no further than the first micro-batch whose loss does.
        """
        for micro in range(len(self.positions)):
            batch, loss = self.of(micro, 1.0)
            with torch.no_grad():
                logps = compute(batch)
            value = loss(logps.requires_grad_())
            if not value.isfinite():
                raise UserError(f"locate.score: {score}: expected a finite loss at the frozen base, got {value.item()}")
            if value.requires_grad and torch.autograd.grad(value, logps)[0].any():
                return
        raise UserError(
            f"locate.score: {score}: expected a loss that depends on the model, got none in {len(self.positions)} "
            "micro-batches; do the examples differ, and does any token weigh?"
        )

    def _loss(self, micro: int, share: float, batch: Batch, logps: Tensor) -> Tensor:
        reference = self.reference.get(micro)
        reference = logps.detach() if reference is None else reference.to(logps.device)
        return self.objective(logps, reference, batch)[0] * share

    def _collate(self, micro: int) -> Batch:
        return self.examples.collate(micro, self.logps.share_prompts)
