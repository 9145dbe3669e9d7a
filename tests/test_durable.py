"""What is written is there whole or not at all, and says when it is damaged."""

import errno
import json
import os
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from allo_fast import durable
from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.durable import (
    Damaged,
    appearing,
    is_own,
    load_tensors,
    make_folder,
    own,
    read_json,
    save_tensors,
    write_bytes,
    write_json,
)
from allo_fast.journal import Journal, lines
from allo_fast.model.saving import save_model
from tests.conftest import tiny_llama


def flips(path, every: int = 1):
    """The file with one bit turned, a byte after the other."""
    data = path.read_bytes()
    for place in range(0, len(data), every):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        yield place
    path.write_bytes(data)


def test_a_file_appears_at_once_in_place_of_the_old_one(tmp_path):
    path = tmp_path / "new" / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyError), appearing(path) as partial:
        partial.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_appears_at_once_in_place_of_the_old_one(tmp_path):
    for name in ("old", "new"):
        with appearing(tmp_path / "folder", replace=True) as partial:
            (partial / "in").mkdir(parents=True)
            (partial / "in" / name).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "in", "new"]


def test_file_and_folder_are_flushed_before_and_after_the_name_is_given(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(durable, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(durable.os, "replace", lambda old, new: done.append("named"))
    write_bytes(tmp_path / "file", b"")
    assert done == ["file", ".file.partial", "named", tmp_path.name]


def test_of_new_folders_each_name_is_flushed(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(durable, "flush", done.append)
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "a/b/c")
    assert done == [tmp_path / "a", tmp_path, tmp_path / "a/b"]


def test_every_file_of_a_folder_is_flushed(tmp_path, monkeypatch):
    done = set()
    monkeypatch.setattr(durable, "flush", lambda path: done.add(path.name))
    with appearing(tmp_path / "folder") as partial:
        (partial / "in").mkdir(parents=True)
        (partial / "in" / "file").touch()
    assert {"file", "in", "folder", ".folder.partial"} <= done


def test_a_folder_that_somebody_filled_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="folder: cannot be written: Directory not empty"):
        with appearing(tmp_path / "folder") as partial:
            for folder in (partial, tmp_path / "folder"):
                folder.mkdir()
                (folder / folder.parent.name).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [tmp_path.name]


def test_a_file_does_not_take_a_folders_place(tmp_path):
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "summary.json" / "mine").touch()
    with pytest.raises(UserError, match="summary.json: cannot be written: Is a directory"):
        write_json(tmp_path / "summary.json", {})
    assert (tmp_path / "summary.json" / "mine").exists()


def test_what_cannot_be_read_meanwhile_is_not_said_of_what_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), appearing(tmp_path / "file"):
        open(tmp_path / "elsewhere")


@pytest.mark.parametrize("code, said", [(errno.ENOSPC, "no space left on the disk; with more"), (errno.EIO, "Input/")])
def test_what_the_disk_refuses_is_said_and_leaves_the_old_file(tmp_path, monkeypatch, code, said):
    write_json(tmp_path / "file", {"a": 1})

    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable, "flush", refuse)
    with pytest.raises(UserError, match=f"file: cannot be written: {said}"):
        write_json(tmp_path / "file", {"a": 2})
    assert read_json(tmp_path / "file") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_what_the_disk_refuses_a_library_is_said(tmp_path):
    with (
        pytest.raises(UserError, match="file: cannot be written: no space left on the disk"),
        appearing(tmp_path / "file"),
    ):
        raise Exception("No space left on device (os error 28)")  # as tokenizers does


def test_json_says_when_it_is_damaged(tmp_path):
    value = {"z": [1, 2.5, None], "a": {"b": "\u00e9 \U0001f600"}, "n": 0.1 + 0.2}
    write_json(tmp_path / "file", value)
    assert read_json(tmp_path / "file") == value
    for place in flips(tmp_path / "file"):
        try:
            assert read_json(tmp_path / "file") == value, place  # white space may turn into other
        except Damaged as error:
            assert "file: damaged: " in str(error)
    for text in ("", "null", "[]", "{}", "\0" * 9, "[" * 9999, json.dumps(value)):
        (tmp_path / "file").write_text(text)
        with pytest.raises(Damaged):
            read_json(tmp_path / "file")
    with pytest.raises(Damaged, match="No such file"):
        read_json(tmp_path / "other")


def test_tensors_say_when_they_are_damaged(tmp_path):
    path = tmp_path / "file"
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.randn(4).bfloat16()}
    save_tensors(path, tensors, {"step": 3})
    first = path.read_bytes()
    read, about = load_tensors(path)
    assert about == {"step": 3} and all(torch.equal(read[name], tensors[name]) for name in tensors)
    for _ in flips(path):
        with pytest.raises(Damaged, match="file: damaged: "):
            load_tensors(path)
    for size in range(0, len(first), 7):
        path.write_bytes(first[:size])
        with pytest.raises(Damaged):
            load_tensors(path)
    save_tensors(path, tensors, {"step": 3})
    assert path.read_bytes() == first, "the same bytes each time"
    for metadata in (None, {"about": "{}"}):
        save_file(tensors, path, metadata)
        with pytest.raises(Damaged, match="it has no checksum"):
            load_tensors(path)


