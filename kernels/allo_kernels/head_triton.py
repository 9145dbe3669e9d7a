"""The Triton kernels of head.py: logits one tile at a time, in registers, never in memory.

forward   per tile the log-sum-exp of its columns [tiles, n], and the target's logit from the tile that has it
backward  d loss / d logits of a chunk of the vocabulary, recomputed; cuBLAS multiplies it with weight and hidden

Exponents are of 2: what a device has is the power of 2, so that log2(e), temperature and cap are one factor.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from allo_kernels.compact_triton import gather  # noqa: F401, the third of what this module computes
from allo_kernels.head_torch import Head, Rows
from allo_kernels.launching import TL_DTYPES, capability, dot, launch, to_nearest

_GROUP = 16  # row tiles that share a stretch of the weight while it is in the cache
_LN2, _LOG2_E = tl.constexpr(math.log(2)), tl.constexpr(math.log2(math.e))


@triton.jit
def _tile_at(n, columns, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """First row and column tile of this program: down a group of row tiles, then on to the next columns."""
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return (first + inside % height) * BLOCK_N, inside // height


@triton.jit
def _tile_logits(
    hidden,
    weight,
    bias,
    first_row,
    first_column,
    n,
    columns,
    width,
    inverse_cap,
    DESCRIBED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
):
    """fp32 logits of one tile, with inverse_cap their tanh; what lies outside the matrices is finite."""
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    column = tl.minimum(first_column + tl.arange(0, BLOCK_V), columns - 1)
    if DESCRIBED:
        for d in range(0, width, BLOCK_D):
            logits = dot(hidden.load([first_row, d]), weight.load([first_column, d]).T, logits)
    else:
        row = tl.minimum(first_row + tl.arange(0, BLOCK_N), n - 1)
        depth = tl.arange(0, BLOCK_D)
        left = hidden + row.to(tl.int64)[:, None] * width + depth[None, :]
        right = weight + column.to(tl.int64)[None, :] * width + depth[:, None]
        for d in range(0, width, BLOCK_D):
            if WHOLE_WIDTH:
                logits = dot(tl.load(left), tl.load(right), logits)
            else:
                inside = depth < width - d
                a = tl.load(left, mask=inside[None, :], other=0.0)
                b = tl.load(right, mask=inside[:, None], other=0.0)
                logits = dot(a, b, logits)
            left += BLOCK_D
            right += BLOCK_D
    if bias is not None:
        logits += tl.load(bias + column).to(tl.float32)[None, :]
    if inverse_cap is not None:
        logits = _tanh(logits * inverse_cap)
    return logits


@triton.jit
def _tanh(x):
    """To a few roundings of the result: by exp, and near zero, where that would lose digits, by Cephes' polynomial."""
    large = 1.0 - 2.0 / (tl.exp2(2.0 * tl.abs(x) * _LOG2_E) + 1.0)
    square = x * x
    series = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    series = ((series + 1.33314422036e-1) * square - 3.33332819422e-1) * square
    return tl.where(tl.abs(x) < 0.625, x + x * series, tl.where(x < 0, -large, large))


