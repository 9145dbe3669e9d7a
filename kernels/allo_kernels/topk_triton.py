"""The Triton kernel of topk.py: one digit's histogram of a stream, read once at memory speed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allo_kernels.launching import launch, multiprocessors
from allo_kernels.topk import INFINITY_BITS

_PROGRAMS = 8  # on a multiprocessor, all at once; each keeps a histogram in registers and adds it to memory once
_SCORES = 2048  # per turn
_INFINITY = tl.constexpr(INFINITY_BITS)


@triton.jit(do_not_specialize=["prefix"])
def _histogram_kernel(scores, counts, size, prefix, SHIFT: tl.constexpr, WIDTH: tl.constexpr, SCORES: tl.constexpr):
    BINS: tl.constexpr = 1 << WIDTH
    found = tl.zeros((BINS,), tl.int32)
    nans = tl.zeros((), tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * SCORES
    for first in range(tl.program_id(0).to(tl.int64) * SCORES, size, stride):
        at = first + tl.arange(0, SCORES)
        inside = at < size
        score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
        bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        nans += tl.sum((bits > _INFINITY).to(tl.int32))
        matches = inside & ((bits >> (SHIFT + WIDTH)) == prefix)
        found += tl.histogram((bits >> SHIFT) & (BINS - 1), BINS, mask=matches)
    # Integers: their sum does not depend on the order of the atomics, and nothing is read before the kernel ends.
    tl.atomic_add(counts + tl.arange(0, BINS), found.to(tl.int64), mask=found > 0, sem="relaxed")
    tl.atomic_add(counts + BINS, nans.to(tl.int64), mask=nans > 0, sem="relaxed")


def histogram(scores: Tensor, shift: int, width: int, prefix: int) -> Tensor:
    """How often each `width`-bit digit at `shift` follows the bits of `prefix`, then the NaNs: int64 [bins + 1]."""
    counts = torch.zeros((1 << width) + 1, dtype=torch.int64, device=scores.device)
    programs = min(_PROGRAMS * multiprocessors(scores), triton.cdiv(scores.numel(), _SCORES))
    launch(
        _histogram_kernel,
        (programs,),
        *(scores, counts, scores.numel(), prefix),
        SHIFT=shift,
        WIDTH=width,
        SCORES=_SCORES,
        num_warps=4,
    )
    return counts
