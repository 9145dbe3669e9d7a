"""The Triton kernels of token_logps.py: logits one tile at a time, in registers, never in memory.

forward   per tile the log-sum-exp of its columns [tiles, n], and the target's logit from the tile that has it
backward  d loss / d logits of a chunk of the vocabulary, recomputed; cuBLAS multiplies it with weight and hidden
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from allo_kernels.compact_triton import gather
from allo_kernels.launch import TL_DTYPES, capability, dot, launch, to_nearest
from allo_kernels.token_logps import Head, Rows

_GROUP = 16  # row tiles that share a stretch of the weight while it is in the cache


def kernels() -> tuple[Callable, Callable, Callable]:
    return _target_and_lse, _d_logits, gather


@triton.jit
def _tile_offsets(n, columns, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile: down a group of row tiles, then on to the next columns."""
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    column_tile = inside // height
    row = (first + inside % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, column_tile * BLOCK_V + tl.arange(0, BLOCK_V), column_tile


@triton.jit
def _tile_logits(
    hidden,
    weight,
    bias,
    row,
    column,
    n,
    columns,
    width,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 logits of one tile; what lies outside the matrices repeats their edge."""
    depth = tl.arange(0, BLOCK_D)
    left = hidden + tl.minimum(row, n - 1).to(tl.int64)[:, None] * width + depth[None, :]
    right = weight + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * width + depth[:, None]
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
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
    if HAS_BIAS:
        logits += tl.load(bias + tl.minimum(column, columns - 1)).to(tl.float32)[None, :]
    if HAS_CAP:
        logits = softcap * _tanh(logits / softcap)
    return logits * inverse_temperature


@triton.jit
def _tanh(x):
    """To a few roundings of the result: by exp, and near zero, where that would lose digits, by Cephes' polynomial."""
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    square = x * x
    series = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    series = ((series + 1.33314422036e-1) * square - 3.33332819422e-1) * square
    return tl.where(tl.abs(x) < 0.625, x + x * series, tl.where(x < 0, -large, large))


@triton.jit(do_not_specialize=["n"])
def _target_and_lse_kernel(
    hidden,
    weight,
    bias,
    targets,
    chosen,
    parts,
    n,
    columns,
    width,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, column, column_tile = _tile_offsets(n, columns, BLOCK_N, BLOCK_V, GROUP)
    logits = _tile_logits(
        hidden, weight, bias, row, column, n, columns, width, softcap, inverse_temperature,
        HAS_BIAS, HAS_CAP, WHOLE_WIDTH, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits = tl.where(column[None, :] < columns, logits, -float("inf"))
    highest = tl.max(logits, 1)
    # A tile of words that a bias rules out, or one whose logit overflowed: as torch.logsumexp, no inf - inf.
    highest = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    lse = highest + tl.log(tl.sum(tl.exp(logits - highest[:, None]), 1))
    inside = row < n
    tl.store(parts + column_tile.to(tl.int64) * n + row, lse, mask=inside)
    target = tl.load(targets + row, mask=inside, other=-1)
    mine = target // BLOCK_V == column_tile
    logit = tl.max(tl.where(column[None, :] == target[:, None], logits, -float("inf")), 1)
    tl.store(chosen + row, logit, mask=inside & mine)


@triton.jit(do_not_specialize=["n", "first"])
def _d_logits_kernel(
    hidden,
    weight,
    bias,
    targets,
    lse,
    upstream,
    out,
    n,
    columns,
    first,
    width,
    softcap,
    inverse_temperature,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, column, _ = _tile_offsets(n, columns, BLOCK_N, BLOCK_V, GROUP)
    logits = _tile_logits(
        hidden, weight, bias, row, column, n, columns, width, softcap, inverse_temperature,
        HAS_BIAS, HAS_CAP, WHOLE_WIDTH, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    inside = row < n
    target = tl.load(targets + row, mask=inside, other=-1) - first
    scale = tl.load(upstream + row, mask=inside, other=0.0) * inverse_temperature
    softmax = tl.exp(logits - tl.load(lse + row, mask=inside, other=0.0)[:, None])
    found = (tl.where(column[None, :] == target[:, None], 1.0, 0.0) - softmax) * scale[:, None]
    if HAS_CAP:
        inverse_cap = 1.0 / (softcap * inverse_temperature)
        found *= 1.0 - (logits * inverse_cap) * (logits * inverse_cap)
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(at, to_nearest(found, DTYPE), mask=inside[:, None] & (column < columns)[None, :])


def _target_and_lse(rows: Rows, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """The target's logit and the log of the sum of all exponentials, fp32 [n] each."""
    n, columns, blocks = len(rows.targets), len(weight), _tile(weight, head, bias)
    tiles = triton.cdiv(columns, blocks["BLOCK_V"])
    chosen = torch.empty(n, dtype=torch.float32, device=weight.device)
    parts = torch.empty((tiles, n), dtype=torch.float32, device=weight.device)
    launch(
        _target_and_lse_kernel,
        (tiles * triton.cdiv(n, blocks["BLOCK_N"]),),
        *(rows.hidden, weight, weight if bias is None else bias, rows.targets, chosen, parts, n, columns),
        **_head_arguments(head, weight, bias, blocks),
    )
    return chosen, parts.logsumexp(0)


def _d_logits(rows: Rows, weight: Tensor, bias: Tensor | None, first: int, head: Head) -> Tensor:
    """d (upstream . logps) / d logits [n, columns] in the weight's dtype, of the columns from `first` on."""
    n, columns, blocks = len(rows.targets), len(weight), _tile(weight, head, bias)
    out = torch.empty((n, columns), dtype=weight.dtype, device=weight.device)
    launch(
        _d_logits_kernel,
        (triton.cdiv(columns, blocks["BLOCK_V"]) * triton.cdiv(n, blocks["BLOCK_N"]),),
        *(rows.hidden, weight, weight if bias is None else bias, rows.targets, rows.lse, rows.upstream, out),
        *(n, columns, first),
        DTYPE=TL_DTYPES[weight.dtype],
        **_head_arguments(head, weight, bias, blocks),
    )
    return out


def _head_arguments(head: Head, weight: Tensor, bias: Tensor | None, blocks: dict) -> dict:
    return {
        "width": weight.shape[1],
        "softcap": float(head.softcap or 1.0),
        "inverse_temperature": 1.0 / head.temperature,
        "HAS_BIAS": bias is not None,
        "HAS_CAP": head.softcap is not None,
        "WHOLE_WIDTH": weight.shape[1] % blocks["BLOCK_D"] == 0,
        "GROUP": _GROUP,
        **blocks,
    }


@dataclass(frozen=True)
class Tile:
    """Rows, words and depth of a tile, and how it is run."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# What keeps the matrix units busy without spilling a register (`aot` counts).
TILES = {
    "interpreter": Tile(16, 32, 16, 4, 1),  # small, so that small tests have several tiles each way
    "fp32": Tile(64, 64, 32, 4, 3),  # no matrix units at full precision
    "fp32, uneven": Tile(64, 32, 32, 4, 3),
    "sm_90": Tile(128, 256, 64, 8, 3),  # two warp groups, 144 KiB of shared memory
    "sm_90, cap or bias": Tile(128, 128, 64, 8, 4),  # they take registers
    "sm_90, uneven": Tile(128, 64, 64, 8, 4),  # so do masks and odd addresses
    "any": Tile(128, 128, 32, 8, 4),  # at most 99 KiB of shared memory on some
}


def tile_name(weight: Tensor, plain: bool) -> str:
    """The entry of TILES for this weight on its device; plain: without a cap and a bias."""
    device, even = capability(weight), weight.shape[1] % 64 == 0 and weight.shape[0] % 16 == 0
    if device is None:
        return "interpreter"
    if weight.dtype == torch.float32:
        return "fp32" if even else "fp32, uneven"
    if device[0] not in (9, 10):
        return "any"
    return "sm_90, uneven" if not even else "sm_90" if plain else "sm_90, cap or bias"


def _tile(weight: Tensor, head: Head, bias: Tensor | None) -> dict[str, int]:
    return asdict(TILES[tile_name(weight, head.softcap is None and bias is None)])
