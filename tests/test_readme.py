"""The Python in docs/ runs."""

import re
from pathlib import Path

import pytest
import torch
from conftest import random_selection, tiny_llama

from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, section: str) -> list[str]:
    text = (DOCS / page).read_text().partition(f"# {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(snippets: list[str]) -> dict:
    """All in one namespace, which it returns."""
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs", "exec"), names)
    return names


def test_the_kernels():
    names = run(blocks("kernels.md", "The kernels"))
    trained = names["weight"].view(-1)[names["positions"].unpack()]
    assert torch.equal(trained, names["values"]) and names["values"].grad.any()


def test_deltas_on_a_live_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, weights = tiny_llama(), []
    for seed, name in enumerate(("polite", "brief")):
        trained = tiny_llama()
        policy = SparsePolicy(trained, random_selection(trained, seed=seed))
        for value in policy.values.values():
            value.data += 0.1
        policy.write_back()
        Path(f"runs/{name}/08-learn/seed-0").mkdir(parents=True)
        policy.save_delta(Path(f"runs/{name}/08-learn/seed-0/delta.safetensors"))
        weights.append(named_weights(trained))
    (snippet,) = blocks("library.md", "Deltas on a live model")
    names = {"model": model}
    exec(compile(snippet, "docs", "exec"), names)
    assert names["polite"].applied and names["polite"].scale == 0.5 and not names["brief"].applied
    names["polite"].scale = 1
    assert all(torch.equal(weight, weights[0][name]) for name, weight in named_weights(model).items())


def test_as_a_library(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="its second block trains in TRL")
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "base")
    for weight in model.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    save_model(model, tokenizer, tmp_path / "base-after-a-dpo-warm-up")
    names = run(blocks("library.md", "As a library"))
    again = type(model).from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    assert all(torch.equal(w.cpu(), named_weights(again)[name]) for name, w in named_weights(names["model"]).items())
    assert {entry["step"] for entry in names["trainer"].state.log_history} == {4}
    assert (tmp_path / "out/checkpoint-4/optimizer.pt").exists()
