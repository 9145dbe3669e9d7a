"""Reading and writing the selected entries of a dense tensor.

`positions` are sorted, unique flat indices, int32 or int64, on the tensor's device; `dense` is contiguous.
"""

from torch import Tensor

from allo_kernels.dispatch import choose

_CHUNK = 1 << 22  # entries indexed at once: bounds the int64 copy of int32 positions to 32 MiB


def gather(
    dense: Tensor, positions: Tensor, *, out: Tensor | None = None, accumulate: bool = False, impl: str = "auto"
) -> Tensor:
    """`dense.view(-1)[positions]` -> [K], in `out`'s dtype when given, added to it when `accumulate`.

    Raises ValueError when `dense` is not contiguous or `out` does not have one entry per position.
    """
    _check(dense, positions)
    if out is not None and out.shape != positions.shape:
        raise ValueError(f"out: expected shape {tuple(positions.shape)}, got {tuple(out.shape)}")
    return choose("gather", impl, {"torch": _gather_torch}, cuda=dense.is_cuda)(dense, positions, out, accumulate)


def scatter_(dense: Tensor, positions: Tensor, values: Tensor, *, impl: str = "auto") -> Tensor:
    """`dense.view(-1)[positions] = values` in place, rounded to `dense`'s dtype; returns `dense`.

    Raises ValueError when `dense` is not contiguous or the numbers of positions and values differ.
    """
    _check(dense, positions, values)
    return choose("scatter_", impl, {"torch": _scatter_torch}, cuda=dense.is_cuda)(dense, positions, values)


def swap_(dense: Tensor, positions: Tensor, values: Tensor, *, impl: str = "auto") -> None:
    """Exchanges `dense.view(-1)[positions]` and `values` [K] in place, bit for bit; two swaps change nothing.

    Raises ValueError when the dtypes differ (an exchange must not round), else as `scatter_`.
    """
    _check(dense, positions, values)
    if dense.dtype != values.dtype:
        raise ValueError(f"values: expected {dense.dtype} like dense, got {values.dtype}")
    choose("swap_", impl, {"torch": _swap_torch}, cuda=dense.is_cuda)(dense, positions, values)


def _check(dense: Tensor, positions: Tensor, values: Tensor | None = None) -> None:
    if not dense.is_contiguous():
        raise ValueError(f"dense: expected a contiguous tensor, got strides {dense.stride()}")
    if values is not None and values.shape != positions.shape:
        raise ValueError(f"values: expected shape {tuple(positions.shape)}, got {tuple(values.shape)}")


def _gather_torch(dense: Tensor, positions: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    picked = dense.view(-1).index_select(0, positions)
    if out is None:
        return picked
    return out.add_(picked) if accumulate else out.copy_(picked)


def _scatter_torch(dense: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    flat = dense.view(-1)
    for index, value in zip(positions.split(_CHUNK), values.split(_CHUNK), strict=True):
        flat.scatter_(0, index.long(), value.to(dense.dtype))
    return dense


def _swap_torch(dense: Tensor, positions: Tensor, values: Tensor) -> None:
    held = _gather_torch(dense, positions, None, False)
    _scatter_torch(dense, positions, values)
    values.copy_(held)
