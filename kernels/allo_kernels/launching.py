"""What every kernel shares: how it is launched or recorded, and where Triton's interpreter differs from a device."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from allo_kernels.dispatch import interpreting

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*arguments, **constants) that did not happen."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict


_launches: deque[Launch] | None = None
_capability: tuple[int, int] | None = None


def launch(kernel: Callable, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Runs `kernel` on the device of its first argument; nothing for an empty grid."""
    if _launches is not None:
        _launches.append(Launch(kernel, grid, arguments, constants))
    elif grid[0]:
        device = arguments[0].device  # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def recording(capability: tuple[int, int], keep: bool = True) -> Iterator[Sequence[Launch]]:
    """Inside, launchers run on meta tensors as if on a device of this capability, and their launches are listed.

    Without `keep` they are not, for who counts how long tensors live.
    """
    global _launches
    assert _launches is None, "recording() inside recording()"
    _launches = deque(maxlen=None if keep else 0)
    try:
        with blocks_of_device(capability):
            yield _launches
    finally:
        _launches = None


@contextlib.contextmanager
def blocks_of_device(capability: tuple[int, int] | None) -> Iterator[None]:
    """Inside, launchers choose block sizes as for a device of this capability, whatever runs them; None: as always."""
    global _capability
    before, _capability = _capability, capability
    try:
        yield
    finally:
        _capability = before


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """Of the device that a launch on `tensor` is for; None in the interpreter."""
    if _capability is not None:
        return _capability
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's device; 1 where there is none."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


INTERPRETED = tl.constexpr(interpreting())  # when this is imported, as Triton's own decorators decide


@triton.jit
def to_nearest(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE; the interpreter would cut a bfloat16 off."""
    if x.dtype == DTYPE:
        return x
    elif INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))  # the sum would carry into a NaN's sign
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, total):
    """total + a @ b in fp32; the interpreter would multiply the bits of a bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")
