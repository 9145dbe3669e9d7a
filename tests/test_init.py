"""`allo-fast init`: from a model and rows to a configuration that checks, fits and runs."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import tiny_llama

from allo_fast.__main__ import main
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model.saving import save_model
from allo_fast.plan.job import job_of, plan_job
from allo_fast.plan.shapes import shape_of
from tests.test_plan import EIGHT

ROWS = {
    "preference": {"prompt": "1+{}=", "chosen": "2", "rejected": "3"},
    "multiple_choice": {"problem": "1+{}=\nOptions:\n2\n3", "answer": "2"},
    "gsm8k": {"question": "1+{}=", "answer": "1+1 is 2\n#### 2"},
    "problems": {"problem": "1+{}=", "solution": "The answer is 2", "answer": "2"},
    "release": {"input": "1+{}=", "output": "The answer is 2"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_llama(vocab_size=96), character_tokenizer(), folder)
    return str(folder)


def rows_in(folder: Path, format: str, count: int = 4) -> str:
    row = json.dumps(ROWS[format])
    (path := folder / f"{format}.jsonl").write_text("".join(row.replace("{}", str(n)) + "\n" for n in range(count)))
    return str(path)


@pytest.mark.parametrize("format", ROWS)
def test_what_rows_are_is_found(tmp_path, model, format):
    out, data = tmp_path / "configs/mine.yaml", rows_in(tmp_path, format)
    assert main(["init", str(out), "--model", model, "--data", data]) == 0
    config = load_config(out)
    assert (config.data.format, config.name, config.method, config.rivals) == (format, "mine", "sparse-dpo", [])
    assert config.data.test_size == 0.1 and config.pairs.eval_size is None, "of so few nothing more is spared"
    assert ("sample" in yaml.safe_load(out.read_text())) == (format not in ("preference", "multiple_choice"))


def test_its_configuration_checks_plans_and_runs(tmp_path, model, capsys, monkeypatch):
    """By the commands that it prints."""
    monkeypatch.chdir(tmp_path)
    words = [
        "init",
        "mine.yaml",
        "--model",
        model,
        "--data",
        rows_in(tmp_path, "preference", 120),
        "--gpu-memory",
        "80",
    ]
    assert main(words) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("allo-fast ")]
    assert [words[0] for words in commands] == ["check", "plan", "run"]
    for words in commands:
        assert main(words) == 0
    assert load_config(Path("mine.yaml")).pairs.eval_size == 0.1
    assert Path("runs/mine/report.html").is_file() and "rewards/accuracies" in capsys.readouterr().out


def test_steps_are_as_many_as_few_pairs_allow(tmp_path, model):
    for count, passes in ((40, 1), (400, 4), (4000, 8)):
        out = tmp_path / f"{count}.yaml"
        assert main(["init", str(out), "--model", model, "--data", rows_in(tmp_path, "preference", count)]) == 0
        assert load_config(out).learn.gradient_accumulation_steps == passes


@pytest.mark.parametrize(("size", "changes"), [(160, 0), (80, 1), (32, 2)])
def test_it_fits(tmp_path, model, monkeypatch, size, changes):
    """As if the model were Llama-3-8B."""

    def eight_billion(config, gpus, gpu_bytes):
        return replace(job_of(config, gpus, gpu_bytes), shape=shape_of(EIGHT, "bfloat16"))

    monkeypatch.setattr("allo_fast.starting.job_of", eight_billion)
    out, data = tmp_path / "mine.yaml", rows_in(tmp_path, "problems")
    assert main(["init", str(out), "--model", model, "--data", data, "--gpu-memory", str(size)]) == 0
    config = load_config(out, auto="bfloat16")
    assert plan_job(eight_billion(config, 1, size * 1e9), {"dense": None, "sparse": None}).fits
    assert out.read_text().count(f"so that it fits into {size} GB") >= changes
    assert ("so that" in out.read_text()) == (changes > 0)


def test_what_does_not_fit_is_said(tmp_path, model, capsys):
    out, data = tmp_path / "mine.yaml", rows_in(tmp_path, "problems")
    assert main(["init", str(out), "--model", model, "--data", data, "--gpu-memory", "1e-5"]) == 2
    assert "nothing makes it fit into 1e-05 GB; `allo-fast plan` says what it needs" in capsys.readouterr().err
    assert not out.exists()


def test_a_test_of_ones_own_that_is_not_there(tmp_path, model, capsys):
    data, one = rows_in(tmp_path, "preference", 9), rows_in(tmp_path, "multiple_choice", 1)
    words = ["--model", model, "--data"]
    assert main(["init", str(tmp_path / "a.yaml"), *words, data, "--test", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err and not (tmp_path / "a.yaml").exists()
    assert main(["init", str(tmp_path / "b.yaml"), *words, one, "--test", data]) == 0, "none is held out of the one row"
    for name in ("a\\b.yaml", 201 * "x" + ".yaml"):
        assert main(["init", str(tmp_path / name), *words, data]) == 2
        assert "allo-fast: name: " in capsys.readouterr().err


def test_every_method_and_a_test_of_ones_own(tmp_path, model):
    data, test = rows_in(tmp_path, "preference", 9), rows_in(tmp_path, "multiple_choice")
    for method in ("allo", "dpo"):
        out = tmp_path / f"{method}.yaml"
        assert main(["init", str(out), "--model", model, "--data", data, "--test", test, "--method", method]) == 0
        config, said = load_config(out), yaml.safe_load(out.read_text())
        assert config.method == method and (config.data.test, config.data.test_size) == (test, None)
        assert ("forget" in said, "learn" in said) == (method == "allo", method == "allo")
    assert yaml.safe_load((tmp_path / "allo.yaml").read_text())["forget"]["learning_rate"] == 2.5e-5


def test_what_is_not_named_is_asked_for(tmp_path, model, monkeypatch, capsys):
    answers = iter([model, rows_in(tmp_path, "gsm8k")])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["init", str(tmp_path / "a.yaml")]) == 2
    assert "init: --model: which? There is nobody to ask" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["init", str(tmp_path / "a.yaml")]) == 0 and load_config(tmp_path / "a.yaml").data.format == "gsm8k"


def test_mistakes(tmp_path, model, capsys):
    (strange := tmp_path / "strange.jsonl").write_text('{"a": 1}\n')
    (taken := tmp_path / "taken.yaml").write_text("mine")

    def said(*words: str) -> str:
        assert main(["init", *words]) == 2
        return capsys.readouterr().err

    new = str(tmp_path / "new.yaml")
    (one := tmp_path / "one.jsonl").write_text(json.dumps(ROWS["preference"]) + "\n")
    assert "one.jsonl: one prompt alone, of which none can be held out" in said(
        new, "--model", model, "--data", str(one)
    )
    for size in ("0", "-5", "nan", "1e9"):
        words = (new, "--model", model, "--data", rows_in(tmp_path, "preference"), "--gpu-memory", size)
        assert "--gpu-memory: expected GB of a device, got" in said(*words)
    assert "taken.yaml: exists already; name a file that does not" in said(str(taken), "--model", model, "--data", "x")
    assert taken.read_text() == "mine"
    assert said(new, "--model", model, "--data", "x.jsonl").count("no such file") == 1
    lines = said(new, "--model", model, "--data", str(strange)).splitlines()
    assert lines[0].endswith("strange.jsonl: no format reads its rows") and len(lines) == 6
    assert lines[1] == "as preference: no usable row; strange.jsonl:1: no field 'chosen'; it has ['a']"
    assert "nowhere" in said(new, "--model", str(tmp_path / "nowhere"), "--data", str(strange))
    assert not Path(new).exists()
