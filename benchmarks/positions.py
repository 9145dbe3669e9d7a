"""Formats for the positions of selected weights: bytes per weight, and the time to find all of them again.

Decoding stands for what every use of the positions begins with; on a GPU the kernels decode the 16-bit format in
registers, so that there only the bytes count.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from allo_kernels import Positions


def run(weights: int, ratios: tuple[float, ...], rounds: int = 5) -> list[tuple[float, str, float, float]]:
    """Prints and returns (ratio, format, bytes per weight, median ms to decode)."""
    rows = []
    print(f"{'ratio':<7}{'format':<14}{'bytes_per_weight':>17}{'decode_median_ms':>18}")
    for ratio in ratios:
        mask = torch.rand(weights, generator=torch.Generator().manual_seed(0)) < ratio
        expected = mask.nonzero().squeeze(1)
        for name, (size, decode) in _formats(mask, expected).items():
            if not torch.equal(decode(), expected):
                raise AssertionError(f"{name}: decoded positions differ")
            rows.append((ratio, name, size / weights, _median_ms(decode, rounds)))
            print(f"{ratio:<7}{name:<14}{rows[-1][2]:>17.4f}{rows[-1][3]:>18.1f}")
    return rows


def _formats(mask: Tensor, indices: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (padded.to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)
    narrow, packed = indices.to(torch.int32), Positions.pack(indices, len(mask))
    return {
        "bitmask": (bits.nbytes, lambda: (bits[:, None] >> shifts & 1).view(-1).nonzero().squeeze(1)),
        "int32": (narrow.nbytes, narrow.long),
        "16 bits": (packed.nbytes, packed.unpack),
    }


def _median_ms(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
