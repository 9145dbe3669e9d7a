"""The Triton kernel of pair_loss.py: one program per pair, one launch per batch.

A row's k-th lowest number is found by four histograms over the digits of its bits, the same radix search as in topk.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from allo_kernels.launching import launch
from allo_kernels.pair_loss import as_ratio

_LONGEST, _WARPS = 2048, 8  # tokens looked at per turn


@triton.jit
def _load(row, at, inside):
    return tl.load(row + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _ordered(number):
    """int64 that orders as the float does; both zeros are equal, and NaN comes first, so that it is never left out."""
    bits = (number + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    key = tl.where(bits < 0, 0xFFFFFFFF - (bits & 0xFFFFFFFF), bits + 0x80000000)
    return tl.where(number != number, 0, key)


@triton.jit
def _keys(policy, reference, valid, at, length):
    """Log-ratios of a turn, what orders them lowest first, and which count."""
    inside = at < length
    inside &= tl.load(valid + at, mask=inside, other=0) != 0
    ratio = _load(policy, at, inside) - _load(reference, at, inside)
    return ratio, _ordered(ratio), inside


@triton.jit
def _kth_lowest(policy, reference, valid, length, keep, TOKENS: tl.constexpr):
    """Key of the row's keep-th lowest log-ratio, and how many of its equals are kept."""
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.int64)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, length, TOKENS):
            _, key, inside = _keys(policy, reference, valid, first + tl.arange(0, TOKENS), length)
            matches = inside & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=matches)
        found = tl.sum((tl.cumsum(counts, 0) < keep).to(tl.int32))
        keep -= tl.sum(tl.where(bins < found, counts, 0))
        prefix = prefix * 256 + found
    return prefix, keep


