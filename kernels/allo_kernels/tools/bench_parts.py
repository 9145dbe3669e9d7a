"""What a benchmark consists of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allo_kernels import Positions

RATIO = 0.05  # of the weights are selected


@dataclass(frozen=True)
class Contender:
    """run: what is timed, or why it cannot run here; bytes: that it moves at least.

    result: the tensors that it computes, from the same inputs as every other contender's; None where it is another
    operation.
    """

    run: Callable[[], object] | str
    bytes: float = 0.0
    result: Callable[[], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Benchmark:
    """contenders: by name, ours first; the last one that has a result is the reference, from which others may differ by
    `tolerance` of its largest number. flops: what the operation needs at least."""

    op: str
    shape: str
    contenders: dict[str, Contender]
    flops: float = 0.0
    tolerance: float = 0.0


def random_positions(size: int, device: torch.device) -> Positions:
    draw = torch.Generator(device).manual_seed(0)
    mask = torch.rand(size, generator=draw, device=device) < RATIO
    return Positions.pack(mask.nonzero().squeeze(1), size)
