"""The gradient of a linear layer's weight at its selected entries alone, on a CPU in float32.

Each entry is a product of two columns, and few of them cost less than the whole matrix. In bfloat16 and on GPUs, whose
matrix units have no use for single entries, the whole one is faster.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from allo_kernels import Positions

_DENSEST = 0.15  # of a weight's entries; beyond, the whole product takes no longer
_SMALLEST = 1 << 16  # entries; of a smaller weight the whole product takes no longer than the calls
_ROWS = 128  # of activations at a time, which stay in the processor's cache


def pays(weight: Tensor, at: Positions) -> bool:
    """Whether entries alone are less work than the whole gradient."""
    few = len(at) <= _DENSEST * weight.numel() and weight.numel() >= _SMALLEST
    return few and weight.ndim == 2 and weight.device.type == "cpu" and weight.dtype == torch.float32


def sampled_product(left: Tensor, right: Tensor, at: Positions) -> Tensor:
    """(left.T @ right) at some entries -> fp32 [K]; left: fp32 [N, O], right: fp32 [N, I], at: in [O, I], flat."""
    entries = pattern(at, left.shape[1], right.shape[1])
    for begin in range(0, len(left), _ROWS):
        part = slice(begin, begin + _ROWS)
        torch.sparse.sampled_addmm(entries, left[part].T, right[part], out=entries)
    return entries.values()


def pattern(at: Positions, rows: int, columns: int) -> Tensor:
    """Zeros at these entries of a matrix, in CSR."""
    flat = at.unpack()
    begins = torch.searchsorted(flat, torch.arange(rows + 1) * columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # that it is in beta
        return torch.sparse_csr_tensor(begins, flat % columns, torch.zeros(len(at)), (rows, columns))


class SampledLinear(torch.autograd.Function):
    """hidden @ weight.T + bias, differentiable in hidden, bias and the values at some entries of the weight."""

    @staticmethod
    def forward(ctx, hidden: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, at: Positions) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.at = at
        return F.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        hidden, weight = ctx.saved_tensors
        d_hidden = upstream @ weight if ctx.needs_input_grad[0] else None
        flat = upstream.flatten(0, -2)
        d_values = sampled_product(flat, hidden.flatten(0, -2), ctx.at)
        d_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return d_hidden, d_values, None, d_bias, None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what torch's linear layer does, aliases or not."""
    return getattr(type(module), "_without_aliases", type(module)).forward is nn.Linear.forward