@triton.jit
def _kept(key, inside, kth, equals, seen):
    """Which of this turn's tokens are kept, and how many equals of the k-th were met so far."""
    tie = inside & (key == kth)
    rank = seen + tl.cumsum(tie.to(tl.int32), 0)
    return inside & ((key < kth) | (tie & (rank <= equals))), seen + tl.sum(tie.to(tl.int32))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few roundings however small it is."""
    small = tl.exp(-tl.abs(x))
    # log(1 + s) = 2 artanh(s / (2 + s)); 1 + s would round away what a small s is about. At most 1/3 is given to the
    # series, whose first term left out is 2/17 3^-17, a hundredth of a rounding.
    ratio = small / (2.0 + small)
    square, series = ratio * ratio, 1.0 / 15
    for degree in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / degree
    return tl.maximum(x, 0.0) + 2.0 * ratio * series


@triton.jit(do_not_specialize=["chosen_length", "rejected_length", "numerator", "denominator"])
def _key_token_dpo_kernel(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_valid,
    rejected_valid,
    losses,
    chosen_rewards,
    rejected_rewards,
    weights,
    d_chosen,
    d_rejected,
    chosen_length,
    rejected_length,
    numerator,
    denominator,
    beta,
    smoothing,
    TOKENS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    chosen_row, rejected_row = pair * chosen_length, pair * rejected_length
    chosen_sum = tl.zeros((), tl.float32)
    for first in range(0, chosen_length, TOKENS):
        at = chosen_row + first + tl.arange(0, TOKENS)
        ratio, _, inside = _keys(chosen, ref_chosen, chosen_valid, at, chosen_row + chosen_length)
        chosen_sum += tl.sum(tl.where(inside, ratio, 0.0))
    rejected += rejected_row
    ref_rejected += rejected_row
    rejected_valid += rejected_row
    count = tl.zeros((), tl.int64)
    moved = tl.zeros((), tl.int64)
    for first in range(0, rejected_length, TOKENS):
        at = first + tl.arange(0, TOKENS)
        ratio, _, inside = _keys(rejected, ref_rejected, rejected_valid, at, rejected_length)
        count += tl.sum(inside.to(tl.int64))
        moved += tl.sum((inside & (ratio != 0.0)).to(tl.int64))
    keep = tl.where(moved == 0, count, tl.maximum(count * numerator // denominator, 1)).to(tl.int32)
    kth, equals = _kth_lowest(rejected, ref_rejected, rejected_valid, rejected_length, keep, TOKENS)
    rejected_sum = tl.zeros((), tl.float32)
    seen = tl.zeros((), tl.int32)
    for first in range(0, rejected_length, TOKENS):
        at = first + tl.arange(0, TOKENS)
        ratio, key, inside = _keys(rejected, ref_rejected, rejected_valid, at, rejected_length)
        kept, seen = _kept(key, inside, kth, equals, seen)
        rejected_sum += tl.sum(tl.where(kept, ratio, 0.0))
    margin = beta * chosen_sum - beta * rejected_sum
    tl.store(chosen_rewards + pair, beta * chosen_sum)
    tl.store(rejected_rewards + pair, beta * rejected_sum)
    tl.store(losses + pair, (1.0 - smoothing) * _softplus(-margin) + smoothing * _softplus(margin))
    slope = beta * ((1.0 - smoothing) * tl.sigmoid(-margin) - smoothing * tl.sigmoid(margin))  # -d loss / d chosen sum
    for first in range(0, chosen_length, TOKENS):
        at = first + tl.arange(0, TOKENS)
        inside = at < chosen_length
        counts = tl.load(chosen_valid + chosen_row + at, mask=inside, other=0) != 0
        tl.store(d_chosen + chosen_row + at, tl.where(counts, -slope, 0.0), mask=inside)
    seen = tl.zeros((), tl.int32)
    for first in range(0, rejected_length, TOKENS):
        at = first + tl.arange(0, TOKENS)
        _, key, inside = _keys(rejected, ref_rejected, rejected_valid, at, rejected_length)
        kept, seen = _kept(key, inside, kth, equals, seen)
        tl.store(weights + rejected_row + at, kept.to(tl.float32), mask=at < rejected_length)
        tl.store(d_rejected + rejected_row + at, tl.where(kept, slope, 0.0), mask=at < rejected_length)


def key_token_dpo_loss(
    chosen_logps, rejected_logps, ref_chosen, ref_rejected, chosen_valid, rejected_valid, fraction, beta, smoothing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fixed = (ref_chosen, ref_rejected, chosen_valid, rejected_valid)
    return _KeyTokenDpo.apply(chosen_logps, rejected_logps, fixed, (*as_ratio(fraction), beta, smoothing))


class _KeyTokenDpo(torch.autograd.Function):
    """The gradient per token is known with the loss; backward only multiplies it."""

    @staticmethod
    def forward(ctx, chosen_logps, rejected_logps, fixed, settings):
        inputs = [tensor.detach().contiguous() for tensor in (chosen_logps, rejected_logps, *fixed)]
        pairs = [torch.empty(len(inputs[0]), dtype=torch.float32, device=inputs[0].device) for _ in range(3)]
        d_chosen = torch.empty_like(inputs[0], dtype=torch.float32)
        weights, d_rejected = (torch.empty_like(inputs[1], dtype=torch.float32) for _ in range(2))
        lengths = (chosen_logps.shape[1], rejected_logps.shape[1])
        launch(
            _key_token_dpo_kernel,
            (len(chosen_logps),),
            *(*inputs, *pairs, weights, d_chosen, d_rejected, *lengths, *settings),
            TOKENS=_tokens(max(lengths)),
            num_warps=_WARPS,
        )
        ctx.save_for_backward(d_chosen, d_rejected)
        ctx.dtypes = chosen_logps.dtype, rejected_logps.dtype
        outputs = (*pairs, weights)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        found = (d * upstream[:, None] for d in ctx.saved_tensors)
        return *(d.to(dtype) for d, dtype in zip(found, ctx.dtypes, strict=True)), None, None


def _tokens(length: int) -> int:
    return min(_LONGEST, triton.next_power_of_2(max(16, length)))
