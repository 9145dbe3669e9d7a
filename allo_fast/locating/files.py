"""What passes leave: a file each, until the weights are selected, so that a killed stage goes on with the next pass.

mark: of what they are; those of something else, and damaged ones, do not count.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from allo_fast import durable
from allo_fast.config import UserError
from allo_fast.durable import Damaged, about_of, read_json, save_tensors, write_json
from allo_fast.locating.windows import Piece

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w-]+-(\d+)\.rank-\d+-of-(\d+)\.safetensors")
_PLAN = "windows.json"


def planned_windows(folder: Path, mark: str) -> int | None:
    """Of an earlier session, whose files are of that many."""
    try:
        plan = read_json(folder / _PLAN) if (folder / _PLAN).exists() else {}
    except Damaged as error:
        logger.warning("%s; locating begins again", error)
        plan = {}
    return plan["windows"] if plan.get("mark") == mark else None


def plan_windows(folder: Path, count: int, mark: str) -> None:
    write_json(folder / _PLAN, {"windows": count, "mark": mark})


def finished(folder: Path, kind: str, mark: str = "") -> dict[int, list[Path]]:
    """The files of each pass of which every rank that had a part in it has left one."""
    files: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        if (match := _NAME.fullmatch(path.name)) and is_own(path, mark):
            files.setdefault((int(match[1]), int(match[2])), []).append(path)
    return {number: paths for (number, world), paths in files.items() if len(paths) == world}


def is_own(path: Path, mark: str) -> bool:
    """`durable.is_own`; a file that stays as it is is read once."""
    return path.exists() and _is_own(path, (stat := path.stat()).st_size, stat.st_mtime_ns, mark)


@cache
def _is_own(path: Path, size: int, changed: int, mark: str) -> bool:
    return durable.is_own(path, mark)


def save_pass(
    folder: Path,
    kind: str,
    number: int,
    results: Mapping[Piece, Tensor],
    rank: int = 0,
    world: int = 1,
    held: int = 0,
    mark: str = "",
) -> None:
    """results: one tensor a piece. held: bytes of the sums that the pass had, for `most_held`."""
    tensors = {f"{piece.begin} {piece.end} {piece.name}": tensor.cpu() for piece, tensor in results.items()}
    path = folder / f"{kind}-{number:03d}.rank-{rank}-of-{world}.safetensors"
    save_tensors(path, tensors, {"held": held, "mark": durable.own(path, mark)})


def most_held(folder: Path, kind: str, mark: str = "") -> int:
    """Of the sums of all passes, in whatever session: the most bytes."""
    most = 0
    for path in chain(*finished(folder, kind, mark).values()):
        with safe_open(path, "pt") as file:
            most = max(most, about_of(file)["held"])
    return most


def load_passes(folder: Path, kind: str, mark: str = "") -> dict[Piece, tuple[Path, str]]:
    """Where the result of each piece lies: its file, and its name there."""
    places = {}
    for path in chain(*finished(folder, kind, mark).values()):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                begin, end, name = key.split(" ", 2)
                places[Piece(name, int(begin), int(end))] = path, key
    return places


def read_piece(path: Path, key: str, begin: int = 0, end: int | None = None) -> Tensor:
    # Opened anew each time: what was read of a mapped file stays in memory until it is closed.
    with safe_open(path, "pt") as file:
        return file.get_slice(key)[begin:end]


@dataclass(frozen=True)
class StoredScore:
    """The scores of one tensor, which lie in several files; `method.scores.Score`."""

    name: str
    size: int
    places: dict[Piece, tuple[Path, str]]

    def numel(self) -> int:
        return self.size

    def part(self, begin: int, end: int) -> Tensor:
        overlapping = [
            piece for piece in sorted(self.places, key=lambda p: p.begin) if begin < piece.end and piece.begin < end
        ]
        parts = [
            read_piece(*self.places[piece], max(begin, piece.begin) - piece.begin, min(end, piece.end) - piece.begin)
            for piece in overlapping
        ]
        return torch.cat(parts)


def stored_scores(folder: Path, sizes: Mapping[str, int], mark: str = "") -> dict[str, StoredScore]:
    """By tensor, of `sizes` entries. Raises UserError where some are missing, or all are zero."""
    by_name: dict[str, dict[Piece, tuple[Path, str]]] = {name: {} for name in sizes}
    for piece, place in load_passes(folder, "score", mark).items():
        by_name[piece.name][piece] = place
    for name, places in by_name.items():
        if sum(piece.size for piece in places) != sizes[name]:
            raise UserError(f"{folder}: does not hold the scores of all of {name}; remove it, and run again")
    if not any(bool(read_piece(*place).any()) for places in by_name.values() for place in places.values()):
        raise UserError(
            "locate.score: every score is zero; do the examples differ, and are learning rate, beta and epsilon sane?"
        )
    return {name: StoredScore(name, size, by_name[name]) for name, size in sizes.items()}
