"""Which examples an optimizer step has, and how it is cut into micro-batches. An example is known by its number."""

import random
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from allo_fast.data.arrays import Chunks
from allo_fast.data.batch import Corpus

MicroBatch = tuple[int, ...]  # examples of one forward pass


def plan_chunks(corpus: Corpus, size: int, seed: int) -> Chunks:
    """The examples in the order of their numbers, `size` each: problems are shuffled, those of one problem together."""
    examples = np.asarray(corpus.examples, dtype=np.int32)
    prompts, numbers = corpus.responses.prompts[examples[:, 0]], np.arange(len(examples), dtype=np.int32)
    place = np.zeros(len(corpus.prompts), dtype=np.int32)
    place[prompts[::-1]] = numbers[::-1]  # where each problem is first: the last value is the one that stays
    order = prompts[place[prompts] == numbers]
    random.Random(seed).shuffle(memoryview(order))
    place[order] = numbers[: len(order)]
    return Chunks(examples[np.argsort(place[prompts], kind="stable")], size)


def plan_steps(chunks: int, per_step: int, epochs: int, seed: int) -> list[Chunks]:
    """Per epoch its optimizer steps, each a list of numbers of chunks; later epochs shuffle whole chunks."""
    planned = []
    for epoch in range(epochs):
        order = np.arange(chunks, dtype=np.int32)
        if epoch:
            random.Random(f"{seed} {epoch}").shuffle(memoryview(order))
        planned.append(Chunks(order, per_step))
    return planned


def cut(
    examples: Sequence[int],
    problem_of: Callable[[int], int],
    tokens_of: Callable[[Sequence[int]], int],
    budget: int,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Micro-batches of at most `budget` tokens, as many as `ranks` can divide if there are as many problems.

    The examples of one problem stay together, unless they are more than that by themselves. tokens_of: of examples in
    one batch; no single one has more than the budget. Large problems come first, each to the emptiest micro-batch, so
    that all are about as large.
    """
    groups = [part for _, group in groupby(examples, problem_of) for part in _within(list(group), tokens_of, budget)]
    sizes = [tokens_of(group) for group in groups]
    order = sorted(range(len(groups)), key=lambda number: -sizes[number])
    count = _up(-(-sum(sizes) // budget), ranks)
    while (bins := _dealt(order, sizes, min(count, len(groups)), budget)) is None:
        count += ranks
    return [tuple(example for number in sorted(members) for example in groups[number]) for members in bins]


def _within(group: list[int], tokens_of: Callable[[Sequence[int]], int], budget: int) -> list[list[int]]:
    """Cut between examples where it must be."""
    if tokens_of(group) <= budget:
        return [group]
    parts: list[list[int]] = [[]]
    for example in group:
        if parts[-1] and tokens_of([*parts[-1], example]) > budget:
            parts.append([])
        parts[-1].append(example)
    return parts


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
