"""Tables as rows: parquet files, and the Arrow files of a data set that `datasets` saved or had from the hub."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from allo_fast.errors import UserError, first_line, no_such

_ROWS = 1000  # of a parquet file in memory


class Unreadable:
    """In place of a value that Python cannot hold: a date beyond its years, a text that is not UTF-8."""

    def __init__(self, error: Exception):
        self.why = first_line(error)

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self.why})"


def check_columns(path: Path, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} stands twice")


def parquet_rows(path: Path) -> Iterator[dict]:
    """Raises UserError, and OSError."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        check_columns(path, file.schema_arrow.names)
        for batch in file.iter_batches(_ROWS):
            yield from _rows(batch, is_whole=True)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: no usable row; not parquet: {first_line(error)}") from None


def arrow_rows(paths: Sequence[Path]) -> Iterator[dict]:
    """Of files as `datasets` writes them, one behind another. Raises UserError."""
    import pyarrow

    for path in paths:
        try:
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
                check_columns(path, batches.schema.names)
                for batch in batches:
                    yield from _rows(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a file of a saved data set, or a damaged one: {first_line(error)}") from None


def _rows(batch, is_whole: bool = False) -> Iterator[dict]:
    """Of a RecordBatch. is_whole: nothing in it points beyond its end, which of a mapped file has to be looked at."""
    columns = [_values(column, is_whole) for column in batch.columns]
    for cells in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, cells, strict=True))


def _values(column, is_whole: bool) -> list:
    """A fault is that of one value, which may be of a column that nobody reads."""
    values = _attempt(lambda: _read(column, is_whole))
    if not isinstance(values, Unreadable):
        return values
    return [_attempt(lambda i=i: _read(column.slice(i, 1), is_whole)[0]) for i in range(len(column))]


def _read(column, is_whole: bool) -> list:
    if not is_whole:
        column.validate(full=True)
    values = column.to_pylist()
    return [_parsed(value, column.type) for value in values] if "arrow.json" in str(column.type) else values


def _attempt(read: Callable[[], object]) -> object:
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        return Unreadable(error)


def _parsed(value: object, kind) -> object:
    """With what `datasets` keeps as JSON, since its objects have not all the same keys, made objects again."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return None if value is None else json.loads(value)
    if isinstance(kind, pyarrow.StructType) and value is not None:
        return {field.name: _parsed(value[field.name], field.type) for field in kind}
    is_list = isinstance(kind, pyarrow.ListType | pyarrow.LargeListType | pyarrow.FixedSizeListType)
    return [_parsed(item, kind.value_type) for item in value] if is_list and value is not None else value


def saved_files(folder: Path, split: str) -> list[Path]:
    """The files that hold the rows of a folder of `datasets.save_to_disk`. Raises UserError where it is none."""
    splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if (folder / "dataset_dict.json").is_file() and split not in splits:
        raise UserError(f"{folder}: which split? One of {', '.join(f'{folder}:{name}' for name in splits)}")
    if split and split not in splits:
        raise UserError(f"{folder}: a single data set, without splits like {split!r}")
    state = folder / split / "state.json"
    try:
        return [state.with_name(part["filename"]) for part in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        files = sorted(file for kind in ("*.parquet", "*.jsonl*", "*.json", "*.csv") for file in folder.glob(kind))
        if files and not state.exists():
            raise UserError(f"{folder}: a folder of files; name one of them, as {files[0]}") from None
        raise UserError(f"{folder}: not a saved data set: {state.name}: {_why(error)}") from None


def _why(error: Exception) -> str:
    """What is wrong with a file of JSON."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)


def hub_files(name: str) -> list[Path]:
    """The files of org/name:config:split in the cache of `datasets`. Raises UserError where it is not to be had."""
    path, _, rest = name.partition(":")
    config, _, split = rest.rpartition(":")
    if not split:
        raise UserError(f"{no_such(name)}; a data set of the hub is org/name:config:split, as openai/gsm8k:main:train")
    return _from_hub(path, config or None, split)


@cache
def _from_hub(path: str, config: str | None, split: str) -> list[Path]:
    """As long as the process lasts the same, whatever becomes of it on the hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(path, config, split=split, keep_in_memory=False)
    except (OSError, ValueError, DatasetsError) as error:
        name = ":".join(filter(None, (path, config, split)))
        raise UserError(f"{name}: not to be had from the hub: {first_line(error)}") from None
    return [Path(file["filename"]) for file in rows.cache_files]
