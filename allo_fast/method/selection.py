"""Which weights train: the exact top fraction by score over the whole model.

paper: every weight competes once (tied ones too), exactly floor(ratio x N) win; ties go to the lower (name, index).
release: the published rule, kept to measure the difference. It cuts at a threshold found in bfloat16 among at most
2 x ratio of each tensor, and so takes more or fewer than it was asked for.
"""

import fnmatch
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.method.delta import load_positions, save_positions
from allo_fast.method.rows import row_positions
from allo_fast.method.scores import Change, Given, Score, parts, starts
from allo_fast.model.weights import as_bytes, fingerprint, named_weights, size_of
from allo_kernels import Positions, topk_threshold

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Selection:
    """positions: per tensor name, where the selected weights lie.

    parameters: the number of weights that competed; base: fingerprint of the model it was made for; where: the file it
    came from, for errors.
    """

    _positions: dict[str, Positions]
    parameters: int
    base: str
    where: str = "selection"

    def __repr__(self) -> str:
        share = f"{self.selected:,} of {self.parameters:,} weights, in {len(self._positions)} tensors"
        return f"Selection({share}, of base {self.base[:12]})"

    @classmethod
    def from_delta(
        cls, before: nn.Module, after: nn.Module, ratio: float, *, of: nn.Module | None = None, **settings
    ) -> "Selection":
        """The weights that training moved most: scores |after - before| in fp32, see `from_scores`.

        before: what training began from, in the dtype that it had there; of a copy in another dtype the changes are
        mostly what rounding took. of: the model that the selection is for, `before` in another dtype; None: `before`.
        """
        return cls.from_scores(changes(before, after), ratio, base=fingerprint(of or before), **settings)

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor | Score],
        ratio: float,
        *,
        base: str,
        exclude: tuple[str, ...] = (),
        skip: float = 0.0,
        last: bool = False,
        scope: str = "global",
        rows: Mapping[str, int] | None = None,
        protocol: str = "paper",
    ) -> "Selection":
        """The floor(ratio x N) largest |score| after the floor(skip x N) largest are passed over; last: the smallest.

        exclude: shell patterns of tensor names that do not compete. scope: "global", or "per_tensor", where ratio and
        skip are of each tensor by itself. rows: entries of a row, by tensor, to select whole ones (see rows.py). Every
        rank of a process group calls this together, looks at a share of each tensor and gets all positions. protocol:
        "paper", or "release": single weights, the highest. Raises ValueError for a ratio outside 0..1, another scope or
        protocol, what the release does not have, NaN.
        """
        if not 0 < ratio + skip <= 1 or ratio <= 0 or skip < 0:
            raise ValueError(f"ratio, skip: expected fractions with a sum of at most 1, got {ratio}, {skip}")
        if scope not in ("global", "per_tensor"):
            raise ValueError(f"scope: expected 'global' or 'per_tensor', got {scope!r}")
        if protocol not in ("paper", "release") or (protocol == "release" and (last or rows is not None)):
            raise ValueError(f"protocol: expected 'paper', or 'release' without last and rows, got {protocol!r}")
        pool = {name: _as_score(scores[name]) for name in competing(scores, exclude)}
        rule = _release_positions if protocol == "release" else partial(_exact_positions, last=last, rows=rows)
        pools = [pool] if scope == "global" else [{name: score} for name, score in pool.items()]
        positions = {name: at for part in pools if part for name, at in rule(part, ratio, skip)}
        selection = cls(positions, sum(score.numel() for score in pool.values()), base)
        if not selection.selected:
            raise UserError(f"nothing is selected: ratio {ratio} of {selection.parameters} weights")
        return selection

    @property
    def selected(self) -> int:
        return sum(len(positions) for positions in self._positions.values())

    @property
    def ratio(self) -> float:
        return self.selected / self.parameters

    @property
    def names(self) -> list[str]:
        """The tensors with at least one selected weight."""
        return [name for name, positions in self._positions.items() if len(positions)]

    def positions(self, name: str) -> Positions:
        """Flat positions in tensor `name`; empty where nothing is selected."""
        return self._positions[name] if name in self._positions else Positions.pack(torch.empty(0).long(), 0)

    def overlap(self, other: "Selection") -> float:
        """Of the smaller one's entries, the share that both have."""
        both = ((self.positions(name).unpack(), other.positions(name).unpack()) for name in self.names)
        common = sum(int(torch.isin(ours, theirs, assume_unique=True).sum()) for ours, theirs in both)
        return common / min(self.selected, other.selected)

    def sha256(self) -> str:
        """Identifies the selected set."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(name.encode() + as_bytes(self._positions[name].unpack()))
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        positions = {name: self._positions[name] for name in self.names}
        save_positions(path, positions, {"base": self.base, "parameters": self.parameters}, {})

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Raises UserError when the file is not a selection."""
        try:
            positions, about, _ = load_positions(path)
            selection = cls(positions, int(about["parameters"]), about["base"], str(path))
            if selection.parameters < max(1, selection.selected):
                raise ValueError(f"{selection.selected} of {selection.parameters} parameters")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a selection: {str(error).removeprefix(f'{path}: ')}") from None
        return selection

    def check(self, model: nn.Module) -> None:
        """Raises UserError when it was made for another model."""
        if (base := fingerprint(model)) != self.base:
            raise UserError(
                f"{self.where}: made for the model {self.base[:12]}, got the model {base[:12]}; it goes with its "
                "base in the dtype that it had, untrained"
            )
        weights = named_weights(model)
        for name in self.names:
            if name not in weights or size_of(weights[name]) != self._positions[name].sizes[0]:
                raise UserError(f"{self.where}: {name} is not a tensor of the model, or has another size")


