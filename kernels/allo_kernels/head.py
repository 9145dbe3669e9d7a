"""Log-probabilities of target tokens from hidden states, without the logits [N, V] ever existing."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from allo_kernels import head_torch
from allo_kernels.checks import (
    FLOATS,
    check_contiguous,
    check_device,
    check_dtype,
    check_not_capturing,
    check_positive,
    check_shape,
)
from allo_kernels.compact import check_entries, check_weights
from allo_kernels.dispatch import choose
from allo_kernels.head_parts import row_blocks, word_chunks
from allo_kernels.head_torch import Head, Rows
from allo_kernels.positions import SPAN, Positions

IGNORE = -100


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
    target_rows: int | None = None,
    gradient_rows: int | None = None,
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
    target_rows, gradient_rows: how many targets are not -100, and of how many rows at most the upstream gradient is not
    zero, where the host knows. Forward and backward each ask the device for the one that is None, and cannot be
    captured in a CUDA graph then (RuntimeError). With target_rows, targets on a device are not checked: one outside the
    vocabulary gives NaN there, and a number that is not theirs gives NaN everywhere, as gradient_rows that are too few
    do in the gradients.
    Raises ValueError, naming the argument, for a wrong shape, dtype or device, a weight that is not contiguous,
    targets outside the vocabulary, and values without positions.
    """
    _check(hidden, weight, targets, bias, softcap, temperature, values, positions)
    _check_targets(targets, len(weight), target_rows, "token_logps")
    kernels = choose("token_logps", impl, head_torch, "head_triton", hidden.device)
    if values is not None:
        weight = weight.detach()
    head = Head(softcap, float(temperature), positions, kernels, target_rows, gradient_rows)
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
    gradient_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """d (upstream . token_logps) / d weight[rows] -> [rows, D] in the weight's dtype, without the logits of others.

    lse: fp32 [N], what token_logps gave `with_lse`; upstream: fp32 [N]; everything else as it was given there. Raises
    ValueError and RuntimeError as token_logps, and ValueError for rows of another step than 1.
    """
    _check(hidden, weight, targets, bias, softcap, temperature, None, None)
    _check_targets(targets, len(weight), gradient_rows, "head_row_gradient")
    for name, tensor in (("lse", lse), ("upstream", upstream)):
        check_shape(name, tensor, targets.shape)
        check_dtype(name, tensor, torch.float32)
        check_device(name, tensor, hidden.device)
    kernels = choose("token_logps", impl, head_torch, "head_triton", hidden.device)
    head = Head(softcap, float(temperature), None, kernels)
    first, last, step = rows.indices(len(weight))
    if step != 1:
        raise ValueError(f"rows: expected neighbouring ones, got {rows}")
    part, bias = weight[first:last], None if bias is None else bias[first:last].contiguous()
    total = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
    with _without_autocast(hidden.device):
        counted, upstream, lse = _with_gradient(targets, upstream, lse, gradient_rows, "head_row_gradient")
        for block in row_blocks(len(counted), hidden.shape[1]):
            picked = counted.rows(block, hidden, targets, lse, upstream)
            _add_product(total, kernels.d_logits(picked, part, bias, first, head).T, picked.hidden)
    return total.to(weight.dtype)


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


