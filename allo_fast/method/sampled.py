"""The gradient of a linear layer's or an embedding's weight at its selected entries alone, on a CPU.

Each entry is a product of two columns, and few of them cost less than the whole matrix. Of linear layers in bfloat16,
and on GPUs, whose matrix units have no use for single entries, the whole one is faster. An embedding's whole gradient
is mostly zeros, in any dtype.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from allo_kernels import Positions

_DENSEST = 0.15  # of a weight's entries; beyond, the whole product takes no longer
_SMALLEST = 1 << 16  # entries; of a smaller weight the whole product takes no longer than the calls
_ROWS = 128  # of activations at a time, which stay in the processor's cache

with warnings.catch_warnings():  # torch says once a process that these are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


@dataclass(frozen=True)
class Pattern:
    """Some entries of a matrix, in CSR: int32 begins [rows + 1] in columns [K]. Made once, used in every backward."""

    begins: Tensor
    columns: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, at: Positions, shape: torch.Size) -> "Pattern":
        flat = at.unpack()
        begins = torch.searchsorted(flat, torch.arange(shape[0] + 1) * shape[1], out_int32=True)
        return cls(begins, (flat % shape[1]).int(), shape)

    @property
    def nbytes(self) -> int:
        return self.begins.nbytes + self.columns.nbytes

    def matrix(self, values: Tensor) -> Tensor:
        """With these values [K] at its entries, which stay the caller's."""
        return torch.sparse_csr_tensor(self.begins, self.columns, values, self.shape, check_invariants=False)


def pays(module: nn.Module, weight: Tensor, at: Positions) -> bool:
    """Whether entries alone are less work than the whole gradient of this module's weight."""
    if weight.device.type != "cpu" or weight.numel() < _SMALLEST or len(at) > _DENSEST * weight.numel():
        return False
    return is_plain_embedding(module) or (is_plain_linear(module) and weight.dtype == torch.float32)


def is_small(weight: Tensor) -> bool:
    """Whether calls take longer than what they do, on a CPU."""
    return weight.device.type == "cpu" and weight.numel() < _SMALLEST


def add_product(left: Tensor, right: Tensor, pattern: Pattern, out: Tensor) -> None:
    """(left.T @ right) at some entries, added to `out` fp32 [K]; left: fp32 [N, O], right: fp32 [N, I]."""
    found = pattern.matrix(out)
    for begin in range(0, len(left), _ROWS):
        part = slice(begin, begin + _ROWS)
        torch.sparse.sampled_addmm(found, left[part].T, right[part], out=found)


def add_rows(rows: Tensor, upstream: Tensor, pattern: Pattern, out: Tensor) -> None:
    """The sum of `upstream` [N, D] by `rows` int64 [N], at some entries, added to `out` fp32 [K]."""
    rows, which = rows.unique(return_inverse=True)
    sums = torch.zeros(len(rows), upstream.shape[1]).index_add_(0, which, upstream.float())
    begins = pattern.begins[rows].long()
    counts = pattern.begins[rows + 1] - begins
    before = begins - counts.cumsum(0) + counts
    places = torch.arange(int(counts.sum())) + before.repeat_interleave(counts)
    out[places] += sums[torch.arange(len(rows)).repeat_interleave(counts), pattern.columns[places]]


def _added(add: Callable[..., None], *given: Tensor | Pattern, total: Callable[[], Tensor | None]) -> Tensor | None:
    """What autograd is told: nothing where `add` added to a total that is there, else what it adds to zeros."""
    if (there := total()) is not None:
        return add(*given, there)
    zeros = torch.zeros(len(given[-1].columns))
    add(*given, zeros)
    return zeros


class SampledLinear(torch.autograd.Function):
    """hidden @ weight.T + bias, differentiable in hidden, bias and the values at some entries of the weight.

    total: called in backward, gives what the values' gradient may be added to at once, or None.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, total):
        ctx.save_for_backward(hidden, weight)
        ctx.pattern, ctx.total = pattern, total
        return F.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        hidden, weight = ctx.saved_tensors
        d_hidden = upstream @ weight if ctx.needs_input_grad[0] else None
        flat = upstream.reshape(-1, len(weight))
        d_values = _added(add_product, flat, hidden.reshape(-1, weight.shape[1]), ctx.pattern, total=ctx.total)
        d_bias = flat.sum(0) if ctx.needs_input_grad[3] else None
        return d_hidden, d_values, None, d_bias, None, None


class SampledEmbedding(torch.autograd.Function):
    """Rows of a weight, differentiable in the values at some of its entries; of padding's row nothing trains.

    total: as SampledLinear's.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, values: Tensor, weight: Tensor, padding: int | None, pattern: Pattern, total):
        ctx.save_for_backward(tokens)
        ctx.padding, ctx.pattern, ctx.total = padding, pattern, total
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (tokens,) = ctx.saved_tensors
        if ctx.padding is not None:
            upstream = upstream.masked_fill((tokens == ctx.padding)[..., None], 0)
        d_values = _added(add_rows, tokens.flatten(), upstream.flatten(0, -2), ctx.pattern, total=ctx.total)
        return None, d_values, None, None, None, None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what torch's linear layer does, aliases or not."""
    return plain_class(module).forward is nn.Linear.forward


def is_plain_embedding(module: nn.Module) -> bool:
    """Likewise of torch's embedding without the options that change weights or gradients."""
    plain = plain_class(module).forward is nn.Embedding.forward
    return plain and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Its class as it was before a policy read its weights."""
    return getattr(type(module), "_without_aliases", type(module))
