"""What passes leave: a file each, until the weights are selected, so that a killed stage goes on with the next pass."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.locating.windows import Piece

_NAME = re.compile(r"(\w+)-(\d+)-of-(\d+)\.rank-(\d+)-of-(\d+)\.safetensors")


def passes_begun(folder: Path, kind: str) -> int | None:
    """How many passes of a kind were planned, by what the first of them left."""
    matches = [_NAME.fullmatch(path.name) for path in sorted(folder.glob(f"{kind}-*.safetensors"))]
    return next((int(match[3]) for match in matches if match), None)


def is_done(folder: Path, kind: str, number: int, count: int) -> bool:
    """Whether every rank that had a part in a pass has left its file."""
    matches = [_NAME.fullmatch(path.name) for path in folder.glob(f"{kind}-{number:03d}-of-{count:03d}.*.safetensors")]
    worlds = [int(match[5]) for match in matches if match]
    return any(worlds.count(world) == world for world in worlds)


def save_pass(
    folder: Path, kind: str, number: int, count: int, results: Mapping[Piece, Tensor], rank: int = 0, world: int = 1
) -> None:
    """results: one tensor a piece. Appears at once or not at all."""
    path = folder / f"{kind}-{number:03d}-of-{count:03d}.rank-{rank}-of-{world}.safetensors"
    tensors = {f"{piece.begin} {piece.end} {piece.name}": tensor.cpu() for piece, tensor in results.items()}
    save_file(tensors, partial := path.with_suffix(".partial"))
    os.rename(partial, path)


def load_passes(folder: Path, kind: str) -> dict[Piece, tuple[Path, str]]:
    """Where the result of each piece lies: its file, and its name there."""
    found = {}
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                begin, end, name = key.split(" ", 2)
                found[Piece(name, int(begin), int(end))] = path, key
    return found


def read_piece(path: Path, key: str, begin: int = 0, end: int | None = None) -> Tensor:
    with safe_open(
        path, "pt"
    ) as file:  # opened anew: what was read of a mapped file stays in memory until it is closed
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


def stored_scores(folder: Path, sizes: Mapping[str, int]) -> dict[str, StoredScore]:
    """By tensor, of `sizes` entries. Raises UserError where all are zero."""
    by_name: dict[str, dict[Piece, tuple[Path, str]]] = {name: {} for name in sizes}
    for piece, place in load_passes(folder, "score").items():
        by_name[piece.name][piece] = place
    if not any(bool(read_piece(*place).any()) for places in by_name.values() for place in places.values()):
        raise UserError(
            "locate.score: every gradient is zero; do the examples differ, and is warmup.learning_rate above 0?"
        )
    return {name: StoredScore(name, size, by_name[name]) for name, size in sizes.items()}
