"""The weights of a model cut into pieces, and the pieces into windows: what one pass over the pairs keeps sums of.

    window 0: | embedding 0..p | embedding p..2p | layer 0 q_proj |     window 1: | layer 0 k_proj | ...

Pieces depend on the model alone and every sum is of one piece, so that the number of windows shows in no bit, except of
models whose operations round otherwise where another weight has a gradient (torch.matmul, as in Mamba).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from allo_fast.config import UserError
from allo_fast.model.weights import VALUES, size_of

_LARGEST = 1 << 22  # weights of a piece, at most
_FEWEST = 128  # pieces that a model is cut into, at least, so that small ones have windows too


@dataclass(frozen=True)
class Piece:
    """Entries begin..end-1 of the flat weight `name`."""

    name: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def share(self, rank: int, world: int) -> "Piece":
        """What one of `world` ranks keeps of it."""
        part = -(-self.size // world)
        return Piece(self.name, min(self.end, self.begin + part * rank), min(self.end, self.begin + part * (rank + 1)))


def pieces_of(model: nn.Module) -> list[Piece]:
    """All weights, tied ones once, from the embedding up: a pass goes no deeper than its lowest piece."""
    return cut({n: size_of(w) for n, w in model.named_parameters() if not n.startswith(f"{VALUES}.")})


def cut(sizes: Mapping[str, int]) -> list[Piece]:
    """The pieces of weights of these sizes, by name."""
    step = min(_LARGEST, max(1, sum(sizes.values()) // _FEWEST))
    return [
        Piece(name, begin, min(begin + step, size)) for name, size in sizes.items() for begin in range(0, size, step)
    ]


def windows_of(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """At most `count` runs of pieces, the largest as small as it can be.

    Raises UserError where there are fewer pieces than that.
    """
    if count > len(pieces):
        raise UserError(
            f"locate.windows: expected 1..{len(pieces)}, the pieces that this model is cut into; got {count}"
        )
    piece, mean = max(piece.size for piece in pieces), -(-sum(piece.size for piece in pieces) // count)
    smallest, largest = max(piece, mean), piece + mean  # of which `count` are enough: each but the last has the mean
    while smallest < largest:  # the least capacity of which `count` are enough
        middle = (smallest + largest) // 2
        if len(filled(pieces, middle)) <= count:
            largest = middle
        else:
            smallest = middle + 1
    return filled(pieces, largest)


def largest_of(windows: Sequence[Sequence[Piece]]) -> int:
    """Weights of the largest window."""
    return max((sum(piece.size for piece in window) for window in windows), default=0)


def square_windows(windows: Sequence[Sequence[Piece]], states: int, shares: int = 1) -> list[list[Piece]]:
    """The fewest passes that keep squares alone, with sums no larger than those of `windows` for scores.

    states: of a weight's score. shares: ranks that share them; a step's gradient each of them has whole, and beside it
    its share of what they reduce.
    """
    reduced = int(shares > 1)
    capacity = largest_of(windows) * (shares + states + reduced) // (shares + reduced)
    return filled([piece for window in windows for piece in window], capacity)


def filled(pieces: Sequence[Piece], capacity: float) -> list[list[Piece]]:
    """The fewest runs of pieces with at most `capacity` weights each; a larger piece is a run of its own."""
    windows, room = [], 0
    for piece in pieces:
        size = piece.end - piece.begin
        if size > room:
            windows.append([])
            room = capacity
        windows[-1].append(piece)
        room -= size
    return windows
