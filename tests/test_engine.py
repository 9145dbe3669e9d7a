import copy
import json
import math

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama

from allo_fast.config import TrainConfig
from allo_fast.data.batch import collate, plan_micro_batches, plan_steps
from allo_fast.method.objectives import Dpo, Npo, Sft
from allo_fast.method.policy import DensePolicy, SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.training.engine import CHECKPOINT, Trainer, TrainingError

SETTINGS = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "warmup_steps": 1,
    "max_grad_norm": 0.5,
}


def trainer(folder, policy=None, objective=None, ratio=0.05, protocol="paper", **changes):
    corpus, model = pair_corpus(), tiny_llama()
    policy = policy or SparsePolicy(model, random_selection(model, ratio), keep_dense_gradients=protocol == "release")
    folder.mkdir(exist_ok=True)
    config = TrainConfig(**SETTINGS | changes)
    weights = [
        [(column + index) % 3 / 2 for column in range(len(r.tokens))] for index, r in enumerate(corpus.responses)
    ]
    if isinstance(objective, Npo | Sft):
        corpus.examples = [(index,) for index in range(len(corpus.responses))]
    return Trainer(policy, corpus, objective or Dpo(0.5, 0.5), config, folder, token_weights=weights, protocol=protocol)


def weights_after(training):
    metrics = list(training.run())
    return metrics, {name: weight.detach().clone() for name, weight in named_weights(training.policy.model).items()}


def test_ratio_one_trains_exactly_as_dense_torch_adamw(tmp_path):
    """An independent dense DPO with a second model, torch's clip and torch's AdamW, on the same batches."""
    sparse, ours = weights_after(trainer(tmp_path / "sparse", ratio=1.0, objective=Dpo(0.5)))
    model, reference, corpus = tiny_llama(), tiny_llama(), pair_corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    micros = plan_micro_batches(corpus, 2, seed=0)
    steps = [[micros[m] for m in step] for epoch in plan_steps(len(micros), 2, epochs=2, seed=0) for step in epoch]
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: t if t < 1 else 0.5 * (1 + math.cos(math.pi * (t - 1) / (len(steps) - 1))),  # warm-up 1, cosine
    )
    losses = []
    for step in steps:
        pairs = [pair for micro in step for pair in micro]
        total = 0.0
        for chosen, rejected in pairs:
            margin = 0.0
            for index, sign in ((chosen, 1), (rejected, -1)):
                prompt, tokens = corpus.prompts[corpus.responses[index].prompt], corpus.responses[index].tokens
                ids, start = torch.tensor([prompt + tokens]), len(prompt) - 1
                for net, side in ((model, sign), (reference, -sign)):
                    logps = net(ids).logits[0].log_softmax(-1)
                    margin = margin + side * logps[range(start, start + len(tokens)), tokens].sum()
            total = total - torch.nn.functional.logsigmoid(0.5 * margin) / len(pairs)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        rates.step()
        losses.append(total.item())
    assert [m.loss for m in sparse] == pytest.approx(losses, rel=1e-4)
    # Adam turns a gradient's rounding into a fraction of lr = 1e-2 where the gradient itself is nearly zero.
    for name, weight in named_weights(model).items():
        error = (ours[name] - weight).abs()
        assert error.mean() < 1e-6 and (error < 1e-4).float().mean() > 0.999, name


def test_dense_and_ratio_one_agree(tmp_path):
    _, sparse = weights_after(trainer(tmp_path / "a", ratio=1.0))
    _, dense = weights_after(trainer(tmp_path / "b", policy=DensePolicy(tiny_llama())))
    for name in dense:
        assert (sparse[name] - dense[name]).abs().mean() < 1e-6


@pytest.mark.parametrize("objective", [Dpo(0.5, 0.5), Npo(0.5), Sft()], ids=["dpo", "npo", "sft"])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, objective):
    settings = {"objective": objective, "num_train_epochs": 1}
    one, left = weights_after(trainer(tmp_path / "a", **settings))
    cuts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    cut, right = weights_after(trainer(tmp_path / "b", **settings, **cuts))
    assert [m.loss for m in one] == pytest.approx([m.loss for m in cut], rel=1e-4)
    for name in left:
        assert (left[name] - right[name]).abs().mean() < 1e-6


