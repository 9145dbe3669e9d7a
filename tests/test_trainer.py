"""SparsePolicy and SparseAdamW inside transformers.Trainer and TRL's DPOTrainer: trained right, or refused."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama
from torch import nn
from trainer_worker import LR, logged, make_trainer, sparse_trainer, vector
from transformers import AutoModelForCausalLM

from allo_fast import SparseAdamW, SparsePolicy
from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import collate
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights

EVERY_2 = {"save_strategy": "steps", "save_steps": 2}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def masks(policy: SparsePolicy) -> dict[str, torch.Tensor]:
    """Per weight of the model, which entries are selected."""
    selected = {
        name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in named_weights(policy.model).items()
    }
    for name, at in policy.positions.items():
        selected[name].view(-1)[at.unpack()] = True
    return selected


def dense_control(model, selected: dict[str, torch.Tensor], lr: float) -> torch.optim.AdamW:
    """Of every weight, with gradients of zero where nothing is selected."""
    for name, weight in named_weights(model).items():
        weight.register_hook(lambda gradient, mask=selected[name]: gradient * mask)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def assert_same_training(policy: SparsePolicy, dense, start, atol: float) -> None:
    """Unselected entries as they started, bit for bit; selected ones as the dense control's, and moved."""
    trained = named_weights(policy.model)
    for name, mask in masks(policy).items():
        assert torch.equal(trained[name][~mask], start[name][~mask])
        torch.testing.assert_close(trained[name], named_weights(dense)[name].detach(), rtol=0, atol=atol)
    assert policy.changed() > 0.9 * policy.selected


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 3}, id="accumulation"),
        pytest.param({"max_grad_norm": 0.0}, id="unclipped"),
        pytest.param({"bf16": True}, id="autocast"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(REENTRANT, id="reentrant"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 1}, id="evaluation"),
    ],
)
def test_trains_as_a_dense_model_with_masked_gradients(tmp_path, changes):
    """Norms and clipping are Trainer's own."""
    start = named_weights(tiny_llama())
    trainer, policy = sparse_trainer(tmp_path, **changes)
    trainer.train()
    dense = tiny_llama()
    control = make_trainer(dense, dense_control(dense, masks(policy), LR), tmp_path, **changes)
    control.train()
    # Adam turns the last bits of a small gradient into a part of lr: autocast rounds gradients to 8 bits.
    assert_same_training(policy, dense, start, atol=LR / 2 if "bf16" in changes else 2e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(
        logged(control, "grad_norm"), rel=1e-2 if "bf16" in changes else 1e-5
    )
    assert min(logged(trainer, "grad_norm")) > trainer.args.max_grad_norm
    assert logged(trainer, "eval_loss") == pytest.approx(logged(control, "eval_loss"), abs=1e-6)


@pytest.mark.parametrize("dtype, seed", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 3)])
def test_resuming_is_exact(tmp_path, dtype, seed):
    straight, policy = sparse_trainer(tmp_path, dtype, seed, **EVERY_2)
    straight.train()
    again, resumed = sparse_trainer(tmp_path, dtype, seed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(vector(resumed), vector(policy))
    assert not torch.equal(vector(policy), vector(policy).bfloat16().float()), "values keep their fp32"
    for name, weight in named_weights(straight.model).items():
        assert torch.equal(weight, named_weights(again.model)[name])
    for one, other in zip(straight.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
    with resumed.reference():
        start = named_weights(tiny_llama().to(dtype))
        assert all(torch.equal(weight, start[name]) for name, weight in named_weights(again.model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_model_is_loaded_and_saved_as_a_normal_folder(tmp_path, dtype):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer, policy = sparse_trainer(
        tmp_path, dtype, **every, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1"), "greater is better: the first"
    best = named_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=dtype))
    for name, at in policy.positions.items():
        assert torch.equal(policy.values[name].to(dtype), best[name].view(-1)[at.unpack()])
    trainer.save_model(tmp_path / "saved")
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(weight, best[name]) for name, weight in named_weights(saved).items())
    assert policy.changed()
    with pytest.raises(UserError, match="the model loaded a state, but not the optimizer its own"):
        trainer.optimizer.step()


def test_the_models_state_without_the_optimizers_is_refused(tmp_path):
    sparse_trainer(tmp_path, save_only_model=True, **EVERY_2)[0].train()
    with pytest.raises(UserError, match="the model loaded a state, but not the optimizer its own"):
        sparse_trainer(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_selection_is_refused(tmp_path):
    sparse_trainer(tmp_path, **EVERY_2)[0].train()
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model, seed=2))
    with pytest.raises(UserError, match="load_state_dict: of another model or selection"):
        make_trainer(model, SparseAdamW(policy), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_optimizer_that_does_not_write_is_refused(tmp_path):
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model))
    with pytest.raises(UserError, match=r"train them with SparseAdamW\(policy\)"):
        make_trainer(model, None, tmp_path).train()  # Trainer makes its own AdamW
    with pytest.raises(UserError, match=r"call policy.write_back\(\)"):
        model.state_dict()
    policy.write_back()
    model.state_dict()


