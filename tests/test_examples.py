"""The scripts in examples/ run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_selection, tiny_llama
from transformers import AutoModelForCausalLM

from allo_fast import load_delta
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path) -> Path:
    save_model(tiny_llama(vocab_size=len(character_tokenizer())), character_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def run(name: str, *words: object) -> str:
    command = [sys.executable, ROOT / "examples" / name, *map(str, words)]
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def changed(said: str) -> int:
    return int(re.search(r"^([\d,]+) of [\d,]+ weights changed$", said, re.MULTILINE)[1].replace(",", ""))


def entries_that_differ(model, other) -> int:
    return sum(int((weight != named_weights(other)[name]).sum()) for name, weight in named_weights(model).items())


def rows_in(path: Path, row: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(16)))
    return path


def test_dpo_in_trl(tmp_path, model):
    pytest.importorskip("trl")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    random_selection(base).save(tmp_path / "selection.safetensors")
    pairs = rows_in(tmp_path / "pairs.jsonl", {"prompt": "2+3=", "chosen": "5", "rejected": "6"})
    words = ["--dtype", "float32", "--learning-rate", "1e-2"]
    said = run("trl_dpo.py", model, tmp_path / "selection.safetensors", pairs, tmp_path / "out", *words)
    assert "'rewards/margins': '0'" in said and "grad_norm" in said, "the reference is the base"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype=torch.float32)
    assert entries_that_differ(base, trained) == changed(said) > 0
    load_delta(base, tmp_path / "out/delta.safetensors")
    assert entries_that_differ(base, trained) == 0


def test_fine_tuning_in_transformers(tmp_path, model):
    texts = rows_in(tmp_path / "texts.jsonl", {"text": "2+3=5"})
    said = run("trainer_sft.py", model, texts, tmp_path / "out", "--learning-rate", "1e-2", "--ratio", "0.1")
    assert "grad_norm" in said
    base = AutoModelForCausalLM.from_pretrained(model)
    before = AutoModelForCausalLM.from_pretrained(model)
    load_delta(base, tmp_path / "out/delta.safetensors")
    share = entries_that_differ(base, before) / sum(weight.numel() for weight in named_weights(base).values())
    assert entries_that_differ(base, before) == changed(said) and 0.05 < share <= 0.1
