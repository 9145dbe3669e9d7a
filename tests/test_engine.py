import copy
import json
import math
import os
import signal
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama

from allo_fast import signals
from allo_fast.config import TrainConfig, UserError
from allo_fast.data.batch import collate
from allo_fast.durable import load_tensors, save_tensors
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Npo, Preference, Sft
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights
from allo_fast.runs.rows import read_jsonl
from allo_fast.training.engine import Trainer, TrainingError
from allo_fast.training.steps import plan_steps, shuffled

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
    else:
        weights = None
    return Trainer(
        policy, corpus, objective or Preference(0.5, 0.5), config, folder, token_weights=weights, protocol=protocol
    )


def weights_after(training):
    metrics = list(training.run())
    return metrics, {name: weight.detach().clone() for name, weight in named_weights(training.policy.model).items()}


def test_ratio_one_trains_exactly_as_dense_torch_adamw(tmp_path):
    """An independent dense DPO with a second model, torch's clip and torch's AdamW, on the same batches."""
    sparse, ours = weights_after(trainer(tmp_path / "sparse", ratio=1.0, objective=Preference(0.5)))
    model, reference, corpus = tiny_llama(), tiny_llama(), pair_corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    examples = shuffled(corpus, seed=0)
    problems = corpus.responses.prompts[examples[:, 0]]
    steps = [examples[step].tolist() for epoch in plan_steps(problems, 4, epochs=2, seed=0) for step in epoch]
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: t if t < 1 else 0.5 * (1 + math.cos(math.pi * (t - 1) / (len(steps) - 1))),  # warm-up 1, cosine
    )
    losses = []
    for pairs in steps:
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


@pytest.mark.parametrize("objective", [Preference(0.5, 0.5), Npo(0.5), Sft()], ids=["dpo", "npo", "sft"])
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


def stopped_after(folder, steps: int, **changes) -> None:
    """A training that was killed when it had made so many steps; a checkpoint a step."""
    run = trainer(folder, save_steps=1, **changes).run()
    for _ in range(steps):
        next(run)
    run.close()


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    stopped_after(tmp_path, 3)
    (around := tmp_path / ".checkpoint-4.safetensors.partial").mkdir()
    (around / "checkpoint-4.safetensors").write_bytes(b"torn")
    assert checkpoints(tmp_path)[1:] == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]
    assert [m.step for m in trainer(tmp_path, save_steps=1).run()][0] == 4
    assert checkpoints(tmp_path) == ["checkpoint-5.safetensors", "checkpoint-6.safetensors"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def turn_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def other_mark(path):
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, about | {"mark": "another"})


