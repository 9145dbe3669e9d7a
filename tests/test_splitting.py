"""Where no data.test is named: which prompts of data.train are held out for it."""

import json

import pytest
from conftest import MICRO, apart
from pydantic import ValidationError

from allo_fast.__main__ import main
from allo_fast.config_file import load_config
from allo_fast.config_sections import DataConfig
from allo_fast.data.splitting import read_split
from allo_fast.errors import UserError
from allo_fast.plan.rows import count_rows
from allo_fast.stages import STAGES


def pair(number: int, rejected: str = "no") -> dict:
    return {"prompt": f"Question {number}?", "chosen": "yes", "rejected": rejected}


def divided(folder, rows: list[dict], **settings) -> tuple[list[str], list[str]]:
    """The prompts of both sides, in order."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(folder / "rows.jsonl"), format="preference", **settings)
    return tuple([problem.prompt for problem in apart(read_split(data, key))[0]] for key in ("train", "test"))


@pytest.mark.parametrize(("size", "held_out"), [(None, 4), (0.25, 10), (0.001, 1), (0.999, 39)])
def test_a_share_of_the_prompts_is_held_out(tmp_path, size, held_out):
    train, test = divided(tmp_path, [pair(number) for number in range(40)], test_size=size)
    assert len(test) == held_out
    assert sorted(train + test) == sorted(f"Question {number}?" for number in range(40))


def test_rows_of_one_prompt_stay_together(tmp_path):
    rows = [pair(number, rejected) for rejected in ("no", "never", "maybe") for number in range(10)]
    train, test = divided(tmp_path, rows, test_size=0.3)
    assert len(test) == 9 and len(set(test)) == 3 and not {*train} & {*test}


def test_a_prompt_is_the_same_as_a_text_and_as_a_message(tmp_path):
    rows = [pair(number) for number in range(20)]
    messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    train, test = divided(tmp_path, [*rows, *messages], test_size=0.3)
    assert len(test) == 12 and len(train) == 28
    texts = [row if isinstance(row, str) else row[0]["content"] for row in test]
    assert len({*texts}) == 6, "each in both ways"


def test_neither_order_nor_other_columns_matter(tmp_path):
    rows = [pair(number) for number in range(20)]
    _, test = divided(tmp_path, rows)
    _, again = divided(tmp_path, [pair(number, "other") for number in reversed(range(20))])
    assert test == again[::-1]


def test_the_tools_of_a_prompt_are_part_of_it(tmp_path):
    tools = [[{"type": "function", "function": {"name": name}}] for name in "abcdefgh"]
    train, test = divided(tmp_path, [{**pair(0), "tools": each} for each in tools], test_size=0.25)
    assert (len(train), len(test)) == (6, 2)


def test_what_is_set_aside_is_so_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" + "".join(json.dumps(pair(number)) + "\n" for number in range(4)))
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), format="preference")
    assert [len(apart(read_split(data, key))[1]) for key in ("train", "test")] == [1, 0]


def test_one_prompt_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl: one prompt alone, of which none can be held out; name a data"):
        divided(tmp_path, [pair(0), pair(0, "never")])


def test_a_test_of_ones_own(tmp_path):
    train, test = divided(tmp_path, [pair(number) for number in range(4)], test=str(tmp_path / "rows.jsonl"))
    assert len(train) == len(test) == 4, "the same rows, which is allowed"
    with pytest.raises(
        ValidationError,
        match="test_size: of data.train where there is no data.test; beside one set",
    ):
        DataConfig(train="a.jsonl", test="b.jsonl", test_size=0.1)
    settled = DataConfig(train="a.jsonl")
    assert DataConfig(**settled.model_dump()) == settled, "as a run keeps its settings"


def test_a_job_of_it(tmp_path, capsys):
    config = tmp_path / "micro.yaml"
    text = MICRO.format(folder=tmp_path).replace("  test: arithmetic:test[:8]\n", "")
    config.write_text(text.replace("[1000:1006]", "[1000:1020]"))
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr()
    assert (
        "data.train: 18 rows, 0 set aside\ndata.test: 2 rows, held out of data.train, 0 set aside"
        in said.err + said.out
    )
    loaded = load_config(config)
    assert (count_rows(loaded).problems, count_rows(loaded).tests) == (18, 2)
    for stage in ("sft", "sample", "evaluate"):
        assert "data.test_size" in STAGES[stage].settings
