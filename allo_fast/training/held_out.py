"""Pairs that do not train, looked at while others do: whether what is learned holds for them, and when it was best."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.training.divergence import logps_and_kl
from allo_fast.training.examples import Examples
from allo_fast.training.reference import Opened

LOSS = "eval_loss"


@dataclass
class HeldOut:
    """every: steps between two looks. patience: looks in a row whose loss is not below the lowest before training ends;
    None: it goes on. keeps_best: training leaves what had the lowest loss. sparse: the policy that trains, where it is
    sparse: what share of its weights moved is seen then, and how far it is from where it began."""

    examples: Examples
    objective: Preference
    every: int
    patience: int | None = None
    keeps_best: bool = False
    sparse: SparsePolicy | None = None
    state: list[tuple[int, float]] | None = None  # each look's step and loss

    @property
    def best_step(self) -> int | None:
        """The first one with the lowest loss, of which NaN is none; None before the first look."""
        losses = {step: loss if math.isfinite(loss) else math.inf for step, loss in self.state or ()}
        return min(losses, key=losses.__getitem__, default=None)

    @property
    def leaves(self) -> int | None:
        return self.best_step if self.keeps_best else None

    @torch.no_grad()
    def look(self, made: int, opened: Opened, budget: int) -> dict[str, float]:
        """TRL's names; means over all pairs, in the micro-batches that training would have. budget: not its own."""
        self.state = [(step, loss) for step, loss in self.state or [] if step < made]
        if not made:
            return {}
        examples, sums, nats, tokens = self.examples, Counter(), 0.0, 0
        examples.layout = opened.layout
        for step in range(len(examples.epochs[0])):
            for micro in examples.micro_batches(step):
                batch = examples.collate(micro).to(opened.device)
                if self.sparse:
                    logps, kl = logps_and_kl(self.sparse, opened.compute, batch)
                    nats += kl[batch.examples].sum().item()
                    tokens += batch.valid[batch.examples].sum().item()
                else:
                    logps = opened.compute(batch)
                loss, metrics = self.objective(logps, batch.reference, batch)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[f"eval_{name}"] += len(micro) * value.item()
        seen = {name: total / len(examples) for name, total in sums.items()}
        self.state.append((made, seen[LOSS]))
        if self.sparse:
            seen |= {"eval_kl": nats / tokens, "moved": self.sparse.changed() / self.sparse.selected}
        return seen

    def ends(self, seen: dict[str, float]) -> bool:
        """Whether the last looks were all no better than an earlier one; `seen` is in `state` already."""
        if self.patience is None or not self.state:
            return False
        behind = [step for step, _ in self.state if step > self.best_step]
        return len(behind) >= self.patience
