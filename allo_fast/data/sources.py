"""Rows of a data source, each with where it stands: JSON lines or arrays, CSV, parquet, saved data sets, the hub."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

from allo_fast.config import UserError, first_line
from allo_fast.data.arithmetic import arithmetic_row

Row = tuple[str, Callable[[], dict]]  # where it stands, and what gives it or raises UnusableRow


class UnusableRow(UserError):
    """Why one row is set aside."""


def read_rows(source: str) -> Iterator[Row]:
    """source: a file (.jsonl, .json, .csv, .tsv, .parquet; the first four also .gz), a folder of
    `datasets.save_to_disk` (FOLDER or FOLDER:split), org/name:config:split of the Hugging Face hub, or
    arithmetic:train; each with an optional slice [i:j]. Raises UserError when it cannot be read.
    """
    name, start, stop = split_slice(source)
    if re.search(r"\[[^\[\]/]*\]$", name):
        raise UserError(f"{source}: a slice is [i:j], of whole numbers that are not negative")
    if name in ("arithmetic:train", "arithmetic:test"):
        if stop is None:
            raise UserError(f"{source}: the generator is endless; name a slice like {name}[:500]")
        return ((f"{name}:{i}", lambda i=i: arithmetic_row(name.split(":")[1], i)) for i in range(start, stop))
    folder, _, split = name.partition(":")
    path = Path(name).expanduser()
    if path.suffix.lower() in (*_READERS, ".gz") or path.is_file():
        rows = _file_rows(path)
    elif Path(folder).is_dir():
        rows = _saved_rows(folder, split)
    else:
        rows = _hub_rows(name)
    return islice(rows, start, stop)


def split_slice(source: str) -> tuple[str, int, int | None]:
    """ "file.jsonl[3:9]" -> ("file.jsonl", 3, 9)."""
    match = re.fullmatch(r"(.+?)(?:\[(\d*):(\d*)\])?", source, re.DOTALL)
    return match[1], int(match[2] or 0), int(match[3]) if match[3] else None


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    suffix = (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
    if suffix not in _READERS:
        raise UserError(f"{path}: no format that is read; expected one of {', '.join(_READERS)}")
    try:
        yield from ((f"{path.name}:{number}", row) for number, row in _READERS[suffix](path))
    except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:  # a broken file, not a broken row
        raise UserError(f"{path}: no usable row; it cannot be read: {error}") from None


def _open(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _json_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """JSON lines, or one array of objects; numbered from 1, by line or by element."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"")
        file.seek(0)
        array = _array(file.read()) if first.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[" else None
        if array is not None:
            yield from ((number, lambda row=row: _object(row)) for number, row in enumerate(array, start=1))
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, lambda line=line: _object(_parse(line))


def _array(data: bytes) -> list | None:
    """None where it is not one array: then each line is judged for itself."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _parse(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, or nested without end
        raise UnusableRow(f"not JSON: {error}") from None


def _object(row: object) -> dict:
    if not isinstance(row, dict):
        raise UnusableRow(f"expected an object, got {type(row).__name__}")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """With a header; numbered from 1 without it."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(1 << 27)
    with _open(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        for number, row in enumerate(csv.DictReader(text, delimiter=delimiter), start=1):
            yield number, lambda row=row: _cells(row)


def _cells(row: dict) -> dict:
    if None in row or None in row.values():
        raise UnusableRow(f"expected as many cells as the header has, got {sum(x is not None for x in row.values())}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: no usable row; not parquet: {error}") from None


def _numbered(rows: Iterable[dict]) -> Iterator[tuple[int, Callable[[], dict]]]:
    for number, row in enumerate(rows, start=1):
        yield number, lambda row=row: _without_nulls(row)


def _without_nulls(value: object) -> object:
    """Tables give every object all keys that any has; a null there means that the key was absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _saved_rows(folder: str, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a saved data set: {first_line(error)}") from None
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"{folder}: which split? One of {', '.join(f'{folder}:{name}' for name in rows)}")
        rows = rows[split]
    elif split:
        raise UserError(f"{folder}: a single data set, without splits like {split!r}")
    for number, row in _numbered(rows):
        yield f"{Path(folder).name}:{number}", row


def _hub_rows(name: str) -> Iterator[Row]:
    from datasets import load_dataset

    path, _, rest = name.partition(":")
    config, _, split = rest.rpartition(":")
    if not split:
        raise UserError(
            f"{name}: no such file; a data set of the hub is org/name:config:split, as openai/gsm8k:main:train"
        )
    try:
        rows = load_dataset(path, config or None, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not to be had from the hub: {first_line(error)}") from None
    for number, row in _numbered(rows):
        yield f"{name}:{number}", row


_READERS = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
