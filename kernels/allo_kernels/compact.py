"""Reading and writing the selected entries of dense tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from allo_kernels.checks import FLOATS, check_contiguous, check_device, check_dtype, check_shape
from allo_kernels.dispatch import choose
from allo_kernels.positions import SPAN, Positions, blocks_of
from allo_kernels.rounding import check_rounding_seed, stochastically


@torch.no_grad()
def gather(
    dense: Tensor,
    positions: Positions,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`dense.view(-1)[positions]` -> [K], in `out`'s dtype when given, added to it in fp32 when `accumulate`.

    Raises ValueError, naming the argument, for a dtype other than bf16, fp16 or fp32, another device, a shape that
    does not fit, a tensor that is not contiguous, and `accumulate` without `out`. The PyTorch definition waits for the
    host, and raises RuntimeError while a CUDA graph is captured; so does, of the kernels of `scatter_` and `swap_`, the
    first call for a list of weights.
    """
    if not isinstance(dense, Tensor):
        raise ValueError(f"dense: expected one tensor, got {type(dense).__name__}")
    check_weights("dense", dense, positions)
    if out is None:
        if accumulate:
            raise ValueError("out: expected a tensor to accumulate into")
        out = torch.empty(len(positions), dtype=dense.dtype, device=dense.device)
    check_entries("out", out, positions)
    run = choose("gather", impl, gather_torch, "compact_triton.gather", dense.device)
    return run(dense, positions, out, accumulate)


@torch.no_grad()
def scatter_(
    dense: Tensor | Sequence[Tensor],
    positions: Positions,
    values: Tensor,
    *,
    rounding_seed: int | None = None,
    impl: str = "auto",
) -> None:
    """`dense.view(-1)[positions] = values` [K] in place, rounded in `dense`'s dtype: to nearest, or by a rounding_seed.

    dense: a tensor, or the tensors of one dtype that `positions` were concatenated for. Autograd sees the write: give
    it `weight.detach()`, which shares the weight's version counter, and never `weight.data`, which has one of its own.
    rounding_seed: 0..2**31 - 1; a value becomes one of the two bf16 around it by chance, so that the mean is the value
    (`rounding.stochastically`). Which one follows from the seed, the fp32 value and its position within its block of
    65536 weights: the same bits on any device, and whatever tensors are written beside. fp32 weights take the value.
    Raises ValueError and RuntimeError as `gather`, and ValueError for a rounding_seed out of range or fp16 weights.
    """
    check_weights("dense", dense, positions)
    check_entries("values", values, positions)
    seed = check_rounding_seed(rounding_seed, tensors(dense))
    choose("scatter_", impl, scatter_torch_, "compact_triton.scatter_", values.device)(dense, positions, values, seed)


@torch.no_grad()
def swap_(dense: Tensor | Sequence[Tensor], positions: Positions, values: Tensor, *, impl: str = "auto") -> None:
    """Exchanges `dense.view(-1)[positions]` and `values` [K] in place, bit for bit; two swaps change nothing.

    dense: as in `scatter_`. Raises ValueError when the dtypes differ (an exchange must not round), and else
    as `gather`.
    """
    check_weights("dense", dense, positions)
    check_entries("values", values, positions)
    for tensor in tensors(dense)[:1]:
        check_dtype("values", values, tensor.dtype)
    choose("swap_", impl, _swap_torch_, "compact_triton.swap_", values.device)(dense, positions, values)


def tensors(dense: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [dense] if isinstance(dense, Tensor) else dense


def check_weights(name: str, dense: Tensor | Sequence[Tensor], positions: Positions) -> None:
    if not isinstance(positions, Positions):
        raise ValueError(f"positions: expected Positions (see Positions.pack), got {type(positions).__name__}")
    given = tensors(dense)
    if tuple(tensor.numel() for tensor in given) != positions.sizes:
        raise ValueError(f"{name}: expected {positions.sizes} weights, got {tuple(t.numel() for t in given)}")
    for tensor in given:
        check_dtype(name, tensor, *(FLOATS if tensor is given[0] else (given[0].dtype,)))
        check_device(name, tensor, positions.device)
        check_contiguous(name, tensor)


def check_entries(name: str, tensor: Tensor, positions: Positions) -> None:
    check_shape(name, tensor, (len(positions),))
    check_dtype(name, tensor, *FLOATS)
    check_device(name, tensor, positions.device)
    check_contiguous(name, tensor)


def gather_torch(dense, positions, out, accumulate=False, first_block: int = 0) -> Tensor:
    """`dense` may be a part of its tensor that starts with `first_block`; then only that part of `out` is written."""
    for entries, index in positions.chunks(first_block, first_block + blocks_of(dense.numel())):
        picked = dense.view(-1).index_select(0, index)
        if accumulate:
            out[entries] += picked  # in fp32: a sum of two bf16 is rounded once, like one with fp32
        else:
            out[entries] = picked
    return out


def scatter_torch_(dense, positions, values, rounding_seed=None) -> None:
    for tensor, part, mine in _each(dense, positions, values):
        for entries, index in part.chunks(0, part.blocks):
            value = mine[entries]
            if rounding_seed is not None:
                value = stochastically(value.float(), index % SPAN, rounding_seed)
            tensor.view(-1).index_copy_(0, index, value.to(tensor.dtype))


def _swap_torch_(dense, positions, values) -> None:
    for tensor, part, mine in _each(dense, positions, values):
        held = gather_torch(tensor, part, torch.empty_like(mine))
        scatter_torch_(tensor, part, mine)
        mine.copy_(held)


def _each(dense, positions: Positions, values: Tensor) -> Iterator[tuple[Tensor, Positions, Tensor]]:
    return zip(tensors(dense), positions.parts, values.split(positions.counts), strict=True)
