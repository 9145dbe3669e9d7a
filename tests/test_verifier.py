"""Judges of the user's own: `data.scorer: FILE.py:FUNCTION`."""

import json

import pyarrow.parquet
import pytest
from conftest import tiny_llama

from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.problems import read_problems
from allo_fast.data.scoring import judge_of, scorers_with
from allo_fast.data.verifier import own_judge
from allo_fast.runs.rows import read_jsonl
from allo_fast.stages.check import check

SCORERS = """
from __future__ import annotations
import math
from dataclasses import dataclass
import numpy

def ends_with(response, row):
    return response.endswith(row["ending"])

def has_length(response, row):
    return len(response) % 2 == row["odd"]

def too_much(response, row):
    return math.sqrt(len(response))

def graded(response, row):
    return numpy.float32(0.25)

def careless(response, row):
    return row["no such field"]

def alone(response):
    return True

def said(response, row):
    return "yes"

def array(response, row):
    return numpy.zeros(2)

def leaves(response, row):
    raise SystemExit(3)

def changes(response, row):
    return row.pop("right")

def of_numpy(response, row):
    return numpy.bool_(response == "x")

@dataclass
class Rule:
    # which asks its module for its annotations
    length: int

def as_rewards(response, row):
    return float(response == row["problem"])
"""


@pytest.fixture
def scorer(tmp_path):
    path = tmp_path / "scorers.py"
    path.write_text(SCORERS)
    return f"{path}:{{}}".format


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_judge_sees_the_whole_row(scorer):
    judge = judge_of(scorer("ends_with"))
    assert judge("so 7", {"answer": "", "fields": {"ending": "7"}})
    assert not judge("so 8", {"answer": "", "fields": {"ending": "7"}})
    assert judge_of(scorer("as_rewards"))("x", {"fields": {"problem": "x"}}) is True, "numbers, as rewards are"
    assert judge_of(scorer("of_numpy"))("x", {"fields": {}}) is True
    assert type(grade := judge_of(scorer("graded"))("x", {"fields": {}})) is float and grade == 0.25
    assert scorers_with(scorer("ends_with")) == ("ends_with()",), "wherever its file lies"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_much", "too_much: expected True, False or a number between 0 and 1, got 1.7"),
        ("said", "said: expected True, False or a number between 0 and 1, got 'yes'"),
        ("array", "array: expected True, False or a number between 0 and 1, got array"),
        ("careless", r"careless: KeyError: 'no such field', .*scorers.py:\d+, of the response 'abc'"),
        ("alone", r"alone: TypeError: .*positional argument.*, of the response 'abc'"),
        ("leaves", r"leaves: SystemExit: 3, .*scorers.py:\d+, of the response 'abc'"),
        ("nobody", "no function nobody"),
        ("SCORERS", "no function SCORERS"),
    ],
)
def test_what_a_judge_may_not_do_is_said(scorer, name, said):
    with pytest.raises(UserError, match=said):
        own_judge(scorer(name))("abc", {})


def test_a_file_by_a_relative_path_has_lines_too(scorer, tmp_path, monkeypatch):
    scorer("careless")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"careless: KeyError: 'no such field', scorers.py:\d+, of the response"):
        own_judge("scorers.py:careless")("abc", {})


def test_a_judge_is_told_of_whom_and_cannot_change_the_row(scorer):
    row = {"id": "rows.jsonl:7", "fields": {"right": True}}
    judge = judge_of(scorer("changes"))
    assert judge("a", row) and judge("b", row)
    with pytest.raises(UserError, match="rows.jsonl:7: data.scorer: careless"):
        judge_of(scorer("careless"))("a", row)


def test_a_file_that_cannot_be_run(tmp_path):
    with pytest.raises(UserError, match="none.py: no such file"):
        own_judge(f"{tmp_path}/none.py:f")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="broken.py: ModuleNotFoundError"):
        own_judge(f"{tmp_path}/broken.py:f")


def test_rows_need_no_gold_answer_then(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "ending": "7"}, {"problem": "b", "answer": "3"}])
    first, second = read_problems(source, "problems", "own.py:f")
    assert (first.solution, first.answer, first.fields) == ("", "", {"problem": "a", "ending": "7"})
    assert (second.answer, second.fields) == ("3", {"problem": "b", "answer": "3"})
    with pytest.raises(UserError, match="no field 'solution'"):
        list(read_problems(source, "problems"))


def test_answers_may_be_anything_then(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "answer": None}, {"problem": "b", "answer": 2}])
    first, second = read_problems(source, "problems", "own.py:f")
    assert (first.answer, second.answer, second.fields["answer"]) == ("", "", 2)


