"""Whole output rows of matrices: selected together, so that the gradient of the other rows is never computed.

A row of a weight [out, ...] is what one output reads; of a vector each entry is one. Its score is the mean of its
entries'; rows are taken from the highest down, as long as the next one still fits.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from allo_fast import ranks
from allo_fast.method.scores import Score, parts
from allo_fast.model.weights import named_weights
from allo_kernels import Positions


def row_lengths(model: nn.Module) -> dict[str, int]:
    """Entries of a row of each weight."""
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in named_weights(model).items()}
    return {name: math.prod(shape[1:]) for name, shape in shapes.items()}


def row_positions(
    scores: Mapping[str, Score], lengths: Mapping[str, int], count: int, skip: int, last: bool
) -> Iterator[tuple[str, Positions]]:
    """Of the rows that fit into `count` entries, after the first that fill `skip`; last: from the lowest up.

    lengths: entries of a row, by tensor. Every rank of a process group calls it together.
    """
    means = {name: _row_means(score, lengths[name]) for name, score in scores.items()}
    every = torch.cat(list(means.values()))
    sizes = torch.cat([torch.full((len(mean),), lengths[name]) for name, mean in means.items()])
    if every.isnan().any():
        raise ValueError("scores: a row's mean is NaN")
    order = every.argsort(descending=not last, stable=True)  # ties: by (name, row)
    filled = sizes[order].cumsum(0)
    before = filled - sizes[order]
    chosen = torch.zeros(len(every), dtype=torch.bool)
    first = int((before < skip).sum())
    start = int(before[first]) if first < len(before) else int(filled[-1])
    chosen[order[first:][filled[first:] - start <= count]] = True
    for (name, score), rows in zip(scores.items(), chosen.split([len(mean) for mean in means.values()]), strict=True):
        begins = rows.nonzero() * lengths[name]
        yield name, Positions.pack((begins + torch.arange(lengths[name])).view(-1), score.numel())


def _row_means(score: Score, length: int) -> Tensor:
    """fp64 [rows] on the CPU."""
    sums = torch.zeros(score.numel() // length, dtype=torch.float64)
    begin, _ = ranks.bounds(score.numel())
    for part in parts(score):
        sums.index_add_(0, torch.arange(begin, begin + len(part)) // length, part.cpu().double())
        begin += len(part)
    return ranks.add_up(sums) / length


def whole_rows(at: Positions, length: int) -> Tensor | None:
    """int64 rows, where the positions are whole rows of a weight [out, length]; else None."""
    if len(at) == 0 or len(at) % length:
        return None
    index = at.unpack().view(-1, length)
    whole = (index[:, 0] % length == 0) & (index[:, -1] - index[:, 0] == length - 1)
    return index[:, 0] // length if bool(whole.all()) else None


class RowLinear(torch.autograd.Function):
    """hidden @ weight.T + bias, differentiable in hidden, bias and the values that lie in some rows of the weight.

    values: fp32 [rows x in], whose gradient is one product of the size of those rows.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, rows)
        return F.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        hidden, weight, rows = ctx.saved_tensors
        d_hidden = upstream @ weight if ctx.needs_input_grad[0] else None
        flat = upstream.reshape(-1, len(weight))
        d_values = (flat.index_select(1, rows).T @ hidden.reshape(-1, weight.shape[1])).float().view(-1)
        d_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return d_hidden, d_values, None, d_bias, None
