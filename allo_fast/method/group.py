"""Selected entries of many weights as one vector, so that one launch serves them all."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allo_kernels import Positions, gather


@dataclass(frozen=True)
class Group:
    """Weights of one dtype and their selected entries as one flat vector [K], so that one launch serves them all."""

    weights: dict[str, nn.Parameter]
    positions: Positions
    values: Tensor | None  # fp32: what trains; None where DeepSpeed holds them in a flat tensor of its own
    originals: Tensor  # in the weights' dtype: the reference's entries

    @classmethod
    def of(cls, weights: dict[str, nn.Parameter], positions: list[Positions]) -> "Group":
        parts = [gather(weight.data, at) for weight, at in zip(weights.values(), positions, strict=True)]
        originals = torch.cat(parts)
        return cls(weights, Positions.cat(positions), originals.to(torch.float32, copy=True), originals)

    @property
    def data(self) -> list[Tensor]:
        # Not `.data`, whose version counter is its own: a backward after an update would not notice.
        return [weight.detach() for weight in self.weights.values()]
