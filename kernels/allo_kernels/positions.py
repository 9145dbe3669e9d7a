"""Where the selected weights lie: 2 bytes each, checked once, for one tensor or many."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from allo_kernels.checks import check_contiguous, check_device, check_dtype, check_not_capturing

SPAN = 1 << 16  # weights per block: what 16 bits can tell apart
_CHUNK = 32  # blocks decoded at once in PyTorch: their int64 indices stay in the cache


def blocks_of(size: int) -> int:
    return -(-size // SPAN)


@dataclass(frozen=True, eq=False)
class Positions:
    """Sorted, unique flat positions in one tensor of `sizes[0]` weights, or in several one after another.

    A tensor is cut into blocks of 65536 weights (each tensor starts a new one). `low`: uint16 [K], positions within
    their block; `starts`: int64 [blocks + 1], where each block's positions begin in `low`; `counts`: how many each
    tensor has. At 5 % that is 0.1 bytes per weight; docs/decisions.md compares it with a bitmask and int32.
    """

    low: Tensor
    starts: Tensor
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    # Addresses of every block, by the weights' own and their dtype, which together say what each block's is; kept as
    # long as the positions, for graphs that were captured.
    tables: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name, tensor, dtype in (("low", self.low, torch.uint16), ("starts", self.starts, torch.int64)):
            check_dtype(name, tensor, dtype)
            check_device(name, tensor, self.low.device)
            check_contiguous(name, tensor)

    @classmethod
    def pack(cls, indices: Tensor, size: int) -> "Positions":
        """From int32 or int64 flat indices [K] into a tensor of `size` weights.

        Raises ValueError when they are not sorted, not unique or outside 0..size-1. It waits for the host, and raises
        RuntimeError while a CUDA graph is captured.
        """
        check_not_capturing("Positions.pack")
        check_dtype("indices", indices, torch.int32, torch.int64)
        if indices.ndim != 1:
            raise ValueError(f"indices: expected one dimension, got shape {tuple(indices.shape)}")
        if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < size:
            raise ValueError(f"indices: expected 0..{size - 1}, got {int(indices[0])}..{int(indices[-1])}")
        if not bool((indices[1:] > indices[:-1]).all()):
            raise ValueError("indices: expected sorted positions without duplicates")
        starts = torch.zeros(blocks_of(size) + 1, dtype=torch.int64, device=indices.device)
        edges = torch.arange(len(starts) - 1, device=indices.device).mul_(SPAN)
        starts[:-1] = torch.searchsorted(indices.long(), edges)
        starts[-1] = len(indices)
        return cls((indices & (SPAN - 1)).to(torch.uint16), starts, (size,), (len(indices),))

    @classmethod
    def checked(cls, low: Tensor, starts: Tensor, size: int) -> "Positions":
        """From `low` and `starts` that come from outside. Raises ValueError when they are not what `pack` makes."""
        check_not_capturing("Positions.checked")
        check_dtype("low", low, torch.uint16)
        check_dtype("starts", starts, torch.int64)
        if low.ndim != 1 or starts.ndim != 1 or not isinstance(size, int):
            raise ValueError(f"low, starts, size: expected [K], [blocks + 1], integer; got {low.shape}, {starts.shape}")
        per_block = starts.diff()
        fits = starts.shape == (blocks_of(size) + 1,) and int(starts[0]) == 0 and int(starts[-1]) == low.numel()
        if not fits or not bool(((per_block >= 0) & (per_block <= SPAN)).all()):
            raise ValueError(f"starts: they do not divide {low.numel()} positions in a tensor of {size}")
        return cls.pack(cls(low.contiguous(), starts.contiguous(), (size,), (low.numel(),)).unpack(), size)

    @classmethod
    def cat(cls, parts: Sequence["Positions"]) -> "Positions":
        """Of several tensors, in their order. Raises ValueError for none."""
        if not parts:
            raise ValueError("parts: expected at least one Positions")
        starts, total = [], 0
        for part in parts:
            starts.append(part.starts[:-1] + total)
            total += len(part)
        starts.append(parts[0].starts.new_tensor([total]))
        sizes, counts = (tuple(x for part in parts for x in getattr(part, field)) for field in ("sizes", "counts"))
        return cls(torch.cat([part.low for part in parts]), torch.cat(starts), sizes, counts)

    @cached_property
    def parts(self) -> list["Positions"]:
        """One for each tensor; `low` stays shared."""
        parts, block, entry = [], 0, 0
        for size, count in zip(self.sizes, self.counts, strict=True):
            blocks = blocks_of(size)
            starts = self.starts[block : block + blocks + 1] - entry
            parts.append(Positions(self.low[entry : entry + count], starts, (size,), (count,)))
            block, entry = block + blocks, entry + count
        return parts

    def __len__(self) -> int:
        return len(self.low)

    @property
    def blocks(self) -> int:
        return len(self.starts) - 1

    @property
    def device(self) -> torch.device:
        return self.low.device

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.starts.nbytes

    def to(self, device: torch.device) -> "Positions":
        return Positions(self.low.to(device), self.starts.to(device), self.sizes, self.counts)

    def unpack(self) -> Tensor:
        """Flat positions in the tensor -> int64 [K]."""
        found = [index for _, index in self.chunks(0, self.blocks)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=self.device)

    def chunks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Of the blocks `first`..`last - 1`: which entries, and their int64 positions counted from block `first`."""
        check_not_capturing("decoding positions in PyTorch")
        starts = self.starts[first : last + 1].tolist()
        for block in range(0, last - first, _CHUNK):
            edges = starts[block : block + _CHUNK + 1]
            entries = slice(edges[0], edges[-1])
            index = self.low[entries].cpu().numpy().astype(np.int64)  # its small sums are quicker
            for base, (begin, end) in enumerate(pairwise(edges), block):
                index[begin - edges[0] : end - edges[0]] += base * SPAN
            yield entries, torch.from_numpy(index).to(self.device)
