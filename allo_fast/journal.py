"""JSON lines that grow: whoever is killed goes on after the last whole chunk, and what is damaged is not taken.

Beside the file NAME.sums has a line a chunk: the rows up to its end, where that is, and a SHA-256 that goes on from the
chunk before, so that none can be lost, doubled or exchanged.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from allo_fast.config import UserError
from allo_fast.durable import Damaged, flush, reason

logger = logging.getLogger(__name__)

SUMS = ".sums"
_BLOCK = 1 << 20  # bytes that are read at once
_FLUSH_SECONDS = 1.0  # what a loss of power may cost


class Journal:
    """The rows of `path`, of which `count` are there. Opening it cuts off what is not whole; what is damaged is said.

    mark: what they are rows of; those of something else are not taken. keeps: asked for the last row of each chunk;
    from the first that it does not want on, they go.
    """

    def __init__(self, path: Path, mark: str, keeps: Callable[[dict], bool] | None = None):
        self.path, self.sums = path, path.with_name(path.name + SUMS)
        self.count, self._end, self._mark, self._digest = 0, 0, mark.encode(), hashlib.sha256(mark.encode())
        self._flushed = time.monotonic()
        self._open(keeps)

    def append(self, rows: Iterable[dict]) -> None:
        """One chunk more. Raises UserError where the disk refuses."""
        data = lines(rows)
        self._take(data)
        try:
            with self.path.open("ab") as file:
                file.write(data)
            with self.sums.open("ab") as file:
                file.write(self._entry())
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {reason(error)}") from None

    def flush(self) -> None:
        """To the disk."""
        flush(self.path)
        flush(self.sums)
        self._flushed = time.monotonic()

    def finish(self) -> None:
        """To the disk. Raises Damaged where that holds something else; opening it again cuts off what."""
        self.flush()
        digest = hashlib.sha256(self._mark)
        with self.path.open("rb") as file:
            while part := file.read(_BLOCK):
                digest.update(part)
        if digest.digest() != self._digest.digest():
            raise Damaged(f"{self.path}: damaged while it was written; the same command makes again what is")

    def _take(self, data: bytes) -> None:
        self.count, self._end = self.count + data.count(b"\n"), self._end + len(data)
        self._digest.update(data)

    def _entry(self) -> bytes:
        return f"{self.count} {self._end} {self._digest.hexdigest()}\n".encode()

    def _open(self, keeps: Callable[[dict], bool] | None) -> None:
        if self.path.exists() and self.path.stat().st_size and not self.sums.exists():
            logger.warning("%s: its %s is gone; nothing of it is taken", self.path, self.sums.name)
        for path in (self.path, self.sums):
            path.touch()
        size, whole = self.path.stat().st_size, 0
        with self.path.open("rb") as file:
            for entry in self.sums.read_bytes().splitlines(keepends=True):
                before = self.count, self._end, self._digest.copy()
                self._take(chunk := file.read(_size(entry, self._end, size)))
                damaged = self._entry() != entry
                if damaged or (keeps and not keeps(json.loads(chunk[:-1].rpartition(b"\n")[2]))):
                    self.count, self._end, self._digest = before
                    if damaged and entry.endswith(b"\n"):
                        logger.warning("%s: damaged after row %d; what follows is not taken", self.path, self.count)
                    break
                whole += len(entry)
        os.truncate(self.path, self._end)
        os.truncate(self.sums, whole)


def _size(entry: bytes, begin: int, size: int) -> int:
    """Of an entry's chunk, in a file of `size` bytes; 0 where it cannot be."""
    end = int(entry.split()[1]) if re.fullmatch(rb"\d{1,18} \d{1,18} \w{64}\n", entry) else 0
    return end - begin if begin <= end <= size else 0


def lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
