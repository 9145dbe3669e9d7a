"""Everything that would end a run later is said before it starts, at once."""

import json
import os
import re
from types import SimpleNamespace

import pytest
from conftest import tiny_llama
from tiny import CHATML, byte_level

from allo_fast.__main__ import main
from allo_fast.config_file import load_config
from allo_fast.errors import UserError, nearest, no_such
from allo_fast.model.checkpoint import read_config
from allo_fast.model.saving import save_model

ROW = {"prompt": "How?", "chosen": "So.", "rejected": "No."}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def job(tmp_path):
    """A configuration file of a preference job with 128 positions, and how to run a command on it."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    save_model(tiny_llama(), byte_level(eos="<eos>"), tmp_path / "other")
    config = tmp_path / "job.yaml"
    data = {name: str(write(tmp_path / f"{name}.jsonl", *[ROW] * 4)) for name in ("train", "test")}
    settings = {"name": "run", "output_dir": str(tmp_path / "runs"), "data": {"format": "preference", **data}}
    settings |= {"model": {"name_or_path": str(tmp_path / "base")}, "rewards": {"template": "{}{}{}"}}
    settings["rivals"] = ["dpo"]
    config.write_text(json.dumps(settings))
    return lambda command, *overrides: main([command, str(config), *overrides])


def test_nothing_stands_against_a_sound_job(job, capsys, tmp_path):
    assert job("check") == 0
    said = capsys.readouterr().out
    assert "data.train: 4 rows, 0 set aside" in said and "nothing stands against this run" in said
    assert r"first prompt: '<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n'" in said
    assert "first response: 'So.<|im_end|>'" in said and not (tmp_path / "runs").exists()


def test_test_prompts_that_are_trained_on(job, capsys, tmp_path):
    rows = [{**ROW, "prompt": prompt} for prompt in ("How?", "Why?", "Who?")]
    write(tmp_path / "test.jsonl", *rows, {**rows[0], "chosen": "Otherwise."})
    assert job("check") == 0
    assert "data.test: 2 of 4 prompts are in data.train, too\n" in capsys.readouterr().out
    write(tmp_path / "test.jsonl", *rows[1:])
    assert job("check") == 0
    assert "too" not in capsys.readouterr().out


def test_pairs_of_which_none_would_train_or_be_looked_at(job, capsys, tmp_path):
    rows = [{**ROW, "prompt": f"How {number}?", "loss_weight": 0} for number in range(30)]
    write(tmp_path / "train.jsonl", *rows)
    assert job("check") == 2
    assert "problem: loss_weight: those of all pairs that train are 0" in capsys.readouterr().out
    write(tmp_path / "train.jsonl", *rows, {**ROW, "loss_weight": 0.5})
    assert job("check") == 0 and job("check", "pairs.eval_size=0.3") == 2
    said = capsys.readouterr().out
    assert len({part for part in ("train", "pairs.eval_size holds out") if f"pairs that {part} are 0" in said}) == 1
    assert job("check", "pairs.eval_size=0.001") == 2
    assert "pairs.eval_size: 0.001 of 31 problems with pairs leaves 0 to look at" in capsys.readouterr().out


def test_a_budget_that_nothing_fits_into(job, capsys):
    assert job("check", "learn.max_tokens_per_batch=14", "warmup.max_tokens_per_batch=14") == 0
    capsys.readouterr()
    assert job("check", "learn.max_tokens_per_batch=13", "warmup.max_tokens_per_batch=14") == 2
    said = "".join(capsys.readouterr())
    assert "learn.max_tokens_per_batch: 13: the shortest prompt with a response of data.train has 14 tokens" in said
    assert "warmup" not in said
    assert job("check", "rivals=[]", "warmup.max_tokens_per_batch=13") == 2, "weights are located by its steps"
    assert "warmup.max_tokens_per_batch: 13: the shortest prompt" in capsys.readouterr().out


def test_eight_problems_are_eight_lines(job, capsys, tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", {**ROW, "chosen": "So. " * 200}, {**ROW, "rejected": ""})
    write(tmp_path / "rewards.jsonl", {"prompt": "How?"})
    paths = {"data.test": "none.jsonl", "learn.reference": "other", "warmup.reference": "nowhere"}
    paths |= {"rewards.path": "rewards.jsonl", "locate.after": "gone", "deepspeed": "none.json"}
    wrong = [f"{key}={tmp_path / name}" for key, name in paths.items()]
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
        assert job("check", *wrong, "rewards.source=file") == 2
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    expected = (
        "deepspeed: .*none.json: cannot be read",
        "data.train: .*train.jsonl: no usable row; train.jsonl:",
        "data.test: .*none.jsonl: no such file",
        "rewards.jsonl:1: expected the fields prompt, response and rewards",
        "locate.after: .*gone: no such file",
        "warmup.reference: .*nowhere: no such file",
        "learn.reference: .*other has another vocabulary than",
        "output_dir: the run writes up to .* GB, .* has .* GB left",
    )
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line), (line, pattern)
    assert job("run", *wrong[:3]) == 2
    said = capsys.readouterr().err
    assert "4 problems before any stage starts:" in said and "\n4. " in said and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["model.name_or_path={folder}/gone"], "gone: no such file or folder"),
        (["model.device=tpu"], "model.device: tpu"),
        (["model.name_or_path=/" + "x" * 300], "xxx: no such file or folder"),
        (["rewards.source=rewriter", "rewards.template=null"], "rewards.template: the rewriting prompt alone has"),
        (["data.chat_template=false", "data.prompt_template=none"], "data.prompt_template: expected 1 times {{}}"),
        (["locate.exclude=['*embd*']"], "locate.exclude: '*embd*' matches no tensor of the model"),
        (["forget.ratio=1e-9"], "nothing is selected: ratio 1e-09 of"),
        (["locate.scope=per_tensor", "learn.ratio=1e-5"], "nothing is selected: ratio 1e-05 of"),
        (["model.attn_implementation=none_such"], "model.attn_implementation: none_such: "),
        (["data.max_prompt_tokens=3"], "data.max_prompt_tokens is 3"),
        (["data.format=problems"], "no field 'problem'"),
        (
            [
                "rewards.source=prompted",
                "rewards.template='{{}}{{}}{{}}" + " bread" * 50 + "'",
                "sample.max_new_tokens=9",
                "data.format=problems",
                "data.train={folder}/wordy.jsonl",
            ],
            "rewards.template: the rewriting prompt alone has 1",
        ),
        (
            ["data.format=problems", "data.train={folder}/problems.jsonl"],
            "with 1024 of max_new_tokens that is more than the 128",
        ),
    ],
)
def test_each_problem(job, capsys, tmp_path, overrides, problem):
    write(tmp_path / "problems.jsonl", {"problem": "1+1", "solution": "The answer is 2", "answer": "2"})
    wordy = {"problem": "1+1 " * 20, "solution": "2 " * 40, "answer": "2"}
    write(tmp_path / "wordy.jsonl", wordy, wordy)
    assert job("check", *(override.format(folder=tmp_path) for override in overrides)) == 2
    assert problem.format(folder=tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize("key", ["learn.reference", "warmup.reference", "rewards.model"])
@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"max_position_embeddings": 8}, "short reads 8 tokens, a prompt with its response has"),
        ({"vocab_size": 300}, "short embeds 300 tokens, a row has the token"),
    ],
)
def test_other_models_that_cannot_read_the_rows(job, capsys, tmp_path, changes, problem, key):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    save_model(tiny_llama(**{"vocab_size": len(tokenizer)} | changes), tokenizer, tmp_path / "short")
    assert job("check", "rivals=[]", f"{key}={tmp_path / 'short'}") == 2
    said = capsys.readouterr().out
    assert f"problem: {key}: {tmp_path}/{problem}" in said and "problems: 1" in said


def test_a_model_whose_change_is_ranked_is_like_the_base(job, capsys, tmp_path):
    tokenizer = byte_level(eos="<eos>")
    base = len(byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML))
    for name, sizes in (("after", {"vocab_size": base}), ("wider", {"vocab_size": base, "intermediate_size": 64})):
        save_model(tiny_llama(seed=3, **sizes), tokenizer, tmp_path / name)
    assert job("check", f"locate.after={tmp_path / 'after'}") == 0, "its tokenizer is never used"
    capsys.readouterr()
    assert job("check", f"locate.after={tmp_path / 'wider'}") == 2
    said = capsys.readouterr().out
    assert "wider: not a model like the base: model.layers.0.mlp.down_proj.weight differs" in said
    assert job("check", "locate.after=/nowhere") == 2
    assert "locate.after: /nowhere: no such file" in capsys.readouterr().out
    assert job("check", "locate.after=/nowhere", "method=dpo") == 0, "which locates nothing"


def test_where_nothing_can_be_written(job, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert job("check", f"output_dir={tmp_path / 'file' / 'runs'}") == 2
    assert "file: not a folder that can be written" in capsys.readouterr().out
    assert job("check", f"output_dir={tmp_path}", "name=file") == 2
    assert "file: not a folder that can be written" in capsys.readouterr().out
    assert job("check", f"output_dir={tmp_path}/{'x' * 300}") == 2
    assert re.search("problem: output_dir: .*xxx: file name too long", capsys.readouterr().out)


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_tokenizer_that_is_broken(job, capsys, tmp_path, text):
    (tmp_path / "base" / "tokenizer.json").write_text(text)
    assert job("check") == 2
    assert "problem: model.name_or_path: " in capsys.readouterr().out


def test_rows_that_are_set_aside_are_counted(job, capsys, tmp_path):
    write(tmp_path / "test.jsonl", ROW, {**ROW, "chosen": "So. " * 200}, {**ROW, "rejected": "So."})
    assert job("check") == 0
    said = capsys.readouterr().out
    assert "data.test: 1 rows, 2 set aside; test.jsonl:2: the prompt has " in said


def test_a_token_outside_the_embedding(job, capsys, tmp_path):
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    tokenizer.add_tokens(["So"])
    tokenizer.save_pretrained(tmp_path / "base")
    assert job("check") == 2
    assert "the token 'So' is" in capsys.readouterr().out


def test_of_what_is_not_there_the_nearest_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("models/TinyLlama-Chat", "data/train-00000.parquet", "job.yaml"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match="no model configuration that can be read: .*; nearest: models/TinyLlama-Chat$"):
        read_config("models/TinyLama-chat")
    with pytest.raises(UserError, match="^jobs.yaml: no such file; nearest: job.yaml$"):
        load_config("jobs.yaml")
    assert no_such(tmp_path / "data/train-00001.parquet").endswith(f"; nearest: {tmp_path}/data/train-00000.parquet")
    assert no_such(tmp_path) == f"{tmp_path}: a folder, where a file was expected"
    assert no_such(os.devnull) == f"{os.devnull}: no file that is read"
    assert nearest("job.yaml") == "", "it is there"
    for path in ("dat/train-00000.parquet", "elsewhere", ""):
        assert no_such(path) == f"{path}: no such file", "nothing is called nearly so"


def test_rows_that_cannot_be_read_are_not_missed_where_some_of_them_are_held_out(job, capsys, tmp_path):
    write(tmp_path / "train.jsonl", *({"prompt": f"How {number}?"} for number in range(9)))
    for lost in ("train.jsonl", "gone.jsonl"):
        assert job("check", "data.test=null", f"data.train={tmp_path / lost}") == 2
        said = capsys.readouterr().out
        assert said.count("problem: ") == 1 and "problem: data.train: " in said
