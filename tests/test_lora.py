"""LoRA as a rival: what its adapters start from, train and become."""

import sys

import pytest
import torch

from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.config_train import LoraSettings
from allo_fast.data.batch import collate
from allo_fast.method.dense import DensePolicy
from allo_fast.method.lora import LoraPolicy
from allo_fast.method.optim import ClippedAdamW
from allo_fast.model.weights import fingerprint
from allo_fast.stages.check import check
from tests.conftest import MICRO, SAME_BITS, pair_corpus, tiny_llama


def test_adapters_start_as_the_base_and_end_in_its_weights():
    torch.manual_seed(0)
    base, corpus = tiny_llama(), pair_corpus()
    policy = LoraPolicy(tiny_llama(), LoraSettings(r=3))
    batch = collate(corpus, corpus.examples, policy.logps.layout)
    before = DensePolicy(base).response_logps(batch).detach()
    assert torch.equal(policy.response_logps(batch).detach(), before) and policy.fingerprint() == fingerprint(base)
    assert policy.parameters == sum(weight.numel() for weight in base.parameters())
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert {name.rsplit(".", 3)[-3][:4] for name in trained} == {"lora"} and not any(
        "lm_head" in name for name in trained
    )
    optimizer = ClippedAdamW(trained.values(), lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        policy.response_logps(batch).sum().backward()
        optimizer.step()
    states = policy.state_bytes()
    assert states["values"] == states["gradients"] == sum(weight.nbytes for weight in trained.values())
    assert states["base"] == 4 * policy.parameters
    adapted = policy.response_logps(batch).detach()
    policy.merge()
    weights = dict(policy.full_weights())
    assert weights.keys() == dict(base.named_parameters()).keys()
    base.load_state_dict(weights, strict=False)
    merged = DensePolicy(base).response_logps(batch).detach()
    assert torch.allclose(merged, adapted, atol=1e-4) and (adapted - before).abs().max() > 0.1
    changed = {name for name, weight in tiny_llama().named_parameters() if not torch.equal(weight, weights[name])}
    assert changed == {name for name in weights if name.endswith("_proj.weight")}


def test_a_bfloat16_base_stays_one():
    policy = LoraPolicy(tiny_llama().bfloat16(), LoraSettings(r=2, target_modules=["q_proj"]))
    dtypes = {weight.requires_grad: weight.dtype for weight in policy.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    policy.merge()
    assert {weight.dtype for _, weight in policy.full_weights()} == {torch.float32}


@pytest.mark.parametrize("layers", [["nowhere"], "("])
def test_layers_that_are_not_there(layers):
    with pytest.raises(UserError, match="warmup.lora: "):
        LoraPolicy(tiny_llama(), LoraSettings(target_modules=layers))


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="warmup.lora: PEFT is not installed: pip install peft"):
        LoraPolicy(tiny_llama(), LoraSettings())
    words = ["method=dpo", "rivals=[]", "warmup.lora={}", "data.train=arithmetic:train[:3]"]
    assert check(load_config("configs/quickstart.yaml", words)).problems == [
        "warmup.lora: PEFT is not installed: pip install peft"
    ]


@SAME_BITS
@pytest.mark.xdist_group("runs")
def test_a_run_with_lora_as_its_dense_rival(tmp_path, capsys):
    (config := tmp_path / "micro.yaml").write_text(
        MICRO.format(folder=tmp_path).replace("locate: {score: delta, windows: 32}\n", "")
    )
    words = [str(config), "method=dpo", "rivals=[]", "warmup.lora.r=2", "seeds=[0]"]
    assert main(["run", *words]) == 0
    first = (tmp_path / "micro/04-warmup/seed-0/model/model.safetensors").read_bytes()
    assert main(["warmup", *words, "name=again", f"output_dir={tmp_path}/b"]) == 2, "it needs what the run made"
    assert main(["run", *words, "name=again"]) == 0
    assert (tmp_path / "again/04-warmup/seed-0/model/model.safetensors").read_bytes() == first, "adapters start alike"
    capsys.readouterr()
    assert main(["plan", *words]) == 2 and "warmup.lora: not planned" in capsys.readouterr().err
    for more, said in [("deepspeed=auto", "needs one process"), ("method=allo locate.score=delta", "locate none")]:
        assert main(["check", *words, *more.split()]) == 2 and said in capsys.readouterr().err
