"""Files, saved data sets and the hub as rows; each row is judged for itself, and says where it stands."""

import csv
import gzip
import json
import random
import re
from contextlib import suppress

import pyarrow
import pytest
from conftest import read_problems
from datasets import Dataset, DatasetDict, Features, Json, List, Value, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from allo_fast.config import UserError
from allo_fast.data.sources import UnusableRow, read_rows, source_files

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


def test_quotes_inside_a_cell_that_is_not_quoted(tmp_path):
    (tmp_path / "rows.csv").write_text('\ufeffprompt,chosen,rejected\na 5" pipe,say "hi","two\nlines"\n')
    ((_, row),) = read_rows(str(tmp_path / "rows.csv"))
    assert row() == {"prompt": 'a 5" pipe', "chosen": 'say "hi"', "rejected": "two\nlines"}


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "rows.csv",
            b'a,b\n1,2\n"3\n",4\n5,"6\n7,8\n',
            "rows.csv: line 5: a quoted cell that does not end.*end of data",
        ),
        ("rows.csv", b'a,b\n1,"2\n3,"4"\n', "rows.csv: line 2: a quoted cell that does not end, or a quote in it"),
        ("rows.csv", b'"a,b\n1,2\n', "rows.csv: line 1: a quoted cell that does not end"),
        ("rows.csv", b"a;b\n1;2\n", "rows.csv: cells seem to be separated by ';'; save with commas"),
        ("rows.csv", b'"a";"b"\n1;2\n', "rows.csv: cells seem to be separated by ';'; save with commas"),
        ("rows.csv", b"\xef\xbb\xbfsep=;\na;b\n", "rows.csv: cells seem to be separated by ';'; save with commas"),
        ("rows.csv", b"sep=,\na,b\n", "rows.csv: the first line, sep=,, is for spreadsheets alone; delete it"),
        ("rows.tsv", b"a,b\n1,2\n", "rows.tsv: cells seem to be separated by ','; save with tabs"),
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
    table_of(tmp_path, "arrow", {})
    with pyarrow.ipc.new_stream(
        tmp_path / "rows.arrow", (schema := pyarrow.schema([("chosen", "string")] * 2))
    ) as file:
        file.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    for name in ("rows.csv", "rows.parquet", ""):
        with pytest.raises(UserError, match=f"^{tmp_path / (name or 'rows.arrow')}: the column 'chosen' stands twice"):
            list(read_rows(str(tmp_path / name)))


def test_slices_and_splits_that_are_not(tmp_path):
    path = written(tmp_path, "rows.jsonl")
    for wrong in ("[-2:]", "[:-2]", "[::2]", "[:50%]", f"[:{'9' * 30}]"):
        with pytest.raises(UserError, match="a slice is"):
            read_rows(f"{path}{wrong}")
    for behind in (len(ROWS), len(ROWS) + 7):
        with pytest.raises(UserError, match=rf"\]: it begins behind the last row; there are {len(ROWS)}"):
            list(read_rows(f"{path}[{behind}:]"))
    assert len(list(read_rows(f"{path}[{len(ROWS) - 1}:99]"))) == 1
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


def test_the_hub(tmp_path, monkeypatch):
    asked = []
    Dataset.from_list(ROWS).save_to_disk(tmp_path)

    def load(*name, split, **_):
        asked.append((*name, split))
        return load_from_disk(tmp_path)

    monkeypatch.setattr("datasets.load_dataset", load)
    for source in ("org/name:main:train[:1]", "org/name:test"):
        assert list(read_rows(source))[0][1]() == ROWS[0]
        assert source_files(source) == [tmp_path / "data-00000-of-00001.arrow"], "as long as the process lasts"
    assert asked == [("org/name", "main", "train"), ("org/name", None, "test")]
    for source in ("org/name", "rows", "folder/rows"):
        with pytest.raises(UserError, match="no such file; a data set of the hub is org/name:config:split"):
            list(read_rows(source))


