"""Log-probabilities of target tokens from hidden states, without the logits [N, V] ever existing."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allo_kernels.dispatch import choose

IGNORE = -100
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # fp32 logits alive at once: 16 and 256 MiB


@dataclass(frozen=True)
class _Head:
    softcap: float | None
    temperature: float


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """log softmax(softcap(hidden @ weight.T + bias) / temperature)[n, targets[n]] -> fp32 [N].

    hidden: [N, D]; weight: [V, D]; targets: int64 [N], -100 for a row that gives 0 and no gradient; bias: [V] or None;
    softcap: z -> softcap * tanh(z / softcap). Differentiable in hidden, weight and bias for any upstream gradient [N];
    backward works only on rows whose upstream gradient is not zero, and makes dW only when the weight asks for it.
    Raises ValueError for shapes that do not fit and targets outside the vocabulary.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if hidden.ndim != 2 or weight.shape != (vocabulary, hidden.shape[1]):
        raise ValueError(f"hidden, weight: expected [N, D] and [V, D], got {[*hidden.shape]} and {[*weight.shape]}")
    if targets.shape != (rows,):
        raise ValueError(f"targets: expected shape ({rows},), got {tuple(targets.shape)}")
    kept = targets[targets != IGNORE]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < vocabulary:
        raise ValueError(f"targets: expected -100 or 0..{vocabulary - 1}, got {int(kept.min())}..{int(kept.max())}")
    run = choose("token_logps", impl, {"torch": _TokenLogps.apply}, cuda=hidden.is_cuda)
    return run(hidden, weight, bias, targets, _Head(softcap, temperature))


class _TokenLogps(torch.autograd.Function):
    """Row chunks: forward keeps one log-sum-exp per row, backward recomputes the logits of the rows it needs."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        logps = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        for rows in _chunks((targets != IGNORE).nonzero().squeeze(1), weight):
            logits = _logits(hidden[rows], weight, bias, head)[0]
            chosen = logits.gather(1, targets[rows, None]).squeeze(1)
            logps[rows] = chosen - logits.logsumexp(1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head = head
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _chunks(((targets != IGNORE) & (grad_logps != 0)).nonzero().squeeze(1), weight):
            logits, slope = _logits(hidden[rows], weight, bias, ctx.head)
            d_logits = logits.softmax(1).mul_(-grad_logps[rows, None])  # dlogp/dz = onehot - softmax
            d_logits.scatter_add_(1, targets[rows, None], grad_logps[rows, None].float())
            d_logits.div_(ctx.head.temperature)
            d_logits = (d_logits if slope is None else d_logits.mul_(slope)).to(weight.dtype)
            if need_hidden:
                d_hidden[rows] = (d_logits @ weight).to(hidden.dtype)
            if need_weight:
                _add_product(d_weight, d_logits.T, hidden[rows].to(weight.dtype))
            if need_bias:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if need_weight else None,
            d_bias.to(bias.dtype) if need_bias else None,
            None,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:  # the product in the operands' dtype, its sum over chunks in fp32
        total += left @ right


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _CHUNK_ELEMENTS[weight.device.type] // weight.shape[0])) if rows.numel() else ()


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> tuple[Tensor, Tensor | None]:
    """fp32 logits [n, V] and, where they are capped, the derivative of the cap."""
    logits = F.linear(hidden, weight, bias).float()
    slope = None
    if head.softcap is not None:
        tanh = torch.tanh(logits / head.softcap)
        logits, slope = head.softcap * tanh, 1 - tanh**2
    return logits / head.temperature if head.temperature != 1.0 else logits, slope
