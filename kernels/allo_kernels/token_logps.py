"""Log-probabilities of target tokens from hidden states, without the logits [N, V] ever existing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from allo_kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_not_capturing,
    check_positive,
    check_shape,
)
from allo_kernels.compact import check_entries, check_weights, gather_torch
from allo_kernels.dispatch import choose
from allo_kernels.positions import SPAN, Positions

IGNORE = -100
# How much of d loss / d logits exists at once: what a CPU's cache holds, and what keeps a GPU's matrix units busy.
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20}
_MIN_COLUMNS = 1024  # narrower matrix products would be slower, however many the rows


@dataclass(frozen=True)
class Head:
    """What does not vary over tokens, and the two functions that look at logits tile by tile."""

    softcap: float | None
    temperature: float
    positions: Positions | None
    target_and_lse: Callable
    d_logits: Callable
    gather: Callable


@dataclass(frozen=True)
class Rows:
    """The tokens that count, next to each other: hidden [n, D], targets [n]; backward also lse [n], upstream [n]."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor | None = None
    upstream: Tensor | None = None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    values: Tensor | None = None,
    positions: Positions | None = None,
    with_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(hidden @ weight.T + bias) / temperature)[n, targets[n]] -> fp32 [N].

    hidden: [N, D]; weight: [V, D], both bf16, fp16 or fp32; targets: int64 [N], -100 for a row that gives 0 and no
    gradient; bias: [V] or None; softcap: z -> softcap * tanh(z / softcap).
    Differentiable for any upstream gradient [N] in hidden, weight and bias, or instead of the whole weight in its
    selected entries: `values` fp32 [K], which must already lie in `weight` at `positions`, get the gradient [K] and no
    [V, D] gradient is made. Backward recomputes logits, works only on rows whose upstream gradient is not zero, and
    makes no product that nobody asked for.
    with_lse: also gives the log-sum-exp of each row's logits, fp32 [N], 0 where the row does not count; no gradient.
    Raises ValueError, naming the argument, for a wrong shape, dtype or device, a weight that is not contiguous,
    targets outside the vocabulary, and values without positions. Forward and backward ask the device which rows count:
    RuntimeError while a CUDA graph is captured.
    """
    check_not_capturing("token_logps")
    _check(hidden, weight, targets, bias, softcap, temperature, values, positions)
    kernels = choose("token_logps", impl, _definition, "token_logps_triton.kernels", hidden.device)
    if values is not None:
        weight = weight.detach()
    head = Head(softcap, float(temperature), positions, *kernels())
    logps, lse = _TokenLogps.apply(hidden, weight, bias, values, targets, head)
    return (logps, lse) if with_lse else logps


@torch.no_grad()
def head_row_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    rows: slice,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """d (upstream . token_logps) / d weight[rows] -> [rows, D] in the weight's dtype, without the logits of others.

    lse: fp32 [N], what token_logps gave `with_lse`; upstream: fp32 [N]; everything else as it was given there. Raises
    ValueError and RuntimeError as token_logps.
    """
    check_not_capturing("head_row_gradient")
    _check(hidden, weight, targets, bias, softcap, temperature, None, None)
    for name, tensor in (("lse", lse), ("upstream", upstream)):
        check_shape(name, tensor, targets.shape)
        check_dtype(name, tensor, torch.float32)
    kernels = choose("token_logps", impl, _definition, "token_logps_triton.kernels", hidden.device)
    head = Head(softcap, float(temperature), None, *kernels())
    at = _where((targets != IGNORE) & (upstream != 0))
    counted = Rows(*(_pick(tensor, at) for tensor in (hidden, targets, lse, upstream)))
    if not len(counted.targets):
        return torch.zeros_like(weight[rows])
    part = None if bias is None else bias[rows].contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        return head.d_logits(counted, weight[rows], part, rows.start, head).T @ counted.hidden


def _check(hidden, weight, targets, bias, softcap, temperature, values, positions) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden, weight: expected [N, D] and [V, D], got {[*hidden.shape]} and {[*weight.shape]}")
    check_dtype("hidden", hidden, *FLOATS)
    check_dtype("weight", weight, hidden.dtype)
    check_contiguous("weight", weight)
    check_shape("targets", targets, hidden.shape[:1])
    check_dtype("targets", targets, torch.int64)
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias), ("values", values)):
        if tensor is not None:
            check_device(name, tensor, hidden.device)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
        check_dtype("bias", bias, *FLOATS)
    for name, number in (("softcap", softcap), ("temperature", temperature)):
        if number is not None:
            check_positive(name, number)
    if (values is None) != (positions is None):
        raise ValueError("values, positions: expected both or neither")
    if positions is not None:
        check_weights("weight", weight, positions)
        check_entries("values", values, positions)
    kept = targets[targets != IGNORE]
    if kept.numel():
        low, high = torch.stack(kept.aminmax()).tolist()
        if not 0 <= low <= high < len(weight):
            raise ValueError(f"targets: expected -100 or 0..{len(weight) - 1}, got {low}..{high}")


class _TokenLogps(torch.autograd.Function):
    """Forward keeps one log-sum-exp per row; backward goes over the vocabulary in chunks, each finished at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, values, targets, head):
        with torch.autocast(hidden.device.type, enabled=False):  # operands are in the dtype that the caller chose
            return _TokenLogps._forward(ctx, hidden, weight, bias, targets, head)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        check_not_capturing("the backward of token_logps")
        with torch.autocast(upstream.device.type, enabled=False):
            return _TokenLogps._backward(ctx, upstream)

    @staticmethod
    def _forward(ctx, hidden, weight, bias, targets, head):
        at = _where(targets != IGNORE)
        rows, bias = Rows(_pick(hidden, at), _pick(targets, at)), None if bias is None else bias.contiguous()
        chosen, lse = head.target_and_lse(rows, weight, bias, head)
        logps, lse = _spread(chosen - lse, at, targets), _spread(lse, at, targets)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.mark_non_differentiable(lse)
        ctx.head = head
        return logps, lse

    @staticmethod
    def _backward(ctx, upstream):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
        at = _where((targets != IGNORE) & (upstream != 0))
        rows = Rows(*(_pick(tensor, at) for tensor in (hidden, targets, lse, upstream)))
        d_hidden = torch.zeros(rows.hidden.shape, dtype=torch.float32, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros_like(bias) if need_bias else None
        d_values = torch.zeros(len(ctx.head.positions), device=hidden.device) if need_values else None
        for first, last in _chunks(rows, weight, need_values):
            part = weight[first:last]
            d_logits = ctx.head.d_logits(rows, part, None if bias is None else bias[first:last], first, ctx.head)
            if need_hidden:
                _add_product(d_hidden, d_logits, part)
            if need_weight:
                torch.mm(d_logits.T, rows.hidden, out=d_weight[first:last])
            if need_values:
                d_part, block = d_logits.T @ rows.hidden, first * weight.shape[1] // SPAN
                ctx.head.gather(d_part, ctx.head.positions, d_values, first_block=block)
            if need_bias:
                d_bias[first:last] = d_logits.sum(0, dtype=torch.float32)
        d_hidden = _spread(d_hidden.to(hidden.dtype), at, targets) if need_hidden else None
        return d_hidden, d_weight, d_bias, d_values, None, None


def _where(counts: Tensor) -> Tensor | None:
    """Which rows count; None when all do, so that nothing is copied."""
    return None if bool(counts.all()) else counts.nonzero().squeeze(1)


def _pick(tensor: Tensor, at: Tensor | None) -> Tensor:
    return tensor.contiguous() if at is None else tensor.index_select(0, at)


def _spread(rows: Tensor, at: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `_pick`, zero at the rows that do not count."""
    return rows if at is None else rows.new_zeros(len(like), *rows.shape[1:]).index_copy_(0, at, rows)


def _chunks(rows: Rows, weight: Tensor, compact: bool) -> Iterator[tuple[int, int]]:
    """Ranges of the vocabulary; for a compact gradient they begin where a block of positions does."""
    budget = CHUNK_BYTES[weight.device.type] // weight.element_size()
    columns = budget // max(1, *rows.hidden.shape) if compact else budget // max(1, len(rows.targets))
    step = SPAN // math.gcd(SPAN, weight.shape[1]) if compact else 16
    columns = max(step, max(columns, _MIN_COLUMNS) // step * step)
    if len(rows.targets):
        yield from ((first, min(first + columns, len(weight))) for first in range(0, len(weight), columns))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:  # the product in the operands' dtype, its sum over chunks in fp32
        total += left @ right


def _definition() -> tuple[Callable, Callable, Callable]:
    return _target_and_lse_torch, _d_logits_torch, gather_torch


def _target_and_lse_torch(rows: Rows, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The target's logit and the log of the sum of all exponentials, fp32 [n] each."""
    chunks = list(_chunks(rows, weight, False))
    chosen = torch.zeros(len(rows.targets), device=weight.device)
    parts = chosen.new_empty(len(chunks), len(rows.targets))
    for part, (first, last) in zip(parts, chunks, strict=True):
        logits = _logits(rows.hidden, weight[first:last], None if bias is None else bias[first:last], head)[0]
        torch.logsumexp(logits, 1, out=part)
        mine = ((rows.targets >= first) & (rows.targets < last)).nonzero().squeeze(1)
        chosen[mine] = logits[mine, rows.targets[mine] - first]
        del logits  # else two chunks are alive while the next is made
    return chosen, parts.logsumexp(0)


def _d_logits_torch(rows: Rows, weight: Tensor, bias: Tensor | None, first: int, head: Head) -> Tensor:
    """d (upstream . logps) / d logits [n, columns] in the weight's dtype, of the columns from `first` on."""
    logits, slope = _logits(rows.hidden, weight, bias, head)
    scale = rows.upstream / head.temperature
    found = logits.sub_(rows.lse[:, None]).exp_().mul_(-scale[:, None])  # d logp / d logit = onehot - softmax
    mine = ((rows.targets >= first) & (rows.targets < first + len(weight))).nonzero().squeeze(1)
    found[mine, rows.targets[mine] - first] += scale[mine]
    return (found if slope is None else found.mul_(slope)).to(weight.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """fp32 logits [n, columns] and, where they are capped, the derivative of the cap."""
    logits = F.linear(hidden, weight).float()
    if bias is not None:
        logits += bias.float()
    slope = None
    if head.softcap is not None:
        tanh = torch.tanh(logits / head.softcap)
        logits, slope = head.softcap * tanh, 1 - tanh**2
    return logits / head.temperature if head.temperature != 1.0 else logits, slope
