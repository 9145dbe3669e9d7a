"""The definition of what head.py computes with, in plain PyTorch: logits a chunk of the vocabulary at a time."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels.compact import gather_torch as gather  # noqa: F401, the third of what this module computes
from allo_kernels.head_parts import word_chunks
from allo_kernels.positions import Positions


@dataclass(frozen=True)
class Head:
    """What does not vary over tokens.

    kernels: the module that computes, this one or head_triton; it has `target_and_lse`, `d_logits` and `gather`.
    target_rows, gradient_rows: how many rows count in forward, in backward at most, where the host knows.
    """

    softcap: float | None
    temperature: float
    positions: Positions | None
    kernels: ModuleType
    target_rows: int | None = None
    gradient_rows: int | None = None


@dataclass(frozen=True)
class Rows:
    """Tokens that count, next to each other: hidden [n, D], targets int32 [n]; backward also lse [n], upstream [n]."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor | None = None
    upstream: Tensor | None = None


def target_and_lse(rows: Rows, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The target's logit, NaN for one outside the vocabulary, and the log of the sum of all exponentials: fp32 [n]."""
    chunks = list(word_chunks(len(rows.targets), weight))
    chosen = torch.full((len(rows.targets),), torch.nan, device=weight.device)
    parts = chosen.new_empty(len(chunks), len(rows.targets))
    for part, (first, last) in zip(parts, chunks, strict=True):
        logits = logits_of(rows.hidden, weight[first:last], None if bias is None else bias[first:last], head)[0]
        torch.logsumexp(logits, 1, out=part)
        row, column = _targets_in(rows, first, last)
        chosen[row] = logits[row, column]
        del logits  # else two chunks are alive while the next is made
    return chosen, parts.logsumexp(0)


def d_logits(rows: Rows, weight: Tensor, bias: Tensor | None, first: int, head: Head) -> Tensor:
    """d (upstream . logps) / d logits [n, columns] in the weight's dtype, of the columns from `first` on."""
    logits, slope = logits_of(rows.hidden, weight, bias, head)
    scale = rows.upstream / head.temperature
    found = logits.sub_(rows.lse[:, None]).exp_().mul_(-scale[:, None])  # d logp / d logit = onehot - softmax
    row, column = _targets_in(rows, first, first + len(weight))
    found[row, column] += scale[row]
    return (found if slope is None else found.mul_(slope)).to(weight.dtype)


def _targets_in(rows: Rows, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The rows whose target is in this range, and where in it."""
    row = ((rows.targets >= first) & (rows.targets < last)).nonzero().squeeze(1)
    return row, rows.targets[row].long() - first


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """fp32 logits [n, columns] and, where they are capped, the derivative of the cap."""
    logits = F.linear(hidden, weight).float()
    if bias is not None:
        logits += bias.float()
    slope = None
    if head.softcap is not None:
        tanh = torch.tanh(logits / head.softcap)
        logits, slope = head.softcap * tanh, 1 - tanh**2
    return logits / head.temperature if head.temperature != 1.0 else logits, slope