def _check_targets(targets: Tensor, words: int, known: int | None, op: str) -> None:
    if known is not None and targets.device.type != "cpu":
        return
    check_not_capturing(op)
    kept = targets[targets != IGNORE]
    if kept.numel():
        low, high = torch.stack(kept.aminmax()).tolist()
        if not 0 <= low <= high < words:
            raise ValueError(f"targets: expected -100 or 0..{words - 1}, got {low}..{high}")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, operands are in the dtype that the caller chose."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class _TokenLogps(torch.autograd.Function):
    """Forward keeps one log-sum-exp per row; backward goes over the vocabulary in chunks, each finished at once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, values, targets, head):
        with _without_autocast(hidden.device):
            return _TokenLogps._forward(ctx, hidden, weight, bias, targets, head)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        with _without_autocast(upstream.device):
            return _TokenLogps._backward(ctx, upstream)

    @staticmethod
    def _forward(ctx, hidden, weight, bias, targets, head):
        counts, bias = targets != IGNORE, None if bias is None else bias.contiguous()
        counted = _Counted.of(counts, head.target_rows, "token_logps, without target_rows,")
        logps, lse = (counted.room(dtype=torch.float32, device=hidden.device) for _ in range(2))
        for block in row_blocks(len(counted), hidden.shape[1]):
            chosen, of_block = head.kernels.target_and_lse(counted.rows(block, hidden, targets), weight, bias, head)
            counted.put(logps, block, chosen - of_block)
            counted.put(lse, block, of_block)
        ctx.save_for_backward(hidden, weight, bias, targets, lse[: len(targets)])
        logps, lse = (found[: len(targets)].clone() for found in (logps, lse))  # a view may not be changed in place
        if head.target_rows is not None:
            logps = torch.where(counts.sum() == head.target_rows, logps, torch.nan)
        ctx.mark_non_differentiable(lse)
        ctx.head = head
        return logps, lse

    @staticmethod
    def _backward(ctx, upstream):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
        head, device, width = ctx.head, hidden.device, hidden.shape[1]
        counted, upstream, lse = _with_gradient(targets, upstream, lse, head.gradient_rows, "backward of token_logps")
        d_hidden = None  # made after the first block, when nothing else is alive
        d_weight = torch.zeros_like(weight) if need_weight else None
        d_bias = torch.zeros(bias.shape, device=device) if need_bias else None
        d_values = torch.zeros(len(head.positions), device=device) if need_values else None
        # A dense gradient's part is written once, so that nothing is added to what was rounded.
        blocks = [slice(0, len(counted))] * (len(counted) > 0) if need_weight else row_blocks(len(counted), width)
        for block in blocks:
            rows = counted.rows(block, hidden, targets, lse, upstream)
            total = torch.zeros(rows.hidden.shape, dtype=torch.float32, device=device) if need_hidden else None
            for first, last in word_chunks(len(rows.targets), weight, need_values):
                part = weight[first:last]
                d_logits = head.kernels.d_logits(rows, part, None if bias is None else bias[first:last], first, head)
                if need_hidden:
                    _add_product(total, d_logits, part)
                if need_weight:
                    torch.mm(d_logits.T, rows.hidden, out=d_weight[first:last])
                if need_values:
                    d_part, begin = _product(d_logits.T, rows.hidden), first * width // SPAN
                    head.kernels.gather(d_part, head.positions, d_values, accumulate=True, first_block=begin)
                    del d_part
                if need_bias:
                    d_bias[first:last] += d_logits.sum(0, dtype=torch.float32)
                del d_logits  # else two chunks' are alive while the next is made
            if need_hidden:
                if d_hidden is None:
                    d_hidden = counted.room(width, dtype=hidden.dtype, device=device)
                counted.put(d_hidden, block, total)
        if need_hidden:
            d_hidden = torch.zeros_like(hidden) if d_hidden is None else d_hidden[: len(targets)]
        return d_hidden, d_weight, d_bias.to(bias.dtype) if need_bias else None, d_values, None, None


@dataclass(frozen=True)
class _Counted:
    """Rows of [N] that count: `at` int64 [n], filled up with N; or None for all, so that nothing is copied."""

    every: int
    at: Tensor | None

    @classmethod
    def of(cls, counts: Tensor, known: int | None, asking: str) -> "_Counted":
        """counts: bool [N]; known: of how many at most it is True, else the device is asked; asking: for whom."""
        if known is None:
            check_not_capturing(asking)
            known = int(counts.count_nonzero())
        every = len(counts)
        if known >= every:
            return cls(every, None)
        return cls(every, torch.nonzero_static(counts, size=known, fill_value=every).squeeze(1))

    def __len__(self) -> int:
        return self.every if self.at is None else len(self.at)

    def rows(self, block: slice, hidden: Tensor, targets: Tensor, *of_backward: Tensor) -> Rows:
        """A block of them next to each other; of_backward: lse, and upstream, which is zero where `at` is filled up."""
        given = (hidden, targets, *of_backward)
        if self.at is None:
            hidden, targets, *of_backward = (tensor[block].contiguous() for tensor in given)
        else:
            at = self.at[block].clamp(max=self.every - 1)
            hidden, targets, *of_backward = (tensor.index_select(0, at) for tensor in given)
            if of_backward:
                of_backward[1] = torch.where(self.at[block] < self.every, of_backward[1], 0.0)
        return Rows(hidden, targets.int(), *of_backward)

    def room(self, *width: int, **options) -> Tensor:
        """Zeros for every row, and one more for what `at` is filled up with."""
        return torch.zeros(self.every + (self.at is not None), *width, **options)

    def put(self, room: Tensor, block: slice, rows: Tensor) -> None:
        if self.at is None:
            room[block] = rows
        else:
            room.index_copy_(0, self.at[block], rows.to(room.dtype))


def _with_gradient(
    targets: Tensor, upstream: Tensor, lse: Tensor, known: int | None, op: str
) -> tuple[_Counted, Tensor, Tensor]:
    """The rows that get a gradient, it, and their log-sum-exp; NaN where they are more than the host knew.

    It may know of too many: of a row without a target upstream is zero then, and so is exp(logit - lse), of any logit.
    """
    given = targets != IGNORE
    counts = given & (upstream != 0)
    if known is not None:
        upstream = torch.where(counts.sum() <= known, torch.where(given, upstream, 0.0), torch.nan)
        lse = torch.where(given, lse, torch.inf)
        known = _at_most(counts, known)
    return _Counted.of(counts, known, f"{op}, without gradient_rows,"), upstream, lse


def _at_most(counts: Tensor, known: int) -> int:
    """How many rows to work on: on a CPU, where nothing waits, those that count; else all known, or one for NaN."""
    return int(counts.count_nonzero()) if counts.device.type == "cpu" else max(known, 1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32 wherever a matrix product can be; a CPU's is in the operands' dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type != "cpu" and len(total) > 1:  # of one row PyTorch makes a bias for cuBLASLt
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, its sums not rounded to the operands' dtype on a GPU."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
