"""Exact top-k without sorting: over a stream of tensors, and per row of a batch."""

from collections.abc import Iterable

import torch
from torch import Tensor

from allo_kernels.dispatch import choose

# A non-negative float orders like its bits. Three passes of 11 + 11 + 10 bits find the k-th largest exactly.
_DIGITS = ((20, 11), (9, 11), (0, 9))


def topk_threshold(score_chunks: Iterable[Tensor], k: int, *, impl: str = "auto") -> Tensor:
    """The exact k-th largest |score| over all chunks -> 0-d fp32 tensor; O(1) memory beside one chunk.

    score_chunks: float tensors of any shape; iterated three times, so a list or an object with its own `__iter__`,
    never a generator. The per-digit histograms are sums, so shards can add theirs.
    Raises ValueError when k is not in 1..(number of scores) or a score is NaN.
    """
    return choose("topk_threshold", impl, {"torch": _topk_threshold_torch}, cuda=False)(score_chunks, k)


def top_fraction_weights(scores: Tensor, valid: Tensor, fraction: float, *, impl: str = "auto") -> Tensor:
    """Per row, 1.0 at the floor(fraction * number of valid) largest valid scores, else 0.0; ties to the lower index.

    scores: [B, T], no gradient flows through the choice; valid: bool [B, T]; returns fp32 [B, T].
    Raises ValueError when the shapes differ or fraction is outside 0..1.
    """
    if scores.shape != valid.shape:
        raise ValueError(f"valid: expected shape {tuple(scores.shape)}, got {tuple(valid.shape)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected 0..1, got {fraction}")
    run = choose("top_fraction_weights", impl, {"torch": _top_fraction_weights_torch}, cuda=scores.is_cuda)
    return run(scores, valid, fraction)


def _topk_threshold_torch(score_chunks: Iterable[Tensor], k: int) -> Tensor:
    prefix, above = 0, 0  # the bits found so far, and how many scores are larger than everything that has them
    for shift, width in _DIGITS:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for chunk in score_chunks:
            bits = _magnitude_bits(chunk)
            bits = bits[bits >> (shift + width) == prefix]
            counts += torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
        if not above + int(counts.sum()) >= k >= 1:
            raise ValueError(f"k: expected 1..{above + int(counts.sum())}, got {k}")
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((above + at_least >= k).nonzero().max())
        above += int(at_least[digit] - counts[digit])
        prefix = prefix << width | digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32)


def _magnitude_bits(chunk: Tensor) -> Tensor:
    if chunk.isnan().any():
        raise ValueError("score_chunks: a score is NaN")
    return chunk.float().abs().flatten().view(torch.int32)


def _top_fraction_weights_torch(scores: Tensor, valid: Tensor, fraction: float) -> Tensor:
    ranked = scores.detach().masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # In fp64 the product of a decimal fraction and a count can fall just below the integer it should be.
    keep = torch.floor(fraction * valid.sum(dim=1, keepdim=True).double() + 1e-9)
    weights = (torch.arange(scores.shape[1], device=scores.device) < keep).float().expand_as(ranked)
    return torch.zeros_like(weights).scatter_(1, ranked, weights)