def test_a_hub_data_set_that_cannot_be_made(monkeypatch):
    def load(*_, **__):
        raise DatasetGenerationError("a file of it is broken")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match="^org/broken:a:b: not to be had from the hub: a file of it is broken$"):
        list(read_rows("org/broken:a:b"))


def test_of_a_saved_data_set_only_its_rows_count(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path)
    for name in ("README.md", "test/README.md", "test/cache-1.arrow"):
        (tmp_path / name).write_text("a note")
    assert source_files(f"{tmp_path}:test[:5]") == [tmp_path / "test/data-00000-of-00001.arrow"]


@pytest.mark.parametrize("data", ["{}", "[]", '{"_data_files": [1]}', '{"_data_files": null}', "", "deep"])
def test_saved_data_sets_that_are_none(tmp_path, data):
    Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / "dataset_info.json").write_text("[]")
    assert len(list(read_rows(str(tmp_path)))) == 3, "the rows say what they are"
    (tmp_path / "state.json").write_text("[" * 100_000 if data == "deep" else data)
    with pytest.raises(UserError, match="not a saved data set: state.json: ."):
        list(read_rows(str(tmp_path)))


def odd_cells() -> dict[str, pyarrow.Array]:
    """Columns of three values, one of which Python cannot hold."""
    numbers = pyarrow.array([0, 2**45, 5])
    bad_text = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0"), pyarrow.py_buffer(b"ab\xff\xfecd")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, bad_text)
    return {
        "date": numbers.view(pyarrow.timestamp("s")),
        "before": pyarrow.array([0, -(2**45), 5]).view(pyarrow.timestamp("s")),
        "long": numbers.view(pyarrow.duration("s")),
        "text": text,
        "nested": pyarrow.StructArray.from_arrays([numbers.view(pyarrow.timestamp("s"))], ["at"]),
    }


def table_of(folder, kind, columns) -> str:
    """A source of these columns beside the three rows'."""
    table = pyarrow.table({key: [row[key] for row in ROWS] for key in ROWS[0]} | columns)
    if kind == "parquet":
        parquet.write_table(table, folder / "rows.parquet")
        return str(folder / "rows.parquet")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}]}')
    with pyarrow.ipc.new_stream(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    return str(folder)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", odd_cells())
def test_cells_that_cannot_be_read_in_a_column_that_nobody_reads(tmp_path, kind, name):
    problems, bad = read_problems(table_of(tmp_path, kind, {"when": odd_cells()[name]}), "preference")
    assert len(problems) == 3 and not bad


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_cell_that_cannot_be_read_is_its_rows_fault(tmp_path, kind):
    problems, (bad,) = read_problems(table_of(tmp_path, kind, {"chosen": odd_cells()["text"]}), "preference")
    assert [problem.right for problem in problems] == [("ab",), ("cd",)]
    assert re.match("chosen: expected .* got a value that cannot be read .*(utf-8|UTF8)", bad.reason)


def test_json_in_a_table_is_what_it_says(tmp_path):
    mixed = [{"prompt": "p", "tools": [{"of": {"a": 1}}, {"of": {"b": "x"}}]}, {"prompt": "q", "tools": None}]
    features = Features({"prompt": Value("string"), "tools": List({"of": Json()})})
    Dataset.from_list(mixed, features=features).save_to_disk(tmp_path)
    assert [row() for _, row in read_rows(str(tmp_path))] == [mixed[0], {"prompt": "q"}]


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.jsonl.gz", "saved/data-00000-of-00001.arrow", "saved/state.json"]
)
def test_flipped_bits_end_in_one_line(tmp_path, name):
    for each in ("rows.parquet", "rows.jsonl.gz"):
        written(tmp_path, each)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path, draw = tmp_path / name, random.Random(0)
    data = path.read_bytes()
    said = []
    for _ in range(200):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            for _, row in read_rows(str(path.parent if name.startswith("saved") else path)):
                with suppress(UnusableRow):
                    row()
        except UserError as error:
            said.append(str(error))
    assert len(said) > 20 and not any("\n" in line for line in said)
