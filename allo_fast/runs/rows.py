"""JSON lines in a run's folder: read, written, and filled chunk by chunk so that a killed stage continues."""

import json
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from allo_fast import ranks
from allo_fast.durable import Damaged, write_bytes
from allo_fast.journal import Journal, lines
from allo_fast.runs.basis import is_same
from allo_fast.runs.run import Progress, Unit

logger = logging.getLogger(__name__)


def read_jsonl(path: Path) -> list[dict]:
    """By bytes: a text has more line ends than JSON lines do. Raises Damaged."""
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: damaged: {error}") from None


def read_log(unit: Unit) -> list[dict]:
    """What a complete unit logged of its training; none where that is damaged or gone, which is said."""
    for name, entry in unit.manifest()["logs"].items():
        if is_same(path := unit.folder / name, entry):
            return read_jsonl(path)
        logger.warning("%s: damaged, or gone; its curves are left out", path)
    return []


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """By rank 0."""
    if ranks.is_main():
        write_bytes(path, lines(rows))


def rendered_once(unit: Unit, name: str, render: Callable[[], list[dict]]) -> list[dict]:
    """The rows in a file of the unit, on every rank; where they are not there, rank 0 writes what `render` gives."""

    def write() -> None:
        if not (journal := Journal(unit.folder / name, unit.mark)).count:
            journal.append(render())
            journal.flush()

    ranks.on_main(write)
    return read_jsonl(unit.folder / name)


def by_chunks(
    unit: Unit, name: str, items: Sequence, size: int, noun: str, work: Callable[[Sequence, int], list[dict]]
) -> Generator[Progress, None, list[dict]]:
    """work(chunk, start) for each chunk of `items`, one row an item, into the JSON lines of a file of the unit.

    Each rank does one chunk of a round; what comes out does not depend on their number. A killed stage continues after
    its last whole chunk.
    """
    ranks.agree_on(f"list of {noun}s", items)
    journal = Journal(unit.folder / name, unit.mark) if ranks.is_main() else None
    rows = ranks.on_main(lambda: read_jsonl(journal.path))
    for first in range(len(rows), len(items), size * ranks.world_size()):
        start = first + size * ranks.rank()
        # With nothing left for it, a rank repeats another's chunk: a sharded model needs them all.
        done = work(items[start : start + size], start) if start < len(items) else work(items[first:][:size], first)[:0]
        for part in ranks.gather(done):
            rows += part
            if journal and part:
                journal.append(part)
        yield Progress(len(rows), len(items), noun)
    if journal:
        journal.flush()
    return rows
