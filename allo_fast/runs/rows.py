"""JSON lines in a run's folder: read, written, and filled chunk by chunk so that a killed stage continues."""

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from allo_fast import ranks
from allo_fast.runs.run import Progress, write_atomically


def read_jsonl(path: Path) -> list[dict]:
    return _parse(path.read_bytes())


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """By rank 0."""
    if ranks.is_main():
        path.write_bytes(_lines(rows))


def rendered_once(path: Path, render: Callable[[], list[dict]]) -> list[dict]:
    """The rows in `path`, on every rank; where there is no such file, rank 0 writes what `render` gives."""

    def write() -> None:
        if not path.exists():
            write_atomically(path, _lines(render()).decode())

    ranks.on_main(write)
    return read_jsonl(path)


def by_chunks(
    path: Path, items: Sequence, size: int, noun: str, work: Callable[[Sequence, int], list[dict]]
) -> Generator[Progress, None, list[dict]]:
    """work(chunk, start) for each chunk of `items`, one row an item, into the JSON lines of `path`.

    Each rank does one chunk of a round; what comes out does not depend on their number. Until all rows are there they
    are in `path`.partial; a killed stage continues after its last whole chunk.
    """
    ranks.agree_on(f"list of {noun}s", items)
    partial = path.with_name(path.name + ".partial")
    rows = ranks.on_main(lambda: _whole_chunks(partial, size))
    for first in range(len(rows), len(items), size * ranks.world_size()):
        start = first + size * ranks.rank()
        # With nothing left for it, a rank repeats another's chunk: a sharded model needs them all.
        done = work(items[start : start + size], start) if start < len(items) else work(items[first:][:size], first)[:0]
        for part in (parts := ranks.gather(done)):
            rows += part
        if ranks.is_main():
            with partial.open("ab") as file:
                file.write(_lines(row for part in parts for row in part))
        yield Progress(len(rows), len(items), noun)
    if ranks.is_main():
        partial.rename(path)
    return rows


def _whole_chunks(path: Path, size: int) -> list[dict]:
    """What a killed stage left, without its last chunk where that is torn; the file too is cut."""
    rows = _whole_lines(path)
    rows = rows[: len(rows) // size * size]
    write_jsonl(path, rows)
    return rows


def _whole_lines(path: Path) -> list[dict]:
    """Without the torn last line that a killed stage may leave."""
    data = path.read_bytes() if path.exists() else b""
    return _parse(data[: data.rfind(b"\n") + 1])


def _parse(data: bytes) -> list[dict]:
    """By bytes: a text has more line ends than JSON lines do."""
    return [json.loads(line) for line in data.split(b"\n") if line]


def _lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