@pytest.mark.parametrize("damage", [cut, turn_a_bit, other_mark, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_that_is_not_whole_or_not_its_own_is_passed_over(tmp_path, caplog, damage):
    _, straight = weights_after(trainer(tmp_path / "straight"))
    stopped_after(tmp_path, 3)
    damage(tmp_path / "checkpoint-3.safetensors")
    metrics, weights = weights_after(trainer(tmp_path, save_steps=1))
    assert metrics[0].step == 3 and all(torch.equal(straight[name], weights[name]) for name in straight)
    (line,) = [record.message for record in caplog.records if "checkpoint" in record.message]
    assert "checkpoint-3.safetensors: " in line and line.endswith("; training goes on from the one of step 2")
    assert read_jsonl(tmp_path / "metrics.jsonl")[2]["step"] == 3
    stopped_after(tmp_path / "both", 2)
    for step in (1, 2):
        damage(tmp_path / "both" / f"checkpoint-{step}.safetensors")
    caplog.clear()
    assert next(trainer(tmp_path / "both").run()).step == 1
    assert [record.message.rpartition("; ")[2] for record in caplog.records if "checkpoint" in record.message] == [
        *("training goes on from the one of step 1", "training goes on from the beginning")
    ]


def test_a_checkpoint_says_what_made_it(tmp_path):
    made = trainer(tmp_path, save_steps=1)
    made.checkpoints.mark = "of this unit"
    list(made.run())
    _, about = load_tensors(tmp_path / "checkpoint-6.safetensors")
    assert about["mark"] == "of this unit"
    assert about["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # which build, or not


def test_a_checkpoint_of_an_earlier_version_is_passed_over(tmp_path, caplog):
    stopped_after(tmp_path, 2)
    tensors, about = load_tensors(path := tmp_path / "checkpoint-2.safetensors")
    save_tensors(path, tensors, {key: value for key, value in about.items() if key != "watched"})
    (tmp_path / "checkpoint-1.safetensors").unlink(missing_ok=True)
    assert next(trainer(tmp_path, save_steps=1).run()).step == 1
    assert "checkpoint-2.safetensors: of an earlier version; training goes on from the beginning" in caplog.text


def test_a_checkpoint_also_when_minutes_are_over(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(
        "allo_fast.training.engine.time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: 0)
    )
    run = trainer(tmp_path, save_steps=99, save_minutes=2).run()
    found = []
    for minutes in (0, 1.5, 2.1, 3, 4.2):
        clock[0] = 60 * minutes
        next(run)
        found.append(checkpoints(tmp_path))
    third = "checkpoint-3.safetensors"
    assert found == [[], [], [third], [third], [third, "checkpoint-5.safetensors"]]


def test_a_disk_without_room_for_a_third_loses_the_older(tmp_path, monkeypatch):
    stopped_after(tmp_path, 2)
    free, size = [0], (tmp_path / "checkpoint-2.safetensors").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    run = trainer(tmp_path, save_steps=1).run()
    with pytest.raises(UserError, match="checkpoint-3.safetensors: needs .* GB, the disk has 0 left"):
        next(run)
    assert checkpoints(tmp_path) == ["checkpoint-2.safetensors"]
    free[0] = size
    assert next(trainer(tmp_path, save_steps=1).run()).step == 3


def test_a_checkpoint_that_was_refused_goes_before_one_that_is_good(tmp_path, monkeypatch):
    stopped_after(tmp_path, 3)
    turn_a_bit(tmp_path / "checkpoint-3.safetensors")
    (size,) = {path.stat().st_size for path in tmp_path.glob("checkpoint-*")}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    run = trainer(tmp_path, save_steps=2).run()
    with pytest.raises(UserError, match="checkpoint-4.safetensors: needs"):
        deque(run, maxlen=0)
    assert checkpoints(tmp_path) == ["checkpoint-2.safetensors"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))
    stopped_after(tmp_path / "pruned", 3)
    turn_a_bit(tmp_path / "pruned/checkpoint-3.safetensors")
    next(trainer(tmp_path / "pruned", save_steps=1).run())
    assert checkpoints(tmp_path / "pruned") == ["checkpoint-2.safetensors", "checkpoint-3.safetensors"]
    assert next(trainer(tmp_path / "pruned", save_steps=1).run()).step == 4


def test_a_signal_after_the_last_step_too(tmp_path):
    with signals.handled(), pytest.raises(signals.Interrupted):
        for metrics in trainer(tmp_path, save_steps=99).run():
            if metrics.step == metrics.total_steps:
                os.kill(os.getpid(), signal.SIGTERM)
    assert checkpoints(tmp_path) == ["checkpoint-6.safetensors"] and not list(trainer(tmp_path).run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_with_the_checkpoint_of_its_step(tmp_path, number):
    with signals.handled():
        run = trainer(tmp_path, save_steps=99).run()
        next(run)
        os.kill(os.getpid(), number)
        assert next(run).step == 2
        with pytest.raises(signals.Interrupted) as caught:
            next(run)
    assert caught.value.number == number and checkpoints(tmp_path) == ["checkpoint-2.safetensors"]
    assert next(trainer(tmp_path).run()).step == 3


def test_checkpoints_that_were_lost_are_said(tmp_path, caplog):
    stopped_after(tmp_path, 3)
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    assert next(trainer(tmp_path).run()).step == 1
    assert "metrics.jsonl: steps were made, but no checkpoint of them is there; training begins again" in caplog.text


def test_a_log_that_was_lost_is_said(tmp_path, caplog):
    stopped_after(tmp_path, 3)
    (tmp_path / "metrics.jsonl").unlink()
    metrics = list(trainer(tmp_path).run())
    assert "metrics.jsonl: 3 of 3 steps are not there any more" in caplog.text
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [m.step for m in metrics]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype, rate", [(torch.float32, 1e38), (torch.bfloat16, 3.4e38)])
def test_weights_that_go_too_far_end_the_run_with_the_last_good_checkpoint(tmp_path, dense, dtype, rate):
    """At a learning rate up to which the loss stays finite: it is the update that is too much, of the last step too."""

    def build(**changes):
        model = tiny_llama() if dense else tiny_llama().to(dtype)
        policy = DensePolicy(model) if dense else SparsePolicy(model, random_selection(model))
        settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 9.0, "num_train_epochs": 1}
        return trainer(tmp_path, policy=policy, **{"save_steps": 1} | settings | changes)

    with pytest.raises(TrainingError, match="step 1: a weight is NaN, infinite or too large for its dtype after"):
        next(build(learning_rate=rate).run())
    assert not checkpoints(tmp_path)
    with pytest.raises(TrainingError, match="step 1: a weight is NaN"):
        list(build(learning_rate=rate, per_device_train_batch_size=99, save_steps=99).run())


def poisoned(folder, steps: set[int], **changes) -> Trainer:
    """Whose objective is NaN in these steps, from 1."""
    made, plain, calls = trainer(folder, **changes), Preference(0.5), iter(range(99))
    per_step = made.config.gradient_accumulation_steps

    class Poisoned(Preference):
        def __call__(self, logps, ref_logps, batch):
            loss, metrics = plain(logps, ref_logps, batch)
            return loss * (float("nan") if next(calls) // per_step + 1 in steps else 1.0), metrics

    made.objective = Poisoned(0.5)
    return made


def test_what_is_not_finite_is_not_learned_from_and_named(tmp_path):
    training = poisoned(tmp_path, {2}, save_steps=1)
    run = training.run()
    next(run)
    before = {name: weight.clone() for name, weight in training.backend.full_weights()}
    with pytest.raises(TrainingError, match=r"step 2: loss nan, gradient norm nan; on rank 0 in row:\d"):
        next(run)
    assert all(torch.equal(before[name], weight) for name, weight in training.backend.full_weights())
    assert checkpoints(tmp_path) == ["checkpoint-1.safetensors"]


@pytest.mark.parametrize("dense", [False, True])
def test_steps_that_are_not_finite_may_be_passed_over(tmp_path, caplog, dense):
    def build(folder, steps, **changes):
        return poisoned(folder, steps, policy=DensePolicy(tiny_llama()) if dense else None, **changes)

    run = build(tmp_path, {2, 3}, skip_nonfinite_steps=2, save_steps=1)
    assert [m.step for m in run.run()] == [1, *range(4, len(run.steps) + 1)] and run.skipped == 2
    assert "step 2: loss nan" in caplog.text and "passed over, 1 of 2" in caplog.text
    assert all(weight.isfinite().all() for _, weight in run.backend.full_weights())
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")][:2] == [1, 4]
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        list(build(tmp_path / "one", {2, 3}, skip_nonfinite_steps=1).run())
    killed = build(tmp_path / "killed", {2}, skip_nonfinite_steps=1, save_steps=1).run()
    next(killed), next(killed)
    killed.close()
    caplog.clear()
    again = trainer(tmp_path / "killed", policy=DensePolicy(tiny_llama()) if dense else None, skip_nonfinite_steps=1)
    assert next(again.run()).step == 4 and again.skipped == 1 and "not there any more" not in caplog.text


@pytest.mark.parametrize("dense", [False, True])
def test_what_was_counted_is_known_where_no_step_is_left(tmp_path, dense):
    def build():
        return trainer(tmp_path, policy=DensePolicy(tiny_llama()) if dense else None, save_steps=1)

    list((first := build()).run())
    assert not list((again := build()).run()) and again.state_bytes() == first.state_bytes()


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
    metrics = next(trainer(tmp_path, objective=Preference(0.5, 0.5)).run())
    assert metrics.loss == torch.tensor(2.0).log().item() and metrics.metrics["rewards/margins"] == 0
    assert metrics.metrics["key_tokens"] == 1.0, "nothing is lowest before the first update"
    pairs = [*map(tuple, shuffled(pair_corpus(), seed=0)[:4].tolist())]
    assert metrics.tokens == sum(collate(pair_corpus(), micro).tokens for micro in (pairs[:2], pairs[2:]))


def test_the_reference_is_the_policy_before_training_bit_for_bit(tmp_path):
    for number, per_batch in enumerate((1, 2, 3)):  # 3 cuts the two pairs of a problem apart
        first = next(trainer(tmp_path / str(number), per_device_train_batch_size=per_batch).run())
        assert first.metrics["rewards/chosen"] == first.metrics["rewards/rejected"] == 0


def test_later_steps_keep_only_key_tokens(tmp_path):
    later = list(trainer(tmp_path, objective=Preference(0.5, 0.3)).run())[2:]  # the first has a learning rate of zero
    assert all(0 < m.metrics["key_tokens"] <= 0.5 for m in later)


def test_release_clips_by_the_dense_norm(tmp_path):
    selected = next(trainer(tmp_path / "a").run())
    everything = next(
        trainer(tmp_path / "b", protocol="release", objective=Preference(0.5, 0.5, protocol="release")).run()
    )
    dense = next(trainer(tmp_path / "c", policy=DensePolicy(tiny_llama())).run())
    assert everything.grad_norm == pytest.approx(dense.grad_norm, rel=1e-5)
    assert selected.grad_norm < 0.5 * dense.grad_norm


def test_npo_lowers_the_weighted_tokens(tmp_path):
    last = list(trainer(tmp_path, objective=Npo(0.5)).run())[-1]
    assert last.metrics["logps/forgotten_change"] < -0.02


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    training = trainer(tmp_path)
    deque(training.prepare(), maxlen=0)
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


@pytest.mark.parametrize("loss, asked", [("ipo", True), ("simpo", False)])
def test_an_online_reference_is_asked_where_the_loss_has_one(tmp_path, monkeypatch, loss, asked):
    made, seen = trainer(tmp_path, objective=Preference(0.5, losses=((loss, 1.0),))), []
    (tmp_path / "online").mkdir()
    again = Trainer(made.policy, pair_corpus(), made.objective, made.config, tmp_path / "online", online=True)
    plain = made.policy.reference
    monkeypatch.setattr(made.policy, "reference", lambda: seen.append(1) or plain())
    deque(again.run(), maxlen=0)
    assert bool(seen) == asked
