"""Exact top-k of a stream of tensors, without sorting."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from allo_kernels.checks import FLOATS, check_dtype, check_not_capturing
from allo_kernels.dispatch import choose

# A non-negative float orders like its bits: its 31 bits in digits find the k-th largest exactly. Of 8 bits, because for
# 11 Triton 3.6 writes a histogram of four times the instructions.
DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # (shift, width)
_LOWEST = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # the bits below are zero in any such number
INFINITY_BITS = 0x7F800000


class Threshold(NamedTuple):
    """The k-th largest score, 0-d fp32 on the CPU; how many scores lie above it, and how many equal it."""

    value: Tensor
    above: int
    ties: int


def topk_threshold(
    score_chunks: Iterable[Tensor], k: int, *, add_up: Callable[[Tensor], Tensor] | None = None, impl: str = "auto"
) -> Threshold:
    """The exact k-th largest |score| over all chunks, bitwise that of a full sort; O(1) memory beside one chunk.

    score_chunks: bf16, fp16 or fp32 tensors of any shape, on any devices; iterated once per digit (four times, when
    none is fp32 three, when all are bf16 twice), so a list or an object with its own `__iter__`, never a generator.
    add_up: where other processes hold further chunks, the sum of an int64 tensor over all of them; the threshold, the
    counts and `k` are then of all chunks together.
    Raises ValueError when k is not in 1..(number of scores), a score is NaN, or a chunk has another dtype. The host
    decides which digit is next, and waits once per digit for each device: RuntimeError while a CUDA graph is captured.
    """
    check_not_capturing("topk_threshold")
    if iter(score_chunks) is score_chunks:
        raise ValueError("score_chunks: expected something that can be iterated again, got a generator")
    prefix, above, lowest = 0, 0, 0  # the bits found so far; how many scores exceed all that have them; the last bit
    for shift, width in DIGITS:
        if shift + width <= lowest:  # zero in all chunks
            prefix <<= width
            continue
        total = _counted(score_chunks, shift, width, prefix, impl)
        total = total if add_up is None else add_up(total)  # all processes go on to the last digit, or none does
        counts, nans = total[: 1 << width], int(total[1 << width])
        chunks = zip(_LOWEST.values(), total[-len(_LOWEST) :].tolist(), strict=True)
        lowest = min((bit for bit, count in chunks if count), default=0)
        if nans:
            raise ValueError(f"score_chunks: {nans} scores are NaN")
        if not above + int(counts.sum()) >= k >= 1:
            raise ValueError(f"k: expected 1..{above + int(counts.sum())}, got {k}")
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((above + at_least >= k).nonzero().max())
        above += int(at_least[digit] - counts[digit])
        prefix = prefix << width | digit
        ties = int(counts[digit])
    return Threshold(torch.tensor(prefix, dtype=torch.int32).view(torch.float32), above, ties)


def _counted(score_chunks: Iterable[Tensor], shift: int, width: int, prefix: int, impl: str) -> Tensor:
    """All chunks' histogram, their NaNs, and how many chunks have each of _LOWEST's dtypes: int64, on the CPU."""
    found: dict[torch.device, Tensor] = {}
    dtypes = dict.fromkeys(_LOWEST, 0)
    for chunk in score_chunks:
        check_dtype("score_chunks", chunk, *FLOATS)
        run = choose("topk_threshold", impl, _histogram_torch, "topk_triton.histogram", chunk.device)
        counts = run(chunk.detach().reshape(-1).contiguous(), shift, width, prefix)
        found[chunk.device] = found[chunk.device] + counts if chunk.device in found else counts
        dtypes[chunk.dtype] += 1
    bins = sum((counts.cpu() for counts in found.values()), torch.zeros((1 << width) + 1, dtype=torch.int64))
    return torch.cat([bins, torch.tensor([*dtypes.values()])])


def _histogram_torch(scores: Tensor, shift: int, width: int, prefix: int) -> Tensor:
    """How often each `width`-bit digit at `shift` follows the bits of `prefix`, then the NaNs: int64 [bins + 1]."""
    bits = scores.float().abs().view(torch.int32)
    nans = (bits > INFINITY_BITS).sum()[None]
    bits = bits[bits >> (shift + width) == prefix]
    return torch.cat([torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width), nans])