def competing(names: Iterable[str], exclude: tuple[str, ...]) -> list[str]:
    """The tensors that are not excluded, sorted. Raises UserError for a pattern that matches none."""
    names = sorted(names)
    if idle := [pattern for pattern in exclude if not fnmatch.filter(names, pattern)]:
        raise UserError(f"locate.exclude: {idle[0]!r} matches no tensor of the model")
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)]


def check_ratio(sizes: Mapping[str, int], ratio: float, exclude: tuple[str, ...], scope: str = "global") -> None:
    """Raises UserError where no weight would be selected; sizes: entries of every tensor, by name."""
    pool = [sizes[name] for name in competing(sizes, exclude)]
    if not _floor(ratio, sum(pool) if scope == "global" else max(pool, default=0)):
        raise UserError(f"nothing is selected: ratio {ratio} of {sum(pool)} weights, locate.scope: {scope}")


def changes(before: nn.Module, after: nn.Module) -> dict[str, Change]:
    """What training moved, by tensor. Raises UserError where that is nothing, ValueError for another model."""
    old, new = named_weights(before), named_weights(after)
    if different := [name for name in old if name not in new or _shape(new[name]) != _shape(old[name])]:
        raise ValueError(f"after: not the same model as before; {different[0]} differs")
    moved = {name: Change(old[name], new[name]) for name in old}
    changed = any(bool(part.any()) for change in moved.values() for part in parts(change))
    if not ranks.add_up(torch.tensor([changed], dtype=torch.int64)):
        raise UserError("no weight changed between before and after; was the learning rate ever above zero?")
    return moved


def _as_score(score: Tensor | Score) -> Score:
    return Given(score) if isinstance(score, Tensor) else score


@dataclass
class _Parts:
    """Of all tensors; topk_threshold iterates over it several times."""

    scores: Mapping[str, Score]

    def __iter__(self) -> Iterator[Tensor]:
        for score in self.scores.values():
            yield from parts(score)


def _exact_positions(
    scores: Mapping[str, Score], ratio: float, skip: float, last: bool, rows: Mapping[str, int] | None
) -> Iterator[tuple[str, Positions]]:
    total = sum(score.numel() for score in scores.values())
    if rows is not None:
        yield from row_positions(scores, rows, _floor(ratio, total), _floor(skip, total), last)
        return
    skipped, until = _floor(skip, total), _floor(skip, total) + _floor(ratio, total)
    if last:
        skipped, until = total - until, total - skipped
    tops = _top(scores, until, warns=not last)
    for (name, score), top, passed in zip(scores.items(), tops, _top(scores, skipped), strict=True):
        places = [torch.empty(0, dtype=torch.int64)]
        for first, among_top, among_passed in zip(starts(score), top, passed, strict=True):
            places.append((among_top & ~among_passed).view(-1).nonzero().squeeze(1).cpu() + first)
        yield name, Positions.pack(ranks.concatenate(torch.cat(places)), score.numel())


def _top(scores: Mapping[str, Score], k: int, warns: bool = False) -> Iterator[Iterator[Tensor]]:
    """Per tensor and part, which of its scores are among the k highest; ties go to the lower (name, index)."""
    if not k:  # without a look at any
        yield from (repeat(torch.tensor(False), len(starts(score))) for score in scores.values())
        return
    value, above, _ = topk_threshold(_Parts(scores), k, add_up=ranks.add_up)
    threshold, tie_count = float(value), k - above
    if warns and 0 < above < k and threshold == 0:
        logger.warning("only %d weights have a score above 0; others fill the selection of %d", above, k)
    # In the order of (name, index), how many ties come before those of this rank's share of a tensor.
    ties_here = [sum(int((part == threshold).sum()) for part in parts(score)) for score in scores.values()]
    counts = ranks.gather(ties_here)
    by_share = torch.tensor(counts).T.reshape(-1)
    earlier = (by_share.cumsum(0) - by_share).view(len(scores), -1)[:, ranks.rank() if len(counts) > 1 else 0]
    for score, passed in zip(scores.values(), earlier.tolist(), strict=True):
        yield _top_parts(score, threshold, tie_count - passed)


def _top_parts(score: Score, threshold: float, ties_left: int) -> Iterator[Tensor]:
    for part in parts(score):
        ties = part == threshold
        first = ties & (ties.cumsum(0) <= ties_left)
        ties_left -= int(ties.sum())
        yield first | (part > threshold)


def _release_positions(scores: Mapping[str, Score], ratio: float, skip: float) -> Iterator[tuple[str, Positions]]:
    total = sum(score.numel() for score in scores.values())
    share = min(1.0, 2 * (ratio + skip))
    whole = {name: score.part(0, score.numel()) for name, score in scores.items()}
    if any(bool(score.isnan().any()) for score in whole.values()):
        raise ValueError("scores: NaN")
    candidates = [score.bfloat16().topk(int(score.numel() * share)).values for score in whole.values()]
    ranked = torch.cat(candidates).sort(descending=True).values.float()
    low = ranked[int(total * (ratio + skip)) - 1]
    high = ranked[int(total * skip) - 1] if skip else torch.inf
    for name, score in whole.items():
        selected = (score >= low) & (score < high)
        yield name, Positions.pack(selected.nonzero().squeeze(1).cpu(), score.numel())


def _shape(weight: Tensor) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)


def _floor(fraction: float, total: int) -> int:
    """floor(fraction x total) of the decimal fraction that was written, not of its binary neighbour."""
    return int(Fraction(str(fraction)) * total)
