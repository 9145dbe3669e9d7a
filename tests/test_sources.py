"""Files, saved data sets and the hub as rows; each row is judged for itself, and says where it stands."""

import csv
import gzip
import json

import pyarrow
import pytest
from conftest import read_problems
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from allo_fast.config import UserError
from allo_fast.data.sources import read_rows

ROWS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(3)]


def written(folder, name):
    """The three rows in a file of this name."""
    path = folder / name
    suffix = name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
        return path
    if suffix in ("csv", "tsv"):
        lines = ["\t,"[suffix == "csv"].join(ROWS[0]), *("\t,"[suffix == "csv"].join(row.values()) for row in ROWS)]
        text = "\n".join(lines)
    else:
        text = {
            "jsonl": (by_line := "\n".join(map(json.dumps, ROWS))),
            "ndjson": by_line,
            "json": json.dumps(ROWS, indent=1),
        }[suffix]
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


NAMES = [
    "rows.jsonl",
    "rows.json",
    "rows.jsonl.gz",
    "rows.json.gz",
    "rows.csv",
    "rows.tsv",
    "rows.csv.gz",
    "rows.parquet",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = written(tmp_path, name)
    assert [row() for _, row in read_rows(str(path))] == ROWS
    assert [where for where, _ in read_rows(f"{path}[1:3]")] == [f"{name}:2", f"{name}:3"]


def test_saved_data_sets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "two")
    assert [row() for _, row in read_rows(f"{tmp_path / 'one'}")] == ROWS
    assert [row() for _, row in read_rows(f"{tmp_path / 'two'}:test[:5]")] == ROWS[:1]
    with pytest.raises(UserError, match="which split"):
        list(read_rows(str(tmp_path / "two")))
    with pytest.raises(UserError, match="not a saved data set"):
        list(read_rows(str(tmp_path)))


def test_absent_keys_of_a_table_are_absent(tmp_path):
    """A table fills in every key that any message has."""
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}]
    Dataset.from_list([{"messages": said}]).to_parquet(tmp_path / "rows.parquet")
    ((_, row),) = read_rows(str(tmp_path / "rows.parquet"))
    assert row() == {"messages": said}


def test_cells_hold_what_was_quoted(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["prompt", "chosen", "rejected"], ["two\nlines, one cell", 'say "hi"', "no"], ["short", "row"]]
        )
    problems, (bad,) = read_problems(str(tmp_path / "rows.csv"), "preference")
    assert problems[0].prompt == "two\nlines, one cell" and problems[0].right == ('say "hi"',)
    assert bad.id == "rows.csv:2" and "expected as many cells" in bad.reason


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("rows.parquet", b"PAR1" + bytes(range(256)), "no usable row; not parquet"),
        ("rows.jsonl.gz", b"not zipped at all", "no usable row; it cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "no usable row; it cannot be read"),
        ("rows.json", b'[{"prompt": "p"},\n {"chosen"', "no usable row; .*not JSON"),
        ("rows.csv", b"a\xff\xfe,b\n1,2\n", "no usable row; it cannot be read"),
        ("rows.xlsx", b"PK", "no format that is read; expected one of .jsonl"),
        ("rows.jsonl", b"", "the file is empty"),
        ("rows.jsonl", b'{"a": "b"}\n' + bytes(5), "no usable row; rows.jsonl:1: no field 'chosen'"),
        ("rows.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "rows.jsonl: compressed by gzip; name it .gz"),
        ("rows.csv", b"PK\x03\x04" + bytes(40), "rows.csv: compressed; unpack it"),
    ],
)
def test_broken_files_are_said(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_problems(str(tmp_path / name), "preference")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_files_in_other_encodings(tmp_path, encoding):
    texts = {"rows.jsonl": '{"a": 1}\n', "rows.json": '\n[{"a": 1}]', "rows.csv": "a,b\n1,2\n", "rows.tsv.gz": "a\n1\n"}
    for name, text in texts.items():
        data = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(UserError, match=f"{name}: UTF-16 or UTF-32; save it as UTF-8"):
            read_problems(str(tmp_path / name), "preference")


def test_a_column_that_stands_twice(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    columns = [pyarrow.array(["a"])] * 2
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["chosen", "chosen"]), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        with pytest.raises(UserError, match=f"{name}: the column 'chosen' stands twice"):
            list(read_rows(str(tmp_path / name)))


def test_slices_and_splits_that_are_not(tmp_path):
    path = written(tmp_path, "rows.jsonl")
    for wrong in ("[-2:]", "[:-2]", "[::2]", "[:50%]", f"[:{'9' * 30}]"):
        with pytest.raises(UserError, match="a slice is"):
            read_rows(f"{path}{wrong}")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="a single data set, without splits like 'test'"):
        list(read_rows(f"{tmp_path / 'one'}:test"))


@pytest.mark.parametrize("source, message", [("{}/rows.json", "a folder, where a file was expected"), ("", "no such")])
def test_paths_that_are_no_files(tmp_path, source, message):
    (tmp_path / "rows.json").mkdir()
    for path in (source.format(tmp_path), f"{tmp_path}/{'x' * 300}.jsonl", f"{tmp_path}/{'x' * 300}"):
        with pytest.raises(UserError, match=message if path == source.format(tmp_path) else "no such file"):
            list(read_rows(path))


def test_names_in_capitals_and_nested_lines(tmp_path):
    (tmp_path / "rows.JSONL").write_text("[" * 100_000 + "\n" + "{}\n")
    with pytest.raises(UserError, match="no usable row; rows.JSONL:1: nested more than 50 deep"):
        read_problems(str(tmp_path / "rows.JSONL"), "preference")


def test_lines_that_are_no_objects_are_set_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[1]\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n"x"\n')
    problems, bad = read_problems(str(path), "preference")
    assert [problem.id for problem in problems] == ["rows.jsonl:2"]
    assert [(row.id, row.reason) for row in bad] == [
        ("rows.jsonl:1", "expected an object, got list"),
        ("rows.jsonl:3", "expected an object, got str"),
    ]


def test_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *name, split: asked.append((*name, split)) or Dataset.from_list(ROWS)
    )
    for source in ("org/name:main:train[:1]", "org/name:test"):
        list(read_rows(source))
    assert asked == [("org/name", "main", "train"), ("org/name", None, "test")]
    for source in ("org/name", "rows", "folder/rows"):
        with pytest.raises(UserError, match="no such file; a data set of the hub is org/name:config:split"):
            list(read_rows(source))