@triton.jit(do_not_specialize=["n"])
def _target_and_lse_kernel(
    targets,
    hidden,
    weight,
    bias,
    chosen,
    parts,
    n,
    columns,
    width,
    scale,
    inverse_cap,
    DESCRIBED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    first_row, column_tile = _tile_at(n, columns, BLOCK_N, BLOCK_V, GROUP)
    first_column = column_tile * BLOCK_V
    logits = _tile_logits(
        hidden, weight, bias, first_row, first_column, n, columns, width, inverse_cap,
        DESCRIBED, BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_WIDTH,
    )  # fmt: skip
    row, in_tile = first_row + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    if first_column + BLOCK_V > columns:
        logits = tl.where(in_tile[None, :] < columns - first_column, logits, -float("inf"))
    # Scaled where it is used: a scaled copy of the tile would not fit into registers beside it.
    highest = tl.max(logits, 1)
    # A tile of words that a bias rules out, or one whose logit overflowed: as torch.logsumexp, no inf - inf.
    highest = tl.where(tl.abs(highest) == float("inf"), 0.0, highest) * scale
    lse = highest + tl.log2(tl.sum(tl.exp2(logits * scale - highest[:, None]), 1))
    inside = row < n
    tl.store(parts + column_tile.to(tl.int64) * n + row, lse * _LN2, mask=inside)
    target = tl.load(targets + row, mask=inside, other=-1) - first_column
    mine = (target >= 0) & (target < tl.minimum(BLOCK_V, columns - first_column))
    if tl.max(mine.to(tl.int32), 0) > 0:
        logit = tl.max(tl.where(in_tile[None, :] == target[:, None], logits, -float("inf")), 1)
        tl.store(chosen + row, logit * (scale * _LN2), mask=mine)


@triton.jit(do_not_specialize=["n", "first"])
def _d_logits_kernel(
    targets,
    hidden,
    weight,
    bias,
    lse,
    upstream,
    out,
    n,
    columns,
    first,
    width,
    pitch,
    scale,
    inverse_cap,
    inverse_temperature,
    DTYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    first_row, column_tile = _tile_at(n, columns, BLOCK_N, BLOCK_V, GROUP)
    first_column = column_tile * BLOCK_V
    logits = _tile_logits(
        hidden, weight, bias, first_row, first_column, n, columns, width, inverse_cap,
        DESCRIBED, BLOCK_N, BLOCK_V, BLOCK_D, WHOLE_WIDTH,
    )  # fmt: skip
    row, in_tile = first_row + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    inside = row < n
    target = tl.load(targets + row, mask=inside, other=-1) - first - first_column
    slope = -tl.load(upstream + row, mask=inside, other=0.0) * inverse_temperature
    shift = tl.load(lse + row, mask=inside, other=0.0) * _LOG2_E
    found = tl.exp2(logits * scale - shift[:, None])
    mine = (target >= 0) & (target < BLOCK_V)
    if tl.max(mine.to(tl.int32), 0) > 0:
        found = tl.where(in_tile[None, :] == target[:, None], found - 1.0, found)
    found *= slope[:, None]
    if inverse_cap is not None:
        found *= 1.0 - logits * logits
    # `out` has whole tiles, so nothing is masked.
    if DESCRIBED:
        out.store([first_row, first_column], to_nearest(found, DTYPE))
    else:
        at = out + row.to(tl.int64)[:, None] * pitch + first_column + in_tile[None, :]
        tl.store(at, to_nearest(found, DTYPE))


def target_and_lse(rows: Rows, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The target's logit, NaN for one outside the vocabulary, and the log of the sum of all exponentials: fp32 [n]."""
    n, columns, tile = len(rows.targets), len(weight), TILES[tile_name(rows.hidden, weight, head, "target_and_lse")]
    tiles = triton.cdiv(columns, tile.BLOCK_V)
    chosen = torch.full((n,), torch.nan, device=weight.device)
    parts = torch.empty((tiles, n), dtype=torch.float32, device=weight.device)
    launch(
        _target_and_lse_kernel,
        (tiles * triton.cdiv(n, tile.BLOCK_N),),
        *(rows.targets, *_matrices(rows.hidden, weight, tile), bias, chosen, parts, n, columns, weight.shape[1]),
        **_constants(head, weight, tile),
    )
    return chosen, parts.logsumexp(0)


def d_logits(rows: Rows, weight: Tensor, bias: Tensor | None, first: int, head: Head) -> Tensor:
    """d (upstream . logps) / d logits [n, columns] in the weight's dtype, of the columns from `first` on.

    Rows of the result begin at a multiple of a tile, as cuBLAS's fast kernels want it.
    """
    n, columns, tile = len(rows.targets), len(weight), TILES[tile_name(rows.hidden, weight, head, "d_logits")]
    row_tiles, column_tiles = triton.cdiv(n, tile.BLOCK_N), triton.cdiv(columns, tile.BLOCK_V)
    shape = (row_tiles * tile.BLOCK_N, column_tiles * tile.BLOCK_V)
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    target = _described(out, tile.BLOCK_N, tile.BLOCK_V) if tile.DESCRIBED else out
    launch(
        _d_logits_kernel,
        (row_tiles * column_tiles,),
        *(rows.targets, *_matrices(rows.hidden, weight, tile), bias, rows.lse, rows.upstream, target),
        *(n, columns, first, weight.shape[1], shape[1]),
        inverse_temperature=1.0 / head.temperature,
        DTYPE=TL_DTYPES[weight.dtype],
        **_constants(head, weight, tile),
    )
    return out[:n, :columns]


@dataclass(frozen=True)
class Tile:
    """Rows, words and depth of a tile, and how it is run; DESCRIBED: copied by tensor descriptors (TMA)."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    DESCRIBED: bool = False


# What keeps the matrix units busy without spilling a register (`aot` counts).
TILES = {
    "interpreter": Tile(16, 32, 16, 4, 1),  # small, so that small tests have several tiles each way
    "fp32": Tile(64, 64, 32, 4, 3),  # no matrix units at full precision
    "fp32, uneven": Tile(64, 32, 32, 4, 3),  # masks take registers
    "any": Tile(128, 128, 32, 8, 4),  # at most 99 KiB of shared memory on some
    "sm_90": Tile(128, 256, 64, 8, 4, True),  # two warp groups, 192 KiB of shared memory
    "sm_90, d_logits with a cap": Tile(128, 128, 64, 8, 4, True),  # whose derivative takes registers
}


def tile_name(hidden: Tensor, weight: Tensor, head: Head, kernel: str) -> str:
    """The entry of TILES with which `kernel` runs on the weight's device."""
    device = capability(weight)
    if device is None:
        return "interpreter"
    if weight.dtype == torch.float32:
        return "fp32" if weight.shape[1] % TILES["fp32"].BLOCK_D == 0 else "fp32, uneven"
    # A descriptor's rows begin at 16 bytes.
    aligned = not any(tensor.data_ptr() % 16 or tensor.shape[1] % 8 for tensor in (hidden, weight))
    if device[0] not in (9, 10) or not aligned:
        return "any"
    return "sm_90" if kernel == "target_and_lse" or head.softcap is None else "sm_90, d_logits with a cap"


def _matrices(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple:
    if not tile.DESCRIBED:
        return hidden, weight
    return _described(hidden, tile.BLOCK_N, tile.BLOCK_D), _described(weight, tile.BLOCK_V, tile.BLOCK_D)


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """In tiles of rows x columns; a contiguous matrix of one row may have any stride between rows."""
    return TensorDescriptor(matrix, [*matrix.shape], [matrix.shape[1], 1], [rows, columns])


def _constants(head: Head, weight: Tensor, tile: Tile) -> dict:
    return {
        "scale": math.log2(math.e) * (head.softcap or 1.0) / head.temperature,
        "inverse_cap": None if head.softcap is None else 1.0 / head.softcap,
        "WHOLE_WIDTH": weight.shape[1] % tile.BLOCK_D == 0,
        "GROUP": _GROUP,
        **vars(tile),
    }
