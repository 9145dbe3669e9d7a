"""Which examples an optimizer step has, and how it is cut into micro-batches. An example is known by its number."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from allo_fast.data.arrays import Chunks
from allo_fast.data.corpus import Corpus

MicroBatch = tuple[int, ...]  # examples of one forward pass
Rows = tuple[int, int]  # of examples in one batch: how many, how wide; of packed ones tokens, and 1


def shuffled(corpus: Corpus, seed: int) -> np.ndarray:
    """The examples, int32 [n, 1 or 2], in the order of their numbers: problems are shuffled, those of one together."""
    examples = np.asarray(corpus.examples, dtype=np.int32)
    prompts, numbers = corpus.responses.prompts[examples[:, 0]], np.arange(len(examples), dtype=np.int32)
    place = np.zeros(len(corpus.prompts), dtype=np.int32)
    place[prompts[::-1]] = numbers[::-1]  # where each problem is first: the last value is the one that stays
    order = prompts[place[prompts] == numbers]
    random.Random(seed).shuffle(memoryview(order))
    place[order] = numbers[: len(order)]
    return examples[np.argsort(place[prompts], kind="stable")]


def plan_steps(problems: np.ndarray, size: int, epochs: int, seed: int) -> list[Chunks]:
    """Per epoch its optimizer steps, each a list of `size` examples; later epochs shuffle problems anew.

    problems: of each example, those of one problem next to each other.
    """
    planned, order = [], np.arange(len(problems), dtype=np.int32)
    number = np.cumsum(np.diff(problems, prepend=problems[:1]) != 0, dtype=np.int32)  # of its problem, from 0
    for epoch in range(epochs):
        if epoch:
            place = np.arange(number[-1] + 1, dtype=np.int32)
            random.Random(f"{seed} {epoch}").shuffle(memoryview(place))
            order = np.argsort(place[number], kind="stable").astype(np.int32)
        planned.append(Chunks(order, size))
    return planned


def cut(
    examples: Sequence[int],
    problem_of: Callable[[int], int],
    rows_of: Callable[[Sequence[int]], Rows],
    budget: int,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of at most `budget` positions, as many as `ranks` can divide if there are as many problems.

    The examples of one problem stay together, unless they are more than that by themselves. rows_of: what examples in
    one batch are to a model; one that has more than the budget by itself has a micro-batch to itself. Of packed rows
    large problems come first, each to the emptiest micro-batch, so that all are about as large; of padded ones those
    that are about as wide go together.
    """
    groups = [part for _, group in groupby(examples, problem_of) for part in _within(list(group), rows_of, budget)]
    rows = [rows_of(group) for group in groups]
    order = sorted(range(len(groups)), key=lambda number: (-rows[number][1], -rows[number][0]))
    if any(width > 1 for _, width in rows):
        bins = _divided(_in_order(order, rows, budget), ranks)
    else:
        sizes = [size for size, _ in rows]
        count, most = _up(-(-sum(sizes) // budget), ranks), max(budget, *sizes)
        while (bins := _dealt(order, sizes, min(count, len(groups)), most)) is None:
            count += ranks
    return [tuple(example for number in sorted(members) for example in groups[number]) for members in bins]


def _within(group: list[int], rows_of: Callable[[Sequence[int]], Rows], budget: int) -> list[list[int]]:
    """Cut between examples where it must be."""
    if math.prod(rows_of(group)) <= budget:
        return [group]
    parts: list[list[int]] = [[]]
    for example in group:
        if parts[-1] and math.prod(rows_of([*parts[-1], example])) > budget:
            parts.append([])
        parts[-1].append(example)
    return parts


def _in_order(order: list[int], rows: list[Rows], budget: int) -> list[list[int]]:
    """As many as fit, one micro-batch after another; the widest rows first."""
    bins: list[list[int]] = []
    filled = widest = 0
    for number in order:
        count, width = rows[number]
        if bins and (filled + count) * widest <= budget:
            filled += count
            bins[-1].append(number)
        else:
            filled, widest = count, width
            bins.append([number])
    return bins


def _divided(bins: list[list[int]], ranks: int) -> list[list[int]]:
    """The largest cut in two, until `ranks` can divide them, or nothing can be cut."""
    while len(bins) % ranks and len(largest := max(bins, key=len)) > 1:
        bins.remove(largest)
        bins += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return bins


def _dealt(order: list[int], sizes: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Into `count` micro-batches; None where that does not go within the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in order:
        place = min(range(count), key=filled.__getitem__)
        filled[place] += sizes[number]
        bins[place].append(number)
    return bins if max(filled) <= budget else None


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
