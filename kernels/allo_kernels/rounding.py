"""Rounding to bfloat16 by chance, in the mean to the value itself, with random bits that can be computed again."""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 0x7F7FFFFF  # bits of the largest finite fp32; without their lower half, of the largest finite bf16
# Chris Wellons' lowbias32 (github.com/skeeto/hash-prospector). The second factor is 0x846CA68B - 2**32, equal to it in
# 32 bits: with that, a product of 32 bits stays inside int64.
_FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_MASK = 0xFFFFFFFF
_PART = 1 << 22  # entries that are hashed at once, 8 bytes each


def check_rounding_seed(seed: int | None, dense: Sequence[Tensor]) -> int | None:
    """The seed, or None where nothing is rounded by chance. Raises ValueError for another seed, or fp16 weights."""
    if seed is None:
        return None
    if type(seed) is not int or not 0 <= seed < 1 << 31:  # True is no seed
        raise ValueError(f"rounding_seed: expected None or an integer in 0..{(1 << 31) - 1}, got {seed!r}")
    dtypes = {tensor.dtype for tensor in dense}
    if torch.float16 in dtypes:
        raise ValueError("rounding_seed: expected weights in torch.bfloat16 or torch.float32, got torch.float16")
    return seed if torch.bfloat16 in dtypes else None


def rounded(values: Tensor, low: Tensor, dtype: torch.dtype, rounding_seed: int | None) -> Tensor:
    """What `scatter_` writes of `values` fp32 [K] into a weight of `dtype` -> [K] in that dtype.

    low: uint16 [K], as of Positions. Raises ValueError for a rounding_seed out of range, or for fp16 weights.
    """
    seed = check_rounding_seed(rounding_seed, [torch.empty(0, dtype=dtype)])
    if seed is None:
        return values.to(dtype)
    parts = zip(values.split(_PART), low.split(_PART), strict=True)
    return torch.cat([stochastically(value, part.long(), seed).to(dtype) for value, part in parts])


def stochastically(value: Tensor, low: Tensor, seed: int) -> Tensor:
    """Each `value` [K] as one of the two bf16 around it, by chance (Zamirai et al., arXiv 2010.06192); both are fp32.

        r = upper 16 bits of h(bits(value) xor h(low xor h(seed)))     result = (bits(value) + r), lower 16 bits zero

    h is the hash lowbias32; low: int64 [K], positions within blocks of 65536. Floats are sign and magnitude, so the sum
    is of magnitudes: the bf16 farther from zero comes with the probability of how near it is, and the mean over r is
    the value. What bf16 holds stays itself, infinity and NaN too, and a finite value never becomes infinite.
    """
    bits = value.view(torch.int32).long()
    random = lowbias32((bits & _MASK) ^ lowbias32(low ^ lowbias32(seed))) >> 16
    magnitude = ((bits & 0x7FFFFFFF) + random).clamp(max=LARGEST) & ~0xFFFF
    rounded = magnitude.to(torch.int32).view(torch.float32).copysign(value)
    return torch.where(value.isfinite(), rounded, value)


def lowbias32(number):
    """Hash of an integer of 32 bits, or of each in an int64 tensor: a change of one bit changes half of its bits."""
    for shift, factor in zip((16, 15), _FACTORS, strict=True):
        number = (number ^ (number >> shift)) * factor & _MASK
    return number ^ (number >> 16)
