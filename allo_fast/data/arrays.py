"""Sequences of millions: elements that are made when they are asked for, of numbers that may lie on the disk."""

import mmap
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from allo_fast.config import UserError
from allo_fast.durable import reason

T = TypeVar("T")

_SPILL = 1 << 16  # numbers that wait in memory for their file


class Lazy(Sequence[T]):
    """Slices are lists. Equal to whatever sequence has equal elements."""

    @abstractmethod
    def item(self, index: int) -> T:
        """index: not negative, and less than the length."""

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.item(index % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None


class Numbers:
    """Numbers one behind another; in memory, or in a file of `folder` that has no name and ends with them.

    code: of their type, as `array` has it; "i" int32, "q" int64, "f" float32, "B" uint8.
    """

    def __init__(self, code: str, folder: Path | None = None):
        self._waiting, self._folder, self._file = array(code), folder, None
        self._spilled, self._values = 0, None

    def __len__(self) -> int:
        return self._spilled + len(self._waiting)

    def extend(self, numbers: Iterable[float]) -> None:
        """Raises UserError where the disk refuses."""
        self._values = None
        self._waiting.extend(numbers)
        if self._folder and len(self._waiting) > _SPILL:
            self._spill()

    @property
    def values(self) -> np.ndarray:
        """All of them, [n]; of a file, mapped."""
        if self._values is None:
            self._values = self._mapped() if self._file else np.array(self._waiting)
        return self._values

    def _mapped(self) -> np.ndarray:
        self._spill()
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self._waiting.typecode)

    def _spill(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile(dir=self._folder)
            self._waiting.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written: {reason(error)}") from None
        self._spilled += len(self._waiting)
        del self._waiting[:]


class Ragged(Lazy[list]):
    """Lists of numbers. flat: those of all."""

    def __init__(self, code: str, folder: Path | None = None):
        self.flat, self._ends = Numbers(code, folder), Numbers("q", folder)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, numbers: Iterable[float]) -> None:
        self.flat.extend(numbers)
        self._ends.extend((len(self.flat),))

    def item(self, index: int) -> list:
        ends = self._ends.values
        return self.flat.values[ends[index - 1] if index else 0 : ends[index]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Of each list, int32."""
        ends = self._ends.values
        lengths = np.empty(len(ends), dtype=np.int32)
        lengths[:1] = ends[:1]
        np.subtract(ends[1:], ends[:-1], out=lengths[1:], casting="unsafe")
        return lengths

    def arrays(self) -> list[np.ndarray]:
        return [self.flat.values, self._ends.values]


class Tuples(Lazy[tuple[int, ...]]):
    """Tuples of int32, as long as the first."""

    def __init__(self, folder: Path | None = None):
        self._flat, self._width = Numbers("i", folder), 1

    def __len__(self) -> int:
        return len(self._flat) // self._width

    def append(self, item: tuple[int, ...]) -> None:
        self._width = self._width if len(self._flat) else len(item)
        assert len(item) == self._width, "all are of one length"
        self._flat.extend(item)

    def __iadd__(self, items: Iterable[tuple[int, ...]]) -> "Tuples":
        for item in items:
            self.append(item)
        return self

    def item(self, index: int) -> tuple[int, ...]:
        return tuple(self.values[index].tolist())

    @property
    def values(self) -> np.ndarray:
        """[n, length]."""
        return self._flat.values.reshape(-1, self._width)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)


class Chunks(Lazy[list]):
    """The rows of an array, [n] or [n, k], in lists of `size`; rows of several numbers are tuples."""

    def __init__(self, rows: np.ndarray, size: int):
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def item(self, index: int) -> list:
        rows = self.rows[index * self.size : (index + 1) * self.size].tolist()
        return rows if self.rows.ndim == 1 else [tuple(row) for row in rows]


class Chained(Lazy[T]):
    """Sequences of one length each, one after another."""

    def __init__(self, parts: Sequence[Sequence[T]]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def item(self, index: int) -> T:
        part, place = divmod(index, len(self.parts[0]))
        return self.parts[part][place]