def test_a_file_under_the_name_of_another_is_not_own(tmp_path):
    for name in "ab":
        save_tensors(tmp_path / name, {"x": torch.ones(2)}, {"mark": own(tmp_path / name, "unit")})
    assert is_own(tmp_path / "a", "unit") and not is_own(tmp_path / "a", "other")
    (tmp_path / "a").rename(tmp_path / "b")
    assert not is_own(tmp_path / "b", "unit")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, bad):
    with pytest.raises(UserError, match="file: a holds values that are not finite; it is not written"):
        save_tensors(tmp_path / "file", {"a": torch.tensor([1.0, bad])})
    assert not list(tmp_path.iterdir())


def test_new_folders_are_on_the_disk_of_the_one_that_is_there(tmp_path):
    durable.save_tensors(tmp_path / "new" / "folder" / "a.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "new/folder/a.safetensors").exists()


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
    with pytest.raises(UserError, match="file: needs 8e-09 GB, the disk has 7e-09 left; with more of it the same"):
        save_tensors(tmp_path / "file", {"a": torch.ones(2)})


ROWS = [{"n": number, "text": "\u2028 \u00e9" * number} for number in range(6)]


def journal(folder, mark="mark", **settings) -> Journal:
    return Journal(folder / "rows.jsonl", mark, **settings)


def fill(folder) -> Journal:
    made = journal(folder)
    for at in (0, 2, 4):
        made.append(ROWS[at : at + 2])
    made.flush()
    return made


def test_rows_go_on_after_the_last_whole_chunk(tmp_path, caplog):
    fill(tmp_path)
    data, sums = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.sums"
    whole, entries = data.read_bytes(), sums.read_bytes()
    assert whole == lines(ROWS)
    for cut in range(len(whole)):  # killed while rows were written: their chunk is in no sum
        data.write_bytes(whole[:cut])
        kept = sum(cut >= len(lines(ROWS[:count])) for count in (2, 4))
        sums.write_bytes(b"".join(entries.splitlines(keepends=True)[:kept]))
        again = journal(tmp_path)
        assert again.count == 2 * kept and data.read_bytes() == lines(ROWS[: again.count])
    for cut in range(len(entries)):  # killed while the sum was
        data.write_bytes(whole)
        sums.write_bytes(entries[:cut])
        again = journal(tmp_path)
        again.append(ROWS[again.count :])
        assert data.read_bytes() == whole and journal(tmp_path).count == 6
    assert not caplog.records, "nothing was damaged"


def test_rows_that_are_damaged_are_not_taken_which_is_said(tmp_path, caplog):
    fill(tmp_path)
    data, sums = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.sums"
    whole, entries = data.read_bytes(), sums.read_bytes()
    for path in (data, sums):
        for place in flips(path, every=3):
            caplog.clear()
            again = journal(tmp_path)
            assert again.count in (0, 2, 4) and data.read_bytes() == lines(ROWS[: again.count])
            assert f"rows.jsonl: damaged after row {again.count}; what follows is not taken" in caplog.text or (
                path == sums and place == len(entries) - 1  # without its line end the last sum is a torn one
            )
            data.write_bytes(whole)
            sums.write_bytes(entries)
    by_line = whole.splitlines(keepends=True)
    for changed in (by_line[1:], by_line[:3] + by_line[4:], [*by_line, by_line[-1]], by_line[::-1], by_line[:2] * 3):
        data.write_bytes(b"".join(changed))
        sums.write_bytes(entries)
        again = journal(tmp_path)
        assert data.read_bytes() == lines(ROWS[: again.count])


def test_rows_without_their_checksums_are_not_taken_which_is_said(tmp_path, caplog):
    fill(tmp_path)
    (tmp_path / "rows.jsonl.sums").unlink()
    assert journal(tmp_path).count == 0
    assert caplog.messages == [f"{tmp_path}/rows.jsonl: its rows.jsonl.sums is gone; nothing of it is taken"]


def test_rows_that_the_disk_changes_meanwhile_are_not_taken(tmp_path):
    made, data = fill(tmp_path), tmp_path / "rows.jsonl"
    made.finish()
    data.write_bytes(data.read_bytes().replace(b"5", b"6"))
    with pytest.raises(Damaged, match="rows.jsonl: damaged while it was written; the same command makes again what is"):
        made.finish()
    assert journal(tmp_path).count == 4


def test_rows_of_something_else_are_not_taken(tmp_path):
    fill(tmp_path)
    assert journal(tmp_path, "other").count == 0 and not (tmp_path / "rows.jsonl").read_bytes()


def test_rows_that_are_not_wanted_any_more_go(tmp_path):
    fill(tmp_path)
    assert journal(tmp_path, keeps=lambda row: row["n"] <= 3).count == 4
    assert journal(tmp_path, keeps=lambda row: row["n"] <= 2).count == 2


def test_a_full_disk_while_rows_are_written(tmp_path, monkeypatch):
    made = fill(tmp_path)
    made.path = tmp_path / "nowhere" / "rows.jsonl"
    with pytest.raises(UserError, match="rows.jsonl: cannot be written: No such file or directory"):
        made.append(ROWS)


def test_what_a_result_depends_on_is_said_where_it_is_installed(monkeypatch):
    names = {"allo-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy"}

    def look(name):
        if name in ("deepspeed", "triton", "reasoning-gym"):
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(durable, "version", look)
    assert durable.versions.__wrapped__().keys() == {"python"} | names


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensors_are_read_by_whoever_reads_other_files(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        durable.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        model = tiny_llama(vocab_size=len(tokenizer := character_tokenizer()))
        save_model(model, tokenizer, tmp_path / "model")
        assert os.umask(mask) == mask, "it stays"
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "model/model.safetensors", tmp_path / "model/config.json"):
        assert path.stat().st_mode & 0o777 == mode, path