def test_an_optimizer_that_does_not_write_into_the_head_is_refused():
    """Whose weight log-probabilities read past the module."""
    model, corpus = tiny_llama(), pair_corpus()
    scores = {name: torch.zeros(weight.shape) for name, weight in named_weights(model).items()}
    scores["lm_head.weight"] += torch.rand(scores["lm_head.weight"].shape)
    policy = SparsePolicy(model, Selection.from_scores(scores, 0.01, base=fingerprint(model)))
    assert [name for name, value in policy.values.items() if len(value)] == ["lm_head.weight"]
    batch, optimizer = collate(corpus, corpus.examples), torch.optim.AdamW(policy.values.values(), lr=1e-2)
    policy.response_logps(batch).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="the values of lm_head.weight were changed"):
        policy.response_logps(batch)


def test_values_that_deepspeed_replaced_are_refused():
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model))
    for value in policy.values.values():
        value.data = value.data.clone()
    with pytest.raises(UserError, match="were changed or replaced, but not in the model"):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize("move", [nn.Module.bfloat16, lambda model: model.to("meta")], ids=["cast", "moved"])
def test_a_model_that_leaves_its_policy_behind_is_refused(move):
    model = tiny_llama()
    SparsePolicy(model, random_selection(model))
    model.to("cpu").float()  # where it is
    with pytest.raises(UserError, match="its model is moved or cast from cpu, torch.float32 to"):
        move(model)


def test_a_bfloat16_model_may_be_cast_to_what_it_is():
    model = tiny_llama().bfloat16()
    policy = SparsePolicy(model, random_selection(model))
    assert model.bfloat16().dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in policy.values.values())


def test_copies_and_replicas_are_refused():
    model = tiny_llama()
    SparsePolicy(model, random_selection(model))
    with pytest.raises(UserError, match="its model was copied"):
        copy.deepcopy(model)(torch.tensor([[5, 6]]))
    with pytest.raises(UserError, match="nn.DataParallel is not supported"):
        for module in model.modules():
            module._replicate_for_data_parallel()


def test_weights_that_fsdp_replaced_are_refused():
    model = tiny_llama()
    SparsePolicy(model, random_selection(model))
    shard = model.lm_head._parameters["weight"].detach()[:1]
    model.lm_head.weight = nn.Parameter(shard)  # as fully_shard does
    with pytest.raises(UserError, match="got another weight"):
        model(torch.tensor([[5, 6]]))
    del model.lm_head._parameters["weight"]
    with pytest.raises(UserError, match="got another weight"):
        model.lm_head.weight = shard  # as FullyShardedDataParallel does


def dpo_trainer(model, optimizer, folder: Path, **changes):
    """TRL's, with the reference computed from `model` as it is now."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a * b + 1}"} for a in (2, 7) for b in range(9)
    ]
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "max_grad_norm": 0.1,
        "precompute_ref_log_probs": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    data = datasets.Dataset.from_list(pairs)
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(folder, **settings | changes),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=character_tokenizer(),
        optimizers=(optimizer, None),
    )


def sparse_dpo_trainer(folder: Path, ratio: float, dtype=torch.float32, **changes):
    model = tiny_llama(vocab_size=len(character_tokenizer())).to(dtype)
    policy = SparsePolicy(model, random_selection(model, ratio))
    with policy.reference():
        return dpo_trainer(model, SparseAdamW(policy, lr=1e-3), folder, **changes), policy


@pytest.mark.parametrize("ratio", [0.05, 1.0])
def test_dpo_in_trl_is_the_dense_one_with_masked_gradients(tmp_path, ratio):
    """At 1.0 nothing is masked: plain dense DPO."""
    trainer, policy = sparse_dpo_trainer(tmp_path, ratio)
    trainer.train()
    dense = tiny_llama(vocab_size=len(character_tokenizer()))
    start = copy.deepcopy(named_weights(dense))
    control = dpo_trainer(dense, dense_control(dense, masks(policy), 1e-3), tmp_path)
    control.train()
    assert_same_training(policy, dense, start, atol=2e-6)
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert logged(trainer, key) == pytest.approx(logged(control, key), rel=1e-3, abs=1e-5)
    assert logged(trainer, "rewards/margins")[0] == 0 and logged(trainer, "rewards/margins")[-1] != 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(control.evaluate()["eval_loss"], abs=1e-6)


def test_dpo_in_trl_resumes_exactly(tmp_path):
    straight, policy = sparse_dpo_trainer(tmp_path, 0.05, torch.bfloat16, **EVERY_2)
    straight.train()
    again, resumed = sparse_dpo_trainer(tmp_path, 0.05, torch.bfloat16)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(vector(resumed), vector(policy))


def test_the_reference_of_a_trained_policy_in_trl(tmp_path):
    """Inside `policy.reference()` TRL computes the reference that the policy started from, not what it has become."""
    trainer, policy = sparse_dpo_trainer(tmp_path, 0.05)
    trainer.train()
    with policy.reference():
        second = dpo_trainer(policy.model, SparseAdamW(policy, lr=1e-3), tmp_path)
    keys = ["ref_chosen_logps", "ref_rejected_logps"]
    assert second.train_dataset.select_columns(keys).to_dict() == trainer.train_dataset.select_columns(keys).to_dict()
