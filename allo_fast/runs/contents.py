"""Files by their contents: what a unit's manifest says of them, and whether they are that still."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePath

from allo_fast.config import UserError
from allo_fast.model.loading import model_files

Entries = Mapping[str, Mapping]  # by the name in the unit's folder its `identity`


def sha256(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(path: Path) -> dict:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def identities(folder: Path, patterns: Iterable[str]) -> dict[str, dict]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): identity(path) for path in paths}


def is_same(path: Path, entry: Mapping) -> bool:
    """entry: its `identity`, once."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def damage(folder: Path, outputs: Entries, copies: Entries) -> str | None:
    """What is wrong with a complete unit's files. Raises UserError for what only has to be moved away."""
    for name, entry in outputs.items():
        if why := _wrong(folder / name, entry):
            return f"{name} {why}"
    # Of its model more is read than was written, where somebody adds it: a chat template, other weights.
    models = {name.partition("/")[0] for name in outputs if "/" in name}
    for name in (f"{model}/{name}" for model in models for name in model_files(folder / model)):
        if name not in outputs:
            raise UserError(f"{folder / name}: was not made here; move it away")
    for name, entry in copies.items():
        top = PurePath(name).parts[0]  # of a folder either nothing or all is there
        if (folder / top).exists() and (why := _wrong(folder / name, entry)):
            again = "; `allo-fast export` makes it again" * (top != name)
            raise UserError(f"{folder / name}: {why}; move {folder / top} away{again}")
    return None


def _wrong(path: Path, entry: Mapping) -> str | None:
    if is_same(path, entry):
        return None
    return "is not what was written" if path.exists() else "is gone"
