"""JSON lines in a run's folder: read, written, and filled chunk by chunk so that a killed stage continues."""

import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from allo_fast import ranks
from allo_fast.data.arrays import Lazy
from allo_fast.durable import Damaged, appearing, read_json, write_json
from allo_fast.journal import SUMS, Journal, lines
from allo_fast.runs.contents import is_same
from allo_fast.runs.unit import Progress, Unit

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows that are written at once
_BLOCK = 1 << 20  # bytes that are read at once


class Rows(Lazy[dict]):
    """The rows of JSON lines, each read from the file and parsed when it is asked for. Raises Damaged then.

    begins, ends: where in the file the rows lie.
    """

    def __init__(self, path: Path, begins: np.ndarray, ends: np.ndarray):
        self.path, self._begins, self._ends = path, begins, ends

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[dict]:
        return self._read(range(len(self)))

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        return list(self._read(range(len(self))[index])) if isinstance(index, slice) else super().__getitem__(index)

    def item(self, index: int) -> dict:
        return next(self._read([index]))

    def only(self, numbers: Sequence[int]) -> "Rows":
        """These rows, in this order."""
        return Rows(self.path, self._begins[numbers], self._ends[numbers])

    def _read(self, numbers: Sequence[int]) -> Iterator[dict]:
        try:
            with self.path.open("rb", buffering=_BLOCK if len(numbers) > _CHUNK else -1) as file:
                for number in numbers:
                    file.seek(self._begins[number])
                    yield json.loads(file.read(self._ends[number] - self._begins[number]))
        except OSError as error:
            raise Damaged(f"{self.path}: damaged: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{self.path}: damaged: row {number + 1}: {error}") from None


def read_jsonl(path: Path) -> Rows:
    """By bytes: a text has more line ends than JSON lines do. Raises Damaged."""
    ends, size = [np.zeros(1, dtype=np.int64)], 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + size + 1)
                size += len(block)
    except OSError as error:
        raise Damaged(f"{path}: damaged: {error.strerror}") from None
    bounds = np.concatenate([*ends, [size]] if ends[-1][-1:] != size else ends)
    begins, ends = bounds[:-1], bounds[1:]
    if (empty := np.diff(bounds) < 2).any():
        begins, ends = begins[~empty], ends[~empty]
    return Rows(path, begins, ends)


def read_log(unit: Unit) -> Sequence[dict]:
    """What a complete unit logged of its training; none where that is damaged or gone, which is said."""
    for name, entry in unit.manifest().get("logs", {}).items():
        if is_same(path := unit.folder / name, entry):
            return read_jsonl(path)
        logger.warning("%s: damaged, or gone; its curves are left out", path)
    return []


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """By rank 0, row by row; there once all are. Raises UserError where the disk refuses."""
    if ranks.is_main():
        with appearing(path) as partial, partial.open("wb") as file:
            for chunk in chunked(rows):
                file.write(lines(chunk))


def chunked(rows: Iterable[dict]) -> Iterator[list[dict]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def rendered_once(unit: Unit, name: str, render: Callable[[], Iterable[dict]]) -> Rows:
    """The rows in a file of the unit, on every rank; where not all are there, rank 0 writes what `render` gives."""
    return split_once(unit, (name,), lambda: ((row, name) for row in render()))[0]


def split_once(unit: Unit, names: Sequence[str], render: Callable[[], Iterable[tuple[dict, str]]]) -> list[Rows]:
    """As `rendered_once`, into several files: `render` gives rows and into which each goes.

    Beside them lies until the unit is complete how many there are: without that, all are made again.
    """
    whole = unit.folder / f"{names[0]}.whole{SUMS}"

    def write() -> None:
        if _are_whole({name: Journal(unit.folder / name, unit.mark).count for name in names}, whole):
            return
        journals = {name: Journal(unit.folder / name, unit.mark, keeps=lambda row: False) for name in names}
        for chunk in chunked(render()):
            for name, journal in journals.items():
                if rows := [row for row, file in chunk if file == name]:
                    journal.append(rows)
        for journal in journals.values():
            journal.finish()
        write_json(whole, {"rows": {name: journal.count for name, journal in journals.items()}})

    ranks.on_main(write)
    return [read_jsonl(unit.folder / name) for name in names]


def _are_whole(counts: dict[str, int], said: Path) -> bool:
    try:
        return said.exists() and read_json(said)["rows"] == counts
    except Damaged as error:
        logger.warning("%s; the rows are made again", error)
        return False


def by_chunks(
    unit: Unit,
    name: str,
    items: Sequence,
    size: int,
    noun: str,
    work: Callable[[Sequence, int], list[dict]],
    sharded: bool = True,
) -> Generator[Progress, None, Rows]:
    """work(chunk, start) for each chunk of `items`, one row an item, into the JSON lines of a file of the unit.

    Each rank does one chunk of a round; what comes out does not depend on their number. sharded: whether a rank that
    has none left does another's again, since a model in shares needs them all. A killed stage continues after its last
    whole chunk.
    """
    ranks.agree_on(f"list of {noun}s", items)
    journal = Journal(unit.folder / name, unit.mark) if ranks.is_main() else None
    done = ranks.on_main(lambda: journal.count)
    for first in range(done, len(items), size * ranks.world_size()):
        start = first + size * ranks.rank()
        begin = start if start < len(items) else first
        rows = work(items[begin : begin + size], begin) if sharded or begin == start else []
        for part in ranks.gather(rows if begin == start else []):
            done += len(part)
            if journal and part:
                journal.append(part)
        yield Progress(done, len(items), noun)
    ranks.on_main(lambda: journal.finish())
    return read_jsonl(unit.folder / name)
