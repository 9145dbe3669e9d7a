"""What token_logps takes beside its inputs, results included, counted on tensors that have no memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from allo_kernels import memory
from allo_kernels.head import token_logps
from allo_kernels.launching import recording
from allo_kernels.positions import Positions, blocks_of

_META = torch.device("meta")


@dataclass(frozen=True)
class Workspace:
    """Of forward and backward, the larger; head: whose weight gets no gradient, that of 5 % of it, or all of it."""

    rows: int
    width: int
    words: int
    head: str
    gradient_rows: int
    mib: float


def workspaces(shapes: Iterable[tuple[int, int]], rows: Iterable[int] = (8192, 65536)) -> Iterator[Workspace]:
    """In bfloat16 on a device of capability 9.0; shapes: (width, words). Half of the rows get a gradient, and all."""
    for width, words in shapes:
        for n in rows:
            for head in ("frozen", "5 %", "dense"):
                for gradient_rows in (n, n // 2):
                    taken = workspace(n, width, words, head, gradient_rows)
                    yield Workspace(n, width, words, head, gradient_rows, taken / 2**20)


def workspace(rows: int, width: int, words: int, head: str, gradient_rows: int) -> int:
    """Bytes. Nothing may ask the device for a number: tensors on meta have none to give, and raise."""
    dtype = torch.bfloat16
    hidden = torch.empty(rows, width, dtype=dtype, device=_META, requires_grad=True)
    weight = torch.empty(words, width, dtype=dtype, device=_META, requires_grad=head == "dense")
    targets, selected = torch.empty(rows, dtype=torch.int64, device=_META), {}
    if head == "5 %":
        entries = weight.numel() // 20
        low = torch.empty(entries, dtype=torch.uint16, device=_META)
        starts = torch.empty(blocks_of(weight.numel()) + 1, dtype=torch.int64, device=_META)
        positions = Positions(low, starts, (weight.numel(),), (entries,))
        selected = {"values": torch.empty(entries, device=_META, requires_grad=True), "positions": positions}
    leaves = [leaf for leaf in (hidden, weight, selected.get("values")) if leaf is not None and leaf.requires_grad]
    known = {"target_rows": rows, "gradient_rows": gradient_rows}
    with recording((9, 0), keep=False), memory.Live() as live:
        logps = token_logps(hidden, weight, targets, impl="triton", **known, **selected)
        torch.autograd.grad(logps, leaves, torch.empty_like(logps))
    return live.most
