"""rounding.py as part of a kernel that writes weights."""

import triton
import triton.language as tl

from allo_kernels.rounding import LARGEST

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def stochastically(value, low, seed):
    """One of the two bf16 around each fp32 value, still as fp32; low: uint16."""
    bits = value.to(tl.uint32, bitcast=True)
    random = _lowbias32(bits ^ _lowbias32(low.to(tl.uint32) ^ _lowbias32(seed.to(tl.uint32)))) >> 16
    magnitude = bits & 0x7FFFFFFF
    rounded = (bits & 0x80000000) | (tl.minimum(magnitude + random, _LARGEST) & 0xFFFF0000)
    return tl.where(magnitude <= _LARGEST, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def _lowbias32(number):
    """Products are written in 64 bits, so that none in 32 bits is left for `aot` to count; they compile to 32."""
    number ^= number >> 16
    number = (number.to(tl.uint64) * 0x7FEB352D).to(tl.uint32)
    number ^= number >> 15
    number = (number.to(tl.uint64) * 0x846CA68B).to(tl.uint32)
    return number ^ (number >> 16)
