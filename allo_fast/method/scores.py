"""Scores of weights, made a part at a time when they are looked at, so that no second model of scores exists."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from allo_fast import ranks
from allo_fast.model.weights import size_of

_LOOK = 1 << 22  # scores that are looked at at once: a tensor's may be half a billion, and each takes several copies
_DRAW = 1 << 20  # random scores are drawn for this many weights at once, wherever a part of them begins


class Score(Protocol):
    """Of one tensor; parts are flat, of entries begin..end-1, and lie within this rank's share of it."""

    def numel(self) -> int: ...

    def part(self, begin: int, end: int) -> Tensor:
        """|score|, bf16, fp16 or fp32 [end - begin]."""


@dataclass(frozen=True)
class Given:
    """|x| of a tensor: scores that were given, or of weights their magnitude."""

    tensor: Tensor

    def numel(self) -> int:
        return size_of(self.tensor)

    def part(self, begin: int, end: int) -> Tensor:
        first, share = ranks.share(self.tensor)
        return share[begin - first : end - first].abs()


@dataclass(frozen=True)
class Change:
    """|after - before| in fp32."""

    before: Tensor
    after: Tensor

    def numel(self) -> int:
        return size_of(self.before)

    def part(self, begin: int, end: int) -> Tensor:
        first, old = ranks.share(self.before)
        _, new = ranks.share(self.after)
        here = slice(begin - first, end - first)
        return (new[here].float() - old[here].float()).abs_()


@dataclass(frozen=True)
class Random:
    """Uniform in 0..1: by tensor, place and seed, however many ranks there are."""

    name: str
    size: int
    seed: int

    def numel(self) -> int:
        return self.size

    def part(self, begin: int, end: int) -> Tensor:
        blocks = [self._block(block) for block in range(begin // _DRAW, -(-end // _DRAW))]
        first = begin // _DRAW * _DRAW
        return torch.cat([*blocks, torch.empty(0)])[begin - first : end - first]

    def _block(self, block: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {self.name} {block}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return torch.rand(min(_DRAW, self.size - block * _DRAW), generator=draw)


def parts(score: Score) -> Iterator[Tensor]:
    """|score| of this rank's share of a tensor, a part at a time."""
    _, end = ranks.bounds(score.numel())
    for first in starts(score):
        yield score.part(first, min(first + _LOOK, end))


def starts(score: Score) -> range:
    """Where each part begins."""
    return range(*ranks.bounds(score.numel()), _LOOK)
