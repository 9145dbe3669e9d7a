"""How locating divides a model's weights: the fewest windows whose sums fit beside the base; on paper and in a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from allo_fast.config import LocateConfig, ModelConfig
from allo_fast.locating.families import FAMILIES
from allo_fast.locating.windows import Piece, cut, filled, largest_of, square_windows, windows_of
from allo_fast.plan.costs import HEAD_BYTES, USABLE, activation_bytes, gathered_bytes
from allo_fast.plan.shapes import BYTES, Shape

LEAN = 0.5  # bytes a weight that the sums of a window take where nobody knows what there is room for


def sums_per_weight(score: str) -> int:
    """Bytes: the step's gradient and the family's own, in float32."""
    return 4 * (1 + FAMILIES[score].states)


@dataclass(frozen=True)
class Division:
    """windows: of the passes for scores; squares: of those before them that keep squares alone. largest: weights."""

    windows: int
    squares: int
    largest: int
    largest_squares: int

    @property
    def passes(self) -> int:
        return self.windows + self.squares


def windows(
    locate: LocateConfig, score: str, pieces: Sequence[Piece], room: float | None, whole: int = 1, shares: int = 1
) -> int:
    """How many passes for scores, at most.

    room: bytes beside the base on a device; None: as few as `LEAN`. whole: ranks that hold the whole base and divide
    the windows; shares: ranks that share it by ZeRO-3, and a window's sums but for the step's gradient.
    """
    if locate.windows != "auto":
        return locate.windows
    if locate.accumulators == "host":
        fewest = 1
    elif room is None:
        fewest = math.ceil(sums_per_weight(score) / LEAN)
    else:
        fewest = len(filled(pieces, room / _pass_bytes(score, shares)))
    return min(len(pieces), math.ceil(fewest / whole) * whole)


def _pass_bytes(score: str, shares: int) -> float:
    """Of a weight in a pass for scores; under ZeRO-3 a share of the reduced gradient is there beside the whole one."""
    return 4 + 4 * (FAMILIES[score].states + (shares > 1)) / shares


@cache
def divide(score: str, clip: bool, sizes: tuple[int, ...], count: int, shares: int = 1) -> Division:
    """Weights of these sizes in `count` windows, as Sweep does. Raises UserError where there are fewer pieces."""
    scored, squares = windows_of(pieces_on_paper(sizes), count), []
    if len(scored) > 1 and clip and FAMILIES[score].needs_norm:  # whose steps are clipped by the norm of all weights
        squares = square_windows(scored, FAMILIES[score].states, shares)
    return Division(len(scored), len(squares), largest_of(scored), largest_of(squares))


@cache
def pieces_on_paper(sizes: tuple[int, ...]) -> list[Piece]:
    """As of a model with weights of these sizes."""
    return cut({str(number): size for number, size in enumerate(sizes)})


def beside_sums(shape: Shape, model: ModelConfig, tokens: int, sharded: bool) -> dict[str, int]:
    """Bytes of what lives within a step of locating, by kind, beside base and sums; tokens: padding included."""
    width = BYTES[model.dtype]
    return {
        "activations": activation_bytes(shape, model, tokens),
        "cut states": 0 if sharded else 2 * tokens * shape.hidden * width,
        "transient dW": width * (shape.largest or max(shape.sizes)),
        "head workspace": HEAD_BYTES,
        "gathered weights": gathered_bytes(shape, None, width) if sharded else 0,
    }


def base_bytes(shape: Shape, model: ModelConfig, shares: int) -> int:
    """Of the frozen base on a device, in as many ZeRO-3 shares."""
    return BYTES[model.dtype] * sum(math.ceil(size / shares) for size in shape.sizes)


def room_beside(shape: Shape, model: ModelConfig, tokens: int, device_bytes: float, shares: int = 1) -> float:
    """Bytes that a device has for the sums of a window, while the model runs on `tokens` at once."""
    taken = base_bytes(shape, model, shares) + sum(beside_sums(shape, model, tokens, shares > 1).values())
    return max(1.0, USABLE * device_bytes - taken)