@pytest.mark.parametrize("dense", [False, True])
def test_killed_and_continued_is_bit_for_bit_the_same(tmp_path, dense):
    def build(folder):
        return trainer(folder, policy=DensePolicy(tiny_llama()) if dense else None, save_steps=2)

    metrics, straight = weights_after(build(tmp_path / "straight"))
    killed = build(tmp_path / "killed").run()
    for _ in range(3):  # one step after the checkpoint is lost
        next(killed)
    killed.close()
    continued, resumed = weights_after(build(tmp_path / "killed"))
    assert [m.step for m in continued] == list(range(3, len(metrics) + 1))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [m.loss for m in metrics]
    assert {"step", "epoch", "learning_rate", "grad_norm", "rewards/margins"} <= set(lines[0])


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    run = trainer(tmp_path, save_steps=1).run()
    next(run)
    run.close()
    (tmp_path / CHECKPOINT).with_suffix(".partial").write_bytes(b"torn")
    assert [m.step for m in trainer(tmp_path).run()][0] == 2


def test_a_weight_without_gradient_survives_a_resume(tmp_path):
    def build():
        model = tiny_llama()
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        return trainer(tmp_path, policy=DensePolicy(model), save_steps=1)

    run = build().run()
    next(run)
    run.close()
    assert [m.step for m in build().run()][0] == 2


def test_a_short_stage_still_learns(tmp_path):
    metrics = list(trainer(tmp_path, per_device_train_batch_size=99, num_train_epochs=1, warmup_steps=0.1).run())
    assert [m.learning_rate for m in metrics] == [1e-2], "one step, and no warm-up that would waste it"


def test_the_first_loss_is_that_of_no_preference(tmp_path):
    metrics = next(trainer(tmp_path, objective=Dpo(0.5, 0.5)).run())
    assert metrics.loss == torch.tensor(2.0).log().item() and metrics.metrics["rewards/margins"] == 0
    assert metrics.metrics["key_tokens"] == 1.0, "nothing is lowest before the first update"
    assert metrics.tokens == sum(
        collate(pair_corpus(), micro).tokens for micro in plan_micro_batches(pair_corpus(), 2, seed=0)[:2]
    )


def test_the_reference_is_the_policy_before_training_bit_for_bit(tmp_path):
    for number, per_batch in enumerate((1, 2, 3)):  # 3 cuts the two pairs of a problem apart
        first = next(trainer(tmp_path / str(number), per_device_train_batch_size=per_batch).run())
        assert first.metrics["rewards/chosen"] == first.metrics["rewards/rejected"] == 0


def test_later_steps_keep_only_key_tokens(tmp_path):
    later = list(trainer(tmp_path, objective=Dpo(0.5, 0.3)).run())[2:]  # the first has a learning rate of zero
    assert all(0 < m.metrics["key_tokens"] <= 0.5 for m in later)


def test_release_clips_by_the_dense_norm(tmp_path):
    selected = next(trainer(tmp_path / "a").run())
    everything = next(trainer(tmp_path / "b", protocol="release", objective=Dpo(0.5, 0.5, protocol="release")).run())
    dense = next(trainer(tmp_path / "c", policy=DensePolicy(tiny_llama())).run())
    assert everything.grad_norm == pytest.approx(dense.grad_norm, rel=1e-5)
    assert selected.grad_norm < 0.5 * dense.grad_norm


def test_npo_lowers_the_weighted_tokens(tmp_path):
    last = list(trainer(tmp_path, objective=Npo(0.5)).run())[-1]
    assert last.metrics["logps/forgotten_change"] < -0.02


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    training = trainer(tmp_path)
    with torch.no_grad():
        next(iter(training.policy.weights.values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        next(training.run())


def test_bf16_resident_weights_follow_fp32_values(tmp_path):
    model = tiny_llama().bfloat16()
    selection = Selection.from_scores(
        {name: torch.rand(weight.shape) for name, weight in named_weights(model).items()}, 0.05, base=fingerprint(model)
    )
    before = copy.deepcopy(named_weights(model))
    policy = SparsePolicy(model, selection)
    list(trainer(tmp_path, policy=policy, learning_rate=1e-5).run())
    for name, at in policy.positions.items():
        resident, value = policy.weights[name].view(-1)[at.unpack()], policy.values[name].detach()
        assert torch.equal(resident, value.bfloat16())
        drift = (value - before[name].view(-1)[at.unpack()].float()).abs().max()
        assert 0 < drift < 1e-3, "updates far below bf16's rounding accumulate in the values"
    assert 0 < policy.changed() < selection.selected
