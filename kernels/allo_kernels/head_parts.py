"""How the head's work is cut, tokens into blocks and the vocabulary into chunks, and how many bytes that takes."""

import math
from collections.abc import Iterator

from torch import Tensor

from allo_kernels.positions import SPAN

# d loss / d hidden of a block of rows, summed in fp32 over the vocabulary: for any number of rows the memory is that of
# a block, and products with a chunk of words stay large.
BLOCK_BYTES = 128 << 20
BLOCK_ROWS = 1 << 16  # at most, of narrow models
# d loss / d logits of a chunk of words, and a compact gradient's part: what a CPU's cache holds, and what keeps a GPU's
# matrix units busy.
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 192 << 20}
CHUNK_STEP = {"cpu": 16, "cuda": 256}  # words; whole tiles, so that only the last chunk has an edge
MIN_WORDS = 1024  # narrower matrix products would be slower, however many the rows


def workspace_bytes(itemsize: int) -> int:
    """What token_logps takes on a GPU beside its inputs, outputs and gradients; itemsize: bytes of a hidden number.

    d_hidden of a block, the hidden states picked for it, and a chunk's two matrices. Of a dense gradient of the weight,
    for which all rows are one block, more where they are more; of widths that share few factors with 65536, too.
    """
    return BLOCK_BYTES + BLOCK_BYTES * itemsize // 4 + CHUNK_BYTES["cuda"]


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Ranges of the rows."""
    step = min(BLOCK_ROWS, max(1, BLOCK_BYTES // (4 * max(1, width)) // 128) * 128)
    yield from (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def word_chunks(rows: int, weight: Tensor, compact: bool = False) -> Iterator[tuple[int, int]]:
    """Ranges of the vocabulary; for a compact gradient they begin where a block of positions does."""
    device, width = "cpu" if weight.device.type == "cpu" else "cuda", weight.shape[1]
    word_bytes = rows * weight.element_size() + (4 * width if compact else 0)
    step = CHUNK_STEP[device]
    if compact:
        step = math.lcm(step, SPAN // math.gcd(SPAN, width))
    words = max(step, max(CHUNK_BYTES[device] // max(1, word_bytes), MIN_WORDS) // step * step)
    yield from ((first, min(first + words, len(weight))) for first in range(0, len(weight), words))
