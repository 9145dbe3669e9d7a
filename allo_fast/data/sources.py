"""Rows of a data source, each with where it stands: JSON lines or arrays, CSV, parquet, saved data sets, the hub."""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path

from allo_fast.data.arithmetic import arithmetic_row
from allo_fast.data.gym import PREFIX, gym_rows
from allo_fast.data.tables import arrow_rows, check_columns, hub_files, parquet_rows, saved_files
from allo_fast.errors import UserError, first_line, no_such

Row = tuple[str, Callable[[], dict]]  # where it stands, and what gives it or raises UnusableRow
_DEPTH = 50  # levels of nesting in a row
_NOT_UTF8 = {  # how a file begins
    "UTF-16 or UTF-32; save it as UTF-8": rb"(\xff\xfe(\0\0)?)?[\t-~]\0|((\0\0)?\xfe\xff)?\0{1,3}[\t-~]",
    "compressed by gzip; name it .gz": rb"\x1f\x8b",
    "compressed; unpack it": rb"\x28\xb5\x2f\xfd|PK\x03\x04|BZh|\xfd7zXZ",
}
_GENERATED = ("arithmetic:train", "arithmetic:test")
_SPACE = re.compile(r"[ \t\r\n]*")


_SEPARATED = {",": "commas", "\t": "tabs"}


class UnusableRow(UserError):
    """Why one row is set aside."""


def lacks(row: dict, name: str) -> UnusableRow:
    """That the row has no such field, and which one may be meant by it."""
    near = next((key for key in row if key.strip().casefold() == name.casefold()), None)
    return UnusableRow(f"no field {name!r}{f'; rename {near!r} to it' if near else ''}; it has {sorted(row)}")


def read_rows(source: str) -> Iterator[Row]:
    """source: a file (.jsonl, .json, .csv, .tsv, .parquet; the first four also .gz), a folder of
    `datasets.save_to_disk` (FOLDER or FOLDER:split), org/name:config:split of the Hugging Face hub, arithmetic:train,
    or reasoning_gym:TASK, see `gym_rows`; each with an optional slice [i:j]. Raises UserError when it cannot be read.
    """
    name, start, stop = split_slice(source)
    if re.search(r"\[[^\[\]/]*\]$", name) and not is_generated(name):
        raise UserError(f"{source}: a slice is [i:j], of whole numbers that are not negative")
    if is_generated(name):
        if stop is None:
            raise UserError(f"{source}: the generator is endless; name a slice like {name}[:500]")
        if name.startswith(PREFIX):
            return gym_rows(name, start, stop)
        return ((f"{name}:{i}", lambda i=i: arithmetic_row(name.split(":")[1], i)) for i in range(start, stop))
    rows = _file_rows(_path(name)) if _is_file(name) else _set_rows(name)
    return _sliced(source, rows, start, stop)


def _sliced(source: str, rows: Iterator[Row], start: int, stop: int | None) -> Iterator[Row]:
    """Raises UserError for a slice that begins behind the last row."""
    skipped = sum(1 for _ in islice(rows, start))
    first = next(rows, None)
    if start and first is None:
        raise UserError(f"{source}: it begins behind the last row; there are {skipped}")
    yield from islice(chain([first] if first else [], rows), None if stop is None else max(0, stop - start))


def is_generated(name: str) -> bool:
    """Whether a source, without its slice, is read from nowhere."""
    return name in _GENERATED or name.startswith(PREFIX)


def source_files(source: str) -> list[Path]:
    """The files that `read_rows` reads, here or not; none for what is generated.

    Raises UserError for a data set that cannot be had.
    """
    name, _, _ = split_slice(source)
    if is_generated(name):
        return []
    return [_path(name)] if _is_file(name) else _set_files(name)


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _is_file(name: str) -> bool:
    """Whether it can only be a file."""
    return _path(name).suffix.lower() in (*_READERS, ".gz") or os.path.isfile(_path(name))


def _set_files(name: str) -> list[Path]:
    """Of a saved data set, or one of the hub."""
    folder, _, split = os.path.expanduser(name).partition(":")
    return saved_files(Path(folder), split) if os.path.isdir(folder) else hub_files(name)


def _set_rows(name: str) -> Iterator[Row]:
    folder = os.path.expanduser(name).partition(":")[0]
    said = Path(folder).name if os.path.isdir(folder) else name
    for number, row in _numbered(arrow_rows(_set_files(name))):
        yield f"{said}:{number}", row


