"""What a run keeps: files that are there whole or not at all, flushed to the disk, and that say when they are damaged.

What is being written lies in a folder .NAME.partial beside its place; a killed write leaves nothing else. Tensors and
JSON carry a SHA-256 of themselves.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from allo_fast import signals
from allo_fast.config import UserError, first_line

logger = logging.getLogger(__name__)

LEFTOVERS = ".*.partial"
SCRATCH = "scratch"  # a folder of what a unit needs until it is complete
_SECONDS = 0.5  # between two looks at a lock
_UNSEALED = "0" * 64
_SEAL = b'sha256\\": \\"'  # as it stands in a safetensors header, whose metadata are texts


class Damaged(UserError):
    """A file that is not what was written."""


@contextmanager
def appearing(path: Path, replace: bool = False) -> Iterator[Path]:
    """Where to write the file or folder that then appears at `path`, at once.

    replace: a folder that is there with something in it. Raises UserError where the disk refuses.
    """
    path = path.absolute()
    around = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        shutil.rmtree(around, ignore_errors=True)
        around.mkdir()
        yield (partial := around / path.name)
        for file in [*partial.rglob("*"), partial, around]:
            flush(file)
        if path.is_dir() and not path.is_symlink() and replace:
            shutil.rmtree(path)
        move(partial, path)
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise  # what Rust libraries raise for the disk is of no kind
        if (read := getattr(error, "filename", None)) and not Path(read).absolute().is_relative_to(around):
            raise
        raise UserError(f"{path}: cannot be written: {reason(error)}") from None
    finally:
        shutil.rmtree(around, ignore_errors=True)


def reason(error: Exception) -> str:
    """Why the disk refused, and what to do where it is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    why = getattr(error, "strerror", None) or first_line(error)
    return "no space left on the disk; with more of it the same command continues" if full else why


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same path; waits for it, and where nothing can be locked does not."""
    with ExitStack() as stack:
        try:
            make_folder(path.parent)
            file = stack.enter_context(path.open("a"))
            while not _has_lock(file):
                signals.check()
                time.sleep(_SECONDS)
        except OSError as error:
            logger.warning("%s: cannot be locked (%s): see to it that one command works there", path, error.strerror)
        yield


def _has_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_folder(path: Path) -> None:
    """With those above it that are missing, each flushed where it is named."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if missing:
        path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def move(path: Path, to: Path) -> None:
    """At once, on one disk, and in place of an older file."""
    os.replace(path, to)
    flush(to.parent)


def flush(path: Path) -> None:
    """To the disk; of a folder, which names it has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with appearing(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Mapping) -> None:
    """An object, which gets a key "sha256"."""
    write_bytes(path, json.dumps({**value, "sha256": _sha256_of(value)}, indent=1).encode())


def read_json(path: Path) -> dict:
    """What `write_json` was given. Raises Damaged."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or value.pop("sha256", None) != _sha256_of(value):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: {first_line(error)}") from None
    return value


def _sha256_of(value: Mapping) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping | None = None) -> None:
    """A safetensors file with `about`, JSON, in its metadata. Raises UserError for what is not finite, or has no room.

    The checksum is of the whole file with zeros in its place.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; it is not written")
    check_room(path, sum(tensor.nbytes for tensor in tensors.values()))
    with appearing(path) as partial:
        # One entry: safetensors writes several in an order that differs from file to file.
        save_file(dict(tensors), partial, {"about": json.dumps({"sha256": _UNSEALED, **(about or {})})})
        seal(partial)
        as_any_file(partial)


def as_any_file(path: Path) -> None:
    """With the permissions that a new file has here; safetensors leaves its files to their owner alone."""
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)


def seal(path: Path) -> None:
    """Sets the checksum of a safetensors file, in the place that `save_tensors` leaves for it."""
    place, _, digest = _read_seal(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def open_tensors(path: Path, device: torch.device | str = "cpu", check: bool = True):
    """`safe_open`, after a look at the checksum. Raises Damaged."""
    try:
        if check:
            _, sealed, digest = _read_seal(path)
            if sealed != digest:
                raise ValueError("its checksum does not fit" if sealed else "it has no checksum")
        return safe_open(path, "pt", device=str(device))
    except (OSError, SafetensorError, ValueError) as error:
        raise Damaged(f"{path}: damaged: {first_line(error)}") from None


def about_of(file) -> dict:
    """Of a file that `open_tensors` opened. Raises Damaged for one with a checksum that says nothing of itself."""
    try:
        about = json.loads(file.metadata()["about"])
    except RecursionError:
        about = None
    if not isinstance(about, dict):
        raise Damaged("metadata: expected an object")
    return {key: value for key, value in about.items() if key != "sha256"}


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors, on the CPU, and what `save_tensors` was told about them. Raises Damaged."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, about_of(file)


def own(path: Path, mark: str) -> str:
    """What a file says of itself that is of `mark` under this name alone."""
    return f"{mark} {path.name}"


def is_own(path: Path, mark: str) -> bool:
    """Whether a file of tensors is there, whole, and says that it is `own`; what is damaged is said."""
    return path.exists() and mark_of(path) == own(path, mark)


def mark_of(path: Path) -> str | None:
    """What a file of tensors says that it is; None for one that is damaged, which is said."""
    try:
        with open_tensors(path) as file:
            return about_of(file).get("mark")
    except Damaged as error:
        logger.warning("%s; computed again", error)
        return None


def check_room(path: Path, size: int) -> None:
    """Raises UserError where the disk has fewer than `size` bytes."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"{path}: needs {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} left; with more of it the same command "
            "continues"
        )


@cache
def versions() -> dict[str, str]:
    """Of the software that a result depends on, as far as it is installed."""
    installed = {"python": platform.python_version()}
    for name in (
        "allo-fast",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "deepspeed",
        "triton",
        "reasoning-gym",
    ):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _read_seal(path: Path) -> tuple[int, str, str]:
    """Where a safetensors file's checksum stands, what it is ("" for none), and what it should be."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise ValueError("it is cut off")
        header = bytearray(file.read(size))
        found = header.find(_SEAL)
        place = found + len(_SEAL)
        sealed = header[place : place + len(_UNSEALED)].decode("ascii", "replace") if found >= 0 else ""
        header[place : place + len(sealed)] = _UNSEALED[: len(sealed)].encode()
        digest = hashlib.sha256(size.to_bytes(8, "little") + header)
        while part := file.read(1 << 22):
            digest.update(part)
    return 8 + place, sealed, digest.hexdigest()