def test_a_judge_sees_a_row_as_it_will_be_written(tmp_path):
    table = pyarrow.table({"problem": ["a", "b"], "when": [1, None]}).cast(
        pyarrow.schema([("problem", pyarrow.string()), ("when", pyarrow.timestamp("s"))])
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    bad, good = read_problems(str(tmp_path / "rows.parquet"), "problems", "own.py:f")
    assert "a field that JSON does not know" in bad.reason and good.fields == {"problem": "b"}


def test_an_unknown_scorer_is_named():
    with pytest.raises(
        UserError,
        match="data.scorer: expected strict, release, math, FILE.py:FUNCTION or reward_model:FOLDER .got 'exact'",
    ):
        load_config("configs/quickstart.yaml", ["data.scorer=exact"])


def rows_of(count, start=0):
    return [{"problem": f"{n}+1", "ending": str(n % 10), "odd": n % 2} for n in range(start, start + count)]


@pytest.mark.xdist_group("runs")
def test_a_run_that_only_a_function_judges(copied, tmp_path, scorer, capsys):
    config, _ = copied
    train = write_rows(tmp_path / "train.jsonl", rows_of(12))
    test = write_rows(tmp_path / "test.jsonl", rows_of(6, 20))
    words = [f"data.train={train}", f"data.test={test}", f"data.scorer={scorer('has_length')}", "name=judged"]
    words += ["method=sparse-dpo", "rivals=[]", "seeds=[0]", "sample.temperature=3", "sample.top_p=1"]
    model = str(next((tmp_path / "micro").glob("00-pretrain/base/model")))
    words += [f"model.name_or_path={model}"]
    assert main(["run", str(config), *words]) == 0
    folder = tmp_path / "judged"
    sampled = read_jsonl(next(folder.glob("*-sample/seed-0")) / "responses.jsonl")
    responses = [(r["text"], r["correct"], row["fields"]["odd"]) for row in sampled for r in row["responses"]]
    assert all(correct == (len(text) % 2 == odd) for text, correct, odd in responses)
    assert len({correct for _, correct, _ in responses}) == 2
    base = json.loads((folder / "summary.json").read_text())["models"]["base"]
    assert [*base["scorers"]] == ["has_length()"]
    assert "has_length" in capsys.readouterr().out

    # Where the file lies does not matter; another function of it decides anew, and so does the file.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "moved.py").write_text(SCORERS)
    moved = [word.replace("scorers.py", "elsewhere/moved.py") for word in words]
    assert main(["run", str(config), *moved]) == 0
    assert "has_length()" in capsys.readouterr().out
    assert main(["run", str(config), *(w.replace(":has_length", ":as_rewards") for w in words)]) == 2
    assert "data.scorer was has_length, now as_rewards" in capsys.readouterr().err
    (tmp_path / "scorers.py").write_text(SCORERS + "\n")
    assert main(["run", str(config), *words]) == 2
    assert "data.scorer: the file was" in capsys.readouterr().err


def test_what_would_end_a_run_later_is_found_before(tmp_path, scorer):
    train = write_rows(tmp_path / "train.jsonl", rows_of(12))
    words = [f"data.train={train}", f"data.test={train}", f"model.name_or_path={tmp_path}/base"]
    words += ["rewards.source=confidence"]
    tiny_llama(vocab_size=40, max_position_embeddings=256).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")

    def problems(name, *more):
        return " ".join(
            check(load_config("configs/quickstart.yaml", [*words, f"data.scorer={scorer(name)}", *more])).problems
        )

    assert "scorers.py: no function nobody" in problems("nobody")
    assert "careless: KeyError" in problems("careless")
    assert "careless" not in problems("ends_with")
    assert "no solution, which sft and rewards.source need" in problems("ends_with", "sft={}")
    assert "no solution, which sft and rewards.source need" in problems("ends_with", "rewards.source=rewriter")


@pytest.mark.xdist_group("runs")
def test_choices_in_the_models_own_words_may_have_a_judge(copied, tmp_path, scorer):
    config, folder = copied
    choices = [{"problem": f"{n}+1?\nOptions:\n{n + 1}\n{n + 2}", "answer": str(n + 1), "odd": n % 2} for n in range(8)]
    rows, model = write_rows(tmp_path / "choices.jsonl", choices), next(folder.glob("00-pretrain/base/model"))
    words = [str(config), f"data.train={rows}", f"data.test={rows}", "data.format=multiple_choice", "name=said"]
    words += ["method=dpo", "rivals=[]", "seeds=[0]", f"model.name_or_path={model}", "evaluate.choices=generation"]
    assert main(["run", *words, f"data.scorer={scorer('has_length')}"]) == 0
    predictions = read_jsonl(next((tmp_path / "said").glob("*-evaluate/base")) / "predictions.jsonl")
    assert [row["has_length()"] for row in predictions] == [
        len(row["response"]) % 2 == number % 2 for number, row in enumerate(predictions)
    ]
