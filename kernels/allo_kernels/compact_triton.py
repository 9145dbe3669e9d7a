"""Triton kernels of compact.py: one program per block of 65536 weights, over the entries selected there.

Entries are sorted, so a program's accesses to the dense tensor run forward and share 32-byte sectors where the
selection is dense. Every address is a 64-bit block address plus 16 bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from allo_kernels.checks import check_not_capturing
from allo_kernels.compact import tensors
from allo_kernels.launching import TL_DTYPES, launch, to_nearest
from allo_kernels.positions import SPAN, Positions, blocks_of
from allo_kernels.rounding_triton import stochastically

# About 3300 entries a block at 5 %: a few turns of 1024, enough loads in flight without holding many registers.
ENTRIES, WARPS = 1024, 4
_SPAN = tl.constexpr(SPAN)


@triton.jit
def block_pointer(dense, block, DTYPE: tl.constexpr, TABLE: tl.constexpr):
    """First weight of a block: of one tensor, or by a table with every block's address."""
    if TABLE:
        return tl.load(dense + block).to(tl.pointer_type(DTYPE))
    else:
        return dense + block * _SPAN


# Entries begin anywhere, so aligned pointers would buy nothing and cost a compilation each.
@triton.jit(do_not_specialize_on_alignment=["low", "starts", "out"])
def _gather_kernel(dense, low, starts, out, ACCUMULATE: tl.constexpr, ENTRIES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    last = tl.load(starts + block + 1)
    for first in range(tl.load(starts + block), last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < last
        at = block * _SPAN + tl.load(low + entry, mask=inside, other=0).to(tl.int64)
        picked = tl.load(dense + at, mask=inside, other=0.0).to(tl.float32)
        if ACCUMULATE:
            picked += tl.load(out + entry, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + entry, to_nearest(picked, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rounding_seed"], do_not_specialize_on_alignment=["low", "starts", "values"])
def _scatter_kernel(
    dense,
    low,
    starts,
    values,
    rounding_seed,  # None is a constant, and leaves the branch out
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    SWAP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    base = block_pointer(dense, block, DTYPE, TABLE)
    last = tl.load(starts + block + 1)
    for first in range(tl.load(starts + block), last, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < last
        in_block = tl.load(low + entry, mask=inside, other=0)
        at = base + in_block.to(tl.int64)
        value = tl.load(values + entry, mask=inside, other=0.0)
        if SWAP:
            tl.store(values + entry, tl.load(at, mask=inside, other=0.0), mask=inside)
        if rounding_seed is not None:
            value = stochastically(value.to(tl.float32), in_block, rounding_seed)
        tl.store(at, to_nearest(value, DTYPE), mask=inside)


def gather(dense: Tensor, positions: Positions, out: Tensor, accumulate=False, first_block: int = 0) -> Tensor:
    """`dense` may be a part of its tensor that starts with `first_block`; then only that part of `out` is written."""
    launch(
        _gather_kernel,
        (blocks_of(dense.numel()),),
        *(dense, positions.low, positions.starts[first_block:], out),
        ACCUMULATE=accumulate,
        ENTRIES=ENTRIES,
        num_warps=WARPS,
    )
    increment_version(out)
    return out


def scatter_(
    dense: Tensor | Sequence[Tensor],
    positions: Positions,
    values: Tensor,
    rounding_seed: int | None = None,
    swap: bool = False,
) -> None:
    target, constants = target_of(dense, positions)
    launch(
        _scatter_kernel,
        (positions.blocks,),
        *(target, positions.low, positions.starts, values, rounding_seed),
        SWAP=swap,
        ENTRIES=ENTRIES,
        num_warps=WARPS,
        **constants,
    )
    increment_version([*tensors(dense), values] if swap else tensors(dense))


def swap_(dense: Tensor | Sequence[Tensor], positions: Positions, values: Tensor) -> None:
    scatter_(dense, positions, values, swap=True)


def target_of(dense: Tensor | Sequence[Tensor], positions: Positions) -> tuple[Tensor, dict]:
    """What `block_pointer` needs: a tensor, or the table of its blocks' addresses, and its constants."""
    if isinstance(dense, Tensor):
        return dense, {"DTYPE": TL_DTYPES[dense.dtype], "TABLE": False}
    # Made once for a model, whose weights do not move. Of the sizes it needs no account: they are the positions' own.
    key = dense[0].dtype, *(weight.data_ptr() for weight in dense)
    if key not in positions.tables:
        check_not_capturing("the first call for these weights, which makes the table of their addresses,")
        positions.tables[key] = _block_addresses(dense).to(positions.device)
    return positions.tables[key], {"DTYPE": TL_DTYPES[dense[0].dtype], "TABLE": True}


def _block_addresses(dense: Sequence[Tensor]) -> Tensor:
    """int64 [blocks]"""
    step = SPAN * dense[0].element_size()
    table = [w.data_ptr() + block * step for w in dense for block in range(blocks_of(w.numel()))]
    return torch.tensor(table, dtype=torch.int64)
