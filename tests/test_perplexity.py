"""Perplexity of held-out text, and multiple choice answered in the model's own words."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.runs.rows import read_jsonl
from allo_fast.stages.check import check
from allo_fast.stages.perplexity import text_windows
from allo_fast.stages.problems import limits

TEXTS = ["1+2=3. The answer is 3", "9", "12-7+4+4=13, 4-4=0, 11+3=14. The answer is 14\n" * 2]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_each_token_but_the_first_is_in_one_response(tmp_path):
    tokenizer = character_tokenizer()
    windows = [*text_windows(job(tmp_path, [{"text": text} for text in TEXTS], "data.max_prompt_tokens=8"), tokenizer)]
    assert all(1 < len(row["prompt_ids"] + row["responses"][0]["ids"]) <= 8 for row in windows)
    for number, text in enumerate(TEXTS, start=1):
        ids = tokenizer(text).input_ids
        own = [row for row in windows if row["id"].split(":")[1] == str(number)]
        assert [token for row in own for token in row["responses"][0]["ids"]] == ids[1:]
        before = [row["prompt_ids"] + row["responses"][0]["ids"][:-1] for row in own]
        assert [token for window in before for token in window] == ids[:-1]


def job(folder, rows, *words):
    return load_config("configs/quickstart.yaml", [f"data.text={write(folder / 't.jsonl', rows)}", *words])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "12"}, {"words": "12"}], "data.text: t.jsonl:2: no field 'text'"),
        ([{"text": 12}], "data.text: t.jsonl:1: text: expected a text, got 12"),
        ([{"text": "12"}, {"text": None}], "t.jsonl:2: text: expected a text, got None"),
        ([{"text": "1"}], "no text of two tokens"),
    ],
)
def test_what_is_no_text(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        list(text_windows(job(tmp_path, rows), character_tokenizer()))


def test_windows_are_no_longer_than_the_model_reads_and_no_shorter_than_two(tmp_path):
    def longest(*words):
        windows = text_windows(job(tmp_path, [{"text": "7" * 5000}], *words), character_tokenizer())
        return max(1 + len(row["responses"][0]["ids"]) for row in windows)

    positions = limits(job(tmp_path, []), 0).positions
    assert longest("data.max_prompt_tokens=4000") == positions < 4000
    assert longest("data.max_prompt_tokens=1") == 2


@pytest.mark.xdist_group("runs")
def test_every_model_of_a_run_has_one(copied, tmp_path, capsys):
    config, folder = copied
    text = write(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])
    words = [str(config), f"data.text={text}", "name=lost", "method=dpo", "rivals=[]", "warmup.learning_rate=0.1"]
    assert main(["run", *words]) == 0
    out = capsys.readouterr().out
    models = json.loads((tmp_path / "lost/summary.json").read_text())["models"]
    assert len(models["base"]["perplexity"]) == 1 and len(models["dpo"]["perplexity"]) == 2
    assert f"dpo: perplexity of data.text {models['dpo']['perplexity'][0]:.4g} " in out
    path = next((tmp_path / "lost").glob("*-warmup/seed-0/model"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    width, total, count = 1024, 0.0, 0  # micro.yaml leaves data.max_prompt_tokens as it is
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        assert ids.shape[1] < width
        if ids.shape[1] > 1:
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            total, count = total + logps.double().sum().item(), count + len(logps)
    assert models["dpo"]["perplexity"][0] == pytest.approx(math.exp(-total / count), rel=1e-4)
    capsys.readouterr()
    assert main(["eval", str(path), *words]) == 0
    assert f"perplexity of data.text {models['dpo']['perplexity'][0]:.4g}" in capsys.readouterr().out


def test_a_text_that_cannot_be_read_is_found_before(tmp_path):
    rows = [{"text": "12"}, {"words": "12"}]
    found = check(job(tmp_path, rows, "data.train=arithmetic:train[:3]", "data.test=arithmetic:test[:3]"))
    assert any("data.text: t.jsonl:2: no field 'text'" in problem for problem in found.problems)


CHOICES = [{"problem": f"{n}+1?\nOptions:\n{n + 1}\n{n + 2}", "answer": str(n + 1)} for n in range(8)]


@pytest.mark.xdist_group("runs")
def test_choices_answered_in_the_models_own_words(copied, tmp_path):
    config, folder = copied
    rows = write(tmp_path / "choices.jsonl", CHOICES)
    model = next(folder.glob("00-pretrain/base/model"))
    words = [str(config), f"data.train={rows}", f"data.test={rows}", "data.format=multiple_choice", "name=said"]
    words += ["method=dpo", "rivals=[]", "seeds=[0]", f"model.name_or_path={model}", "evaluate.choices=generation"]
    assert main(["run", *words]) == 0
    predictions = list(read_jsonl(next((tmp_path / "said").glob("*-evaluate/base")) / "predictions.jsonl"))
    assert len(predictions) == 8
    assert all({"id", "strict", "release", "response"} == row.keys() for row in predictions)