def split_slice(source: str) -> tuple[str, int, int | None]:
    """ "file.jsonl[3:9]" -> ("file.jsonl", 3, 9)."""
    match = re.fullmatch(r"(.*?)(?:\[(\d{0,18}):(\d{0,18})\])?", source, re.DOTALL)
    return match[1], int(match[2] or 0), int(match[3]) if match[3] else None


def _file_rows(path: Path) -> Iterator[Row]:
    if not os.path.isfile(path):
        raise UserError(no_such(path))
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    suffix = (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()
    if suffix not in _READERS:
        raise UserError(f"{path}: no format that is read; expected one of {', '.join(_READERS)}")
    try:
        if suffix != ".parquet":
            _check_text(path)
        yield from ((f"{path.name}:{number}", row) for number, row in _READERS[suffix](path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # a broken file, not a broken row
        raise UserError(f"{path}: no usable row; it cannot be read: {first_line(error)}") from None


def _open(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _check_text(path: Path) -> None:
    """Raises UserError for a file that as UTF-8 would be broken row by row."""
    with _open(path) as file:
        head = file.read(8)
    if said := next((said for said, beginning in _NOT_UTF8.items() if re.match(beginning, head)), None):
        raise UserError(f"{path}: {said}")


def _json_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """JSON lines, or one array of objects; numbered from 1, by line or by element."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), b"")
        file.seek(0)
        array = _array(file.read()) if first.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[" else None
        if array is not None:
            yield from ((number, lambda text=text: _object(text)) for number, text in enumerate(array, start=1))
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, lambda line=line: _object(line)


def _array(data: bytes) -> list[str] | None:
    """The texts of its elements; None where it is not one array: then each line is judged for itself."""
    decoder, texts, end = json.JSONDecoder(), [], 0
    try:
        text = data.decode("utf-8-sig").strip()
        while not texts or text[end] == ",":
            start = _SPACE.match(text, end + 1).end()
            end = decoder.raw_decode(text, start)[1]
            texts.append(text[start:end])
            end = _SPACE.match(text, end).end()
    except (ValueError, RecursionError, IndexError):
        return None
    return texts if text[end:] == "]" else None


def parse_json(text: bytes | str) -> object:
    """Raises UnusableRow for what is malformed, not UTF-8, nested without end, or has a key twice in one object."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise UnusableRow(f"not JSON: {error}") from None
    except RecursionError:
        raise UnusableRow(f"nested more than {_DEPTH} deep") from None
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _parts(outer)]:
        if (depth := depth + 1) > _DEPTH:
            raise UnusableRow(f"nested more than {_DEPTH} deep")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in row if keys.count(key) > 1)!r} stands twice")
    return row


def _parts(value: object) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(text: bytes | str) -> dict:
    row = parse_json(text)
    if not isinstance(row, dict):
        raise UnusableRow(f"expected an object, got {type(row).__name__}")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """With a header; numbered from 1 without it. Behind quotes that do not add up nobody knows where a row begins."""
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    csv.field_size_limit(1 << 27)
    with _open(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        _check_separator(path, text.readline(), delimiter)
        text.seek(0)
        rows, line = csv.DictReader(text, delimiter=delimiter, strict=True), 1
        try:
            check_columns(path, rows.fieldnames or ())
            line = rows.line_num + 1
            for number, row in enumerate(rows, start=1):
                yield number, lambda row=row: _cells(row)
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}: line {line}: a quoted cell that does not end, or a quote in it that is not doubled: {error}"
            ) from None


def _check_separator(path: Path, header: str, delimiter: str) -> None:
    if delimiter not in header and (other := next((mark for mark in ";\t|," if mark in header), None)):
        raise UserError(f"{path}: cells seem to be separated by {other!r}; save with {_SEPARATED[delimiter]}")
    if header.startswith("sep="):
        raise UserError(f"{path}: the first line, {header.strip()}, is for spreadsheets alone; delete it")


def _cells(row: dict) -> dict:
    if None in row or None in row.values():
        raise UnusableRow(f"expected as many cells as the header has, got {sum(x is not None for x in row.values())}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    return _numbered(parquet_rows(path))


def _numbered(rows: Iterable[dict]) -> Iterator[tuple[int, Callable[[], dict]]]:
    for number, row in enumerate(rows, start=1):
        yield number, lambda row=row: _of_table(row)


def _of_table(row: dict) -> dict:
    try:
        return _without_nulls(row)
    except RecursionError:
        raise UnusableRow(f"nested more than {_DEPTH} deep") from None


def _without_nulls(value: object) -> object:
    """Tables give every object all keys that any has; a null there means that the key was absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
