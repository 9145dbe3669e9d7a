"""Pairs that do not train: looked at while others do; training ends, or goes back, by what they lose."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import MICRO, pair_corpus, random_selection, tiny_llama

from allo_fast.__main__ import main
from allo_fast.config import TrainConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.report.figures import training_curves
from allo_fast.runs.home import MANIFEST
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.driving import train
from allo_fast.training.engine import Trainer
from allo_fast.training.examples import Examples
from allo_fast.training.held_out import LOSS, HeldOut
from tests.test_stages import run_pairs

SETTINGS = {
    "learning_rate": 3e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


def trainer(folder, *, every=2, watched=True, patience=None, keeps_best=False, **changes) -> Trainer:
    """At a rate that learns by heart what trains."""
    folder.mkdir(exist_ok=True)
    config, objective = TrainConfig(**SETTINGS | changes), Preference(0.1)
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model))
    examples = Examples(pair_corpus(3, seed=9), config)
    held_out = HeldOut(examples, objective, every, patience, keeps_best, policy) if watched else None
    return Trainer(policy, pair_corpus(), objective, config, folder, held_out=held_out)


def truth(model, base) -> tuple[float, float, float]:
    """Of the pairs that do not train the mean DPO loss, the mean log-probability of what is chosen in them, and
    KL(model || base) by the token."""
    corpus = pair_corpus(3, seed=9)

    def said(of, response) -> torch.Tensor:  # [its tokens, V]
        ids = corpus.prompts[response.prompt] + response.tokens
        return of(torch.tensor([ids])).logits[0].log_softmax(-1)[-len(response.tokens) - 1 : -1]

    losses, chosen, divergences = [], [], []
    for pair in corpus.examples:
        responses = [corpus.responses[number] for number in pair]
        both = [[said(of, response) for response in responses] for of in (model, base)]
        divergences += [(p.exp() * (p - q)).sum(1) for p, q in zip(*both, strict=True)]
        own, reference = (
            [logps[range(len(r.tokens)), r.tokens].sum() for logps, r in zip(every, responses, strict=True)]
            for every in both
        )
        margin = (own[0] - reference[0]) - (own[1] - reference[1])
        losses.append(-torch.nn.functional.logsigmoid(0.1 * margin).item())
        chosen.append(own[0].item())
    return sum(losses) / len(losses), sum(chosen) / len(chosen), torch.cat(divergences).mean().item()


@pytest.mark.parametrize("budget", [None, 40])
def test_it_sees_the_loss_of_all_pairs(tmp_path, budget):
    training = trainer(tmp_path, every=4, max_tokens_per_batch=budget)
    rows = [metrics.row() for metrics in training.run()]
    assert [row["step"] for row in rows if LOSS in row] == [4, 6], "and after the last step"
    with torch.no_grad():
        loss, chosen, divergence = truth(training.policy.model, tiny_llama())
    assert rows[-1][LOSS] == pytest.approx(loss, abs=1e-5)
    assert rows[-1]["eval_logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert divergence > 0.01 and rows[-1]["eval_kl"] == pytest.approx(divergence, rel=1e-4)
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/rejected"} <= rows[-1].keys()
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1][LOSS] == rows[-1][LOSS]


def test_it_changes_no_step(tmp_path):
    free = [metrics.loss for metrics in trainer(tmp_path / "free", watched=False).run()]
    assert [metrics.loss for metrics in trainer(tmp_path / "watched", every=1).run()] == free


def losses_of(training: Trainer) -> list[float]:
    return [metrics.row()[LOSS] for metrics in training.run()]


def test_training_ends_when_the_last_looks_were_no_better(tmp_path):
    every = losses_of(trainer(tmp_path / "free", every=1, num_train_epochs=4))
    best = every.index(min(every))
    assert best < len(every) - 4, "or the test shows nothing"
    ended = trainer(tmp_path / "ended", every=1, num_train_epochs=4, patience=3, save_steps=1)
    assert losses_of(ended) == every[: ended.made] and ended.made < len(ended.steps)
    assert all(loss > min(every[: ended.made]) for loss in every[ended.made - 3 : ended.made])
    first = next(end for end in range(4, 24) if min(every[:end]) < min(every[end - 3 : end]))
    assert ended.made == first, "and not before"
    again = trainer(tmp_path / "ended", every=1, num_train_epochs=4, patience=3, save_steps=1)
    assert not [*again.run()] and again.made == ended.made, "and it stays ended"


def test_the_best_weights_are_left(tmp_path):
    every = losses_of(trainer(tmp_path / "free", every=1, num_train_epochs=4))
    training = trainer(tmp_path / "best", every=1, num_train_epochs=4, keeps_best=True)
    assert losses_of(training) == every, "it goes on, for it may become better"
    with torch.no_grad():
        assert truth(training.policy.model, tiny_llama())[0] == pytest.approx(min(every), abs=1e-5)
    assert training.held_out.best_step == every.index(min(every)) + 1 < training.made


def test_damaged_best_weights_are_not_used(tmp_path, caplog):
    """Of the last checkpoint; the one before goes on, or all begins again."""
    whole = trainer(tmp_path / "whole", every=1, num_train_epochs=4, keeps_best=True)
    losses_of(whole)
    for damaged, first in ((1, 6), (2, 1)):
        (folder := tmp_path / str(damaged)).mkdir()
        stopped = trainer(folder, every=1, num_train_epochs=4, keeps_best=True, save_steps=5)
        for metrics in stopped.run():
            if metrics.step == 12:
                break
        bests = sorted(folder.glob("best-*"), key=lambda path: path.stat().st_mtime_ns)
        steps = {int(path.stem.partition("-")[2]) for path in bests}
        assert {step for step in steps if step <= 10} == {5, 10}, "those of the two checkpoints"
        for path in (folder / "best-10.safetensors", folder / "best-5.safetensors")[:damaged]:
            content = bytearray(path.read_bytes())
            content[-9] ^= 1
            path.write_bytes(content)
        resumed = trainer(folder, every=1, num_train_epochs=4, keeps_best=True, save_steps=5)
        steps = [metrics.step for metrics in resumed.run()]
        assert steps[0] == first and "best-10.safetensors" in caplog.text
        for name, value in whole.policy.values.items():
            assert torch.equal(resumed.policy.values[name], value)


def test_as_many_best_weights_as_are_of_use(tmp_path):
    """Those that the checkpoints know, and of those since the last one the best."""
    training = trainer(tmp_path, every=1, num_train_epochs=4, keeps_best=True, save_steps=7)
    bests = [0]
    for metrics in training.run():
        if training.held_out.best_step == metrics.step:
            bests.append(metrics.step)
        saved = metrics.step // 7 * 7
        known = {max(best for best in bests if best <= at) for at in (saved, saved - 7) if at >= 0} - {0}
        lying = {int(path.stem.partition("-")[2]) for path in tmp_path.glob("best-*.safetensors")}
        assert lying == known | {bests[-1]} - {0}, metrics.step
    assert len(bests) > 8, "or the test shows nothing"


def test_best_weights_that_no_checkpoint_knows_make_room(tmp_path):
    stopped = trainer(tmp_path, every=1, num_train_epochs=4, keeps_best=True, save_steps=99)
    for metrics in stopped.run():
        if metrics.step == 3:
            break
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-3.safetensors"]
    again = trainer(tmp_path, every=1, num_train_epochs=4, keeps_best=True, save_steps=99)
    next(again.run())
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-1.safetensors"]


def test_pairs_that_are_looked_at_are_within_the_models_positions(tmp_path):
    training = trainer(tmp_path)
    training.held_out.examples.corpus = SimpleNamespace(longest=999)
    with pytest.raises(UserError, match="has 999 tokens, the model reads 128"):
        next(train(SimpleNamespace(), training))


def test_a_loss_that_is_not_a_number_is_never_the_best():
    held_out = HeldOut(None, None, 1, state=[(1, float("nan")), (2, 0.7), (3, 0.6)])
    assert held_out.best_step == 3
    held_out.state = []
    assert held_out.best_step is None


def test_how_often_it_looks_decides_nothing_unless_it_ends_training(tmp_path):
    (tmp_path / "micro.yaml").write_text(MICRO.format(folder=tmp_path))

    def settings(stage: str, *words: str) -> dict:
        return Unit(Run(load_config(tmp_path / "micro.yaml", [*words]), STAGES), stage, "seed-0").settings()

    watched = ["pairs.eval_size=0.1", "learn.early_stopping_patience=2"]
    assert settings("learn", "learn.eval_steps=3") == settings("learn")
    assert settings("learn", *watched, "learn.eval_steps=3") != settings("learn", *watched)
    assert settings("locate", "warmup.eval_steps=3") == settings("locate")


def test_the_best_weights_after_a_kill(tmp_path):
    whole = trainer(tmp_path / "whole", every=1, num_train_epochs=4, keeps_best=True, save_steps=5)
    losses_of(whole)
    stopped = trainer(tmp_path / "stopped", every=1, num_train_epochs=4, keeps_best=True, save_steps=5)
    for metrics in stopped.run():
        if metrics.step == 12:
            break
    resumed = trainer(tmp_path / "stopped", every=1, num_train_epochs=4, keeps_best=True, save_steps=5)
    assert next(iter(losses_of(resumed))) == pytest.approx(whole.held_out.state[10][1]), "from step 10 on"
    assert [tuple(look) for look in resumed.held_out.state] == whole.held_out.state
    for name, value in whole.policy.values.items():
        assert torch.equal(resumed.policy.values[name], value)


def problem(number: int) -> dict:
    texts = ("right", "wrong!", "wrong, too")
    responses = [{"text": text, "ids": [5 + len(text)], "correct": text == "right"} for text in texts]
    return {"id": f"a:{number}", "prompt": f"p{number}", "prompt_ids": [number], "responses": responses}


ROWS = [problem(number) for number in range(40)]


def test_a_problem_trains_or_is_looked_at(tmp_path):
    train = run_pairs(tmp_path, ROWS, eval_size=0.25)
    every = {row["id"]: 0 for row in ROWS}
    trained = [row["id"] for row in read_jsonl(tmp_path / "pairs.jsonl")]
    held_out = [row["id"] for row in read_jsonl(tmp_path / "eval_pairs.jsonl")]
    assert len(train) == len(trained) and not {*trained} & {*held_out} and {*trained, *held_out} == every.keys()
    assert 4 <= len({*held_out}) <= 16 and len(held_out) == 2 * len({*held_out})
    run_pairs(tmp_path, ROWS[::-1], seed=5, eval_size=0.25)
    assert {row["id"] for row in read_jsonl(tmp_path / "eval_pairs.jsonl")} == {*held_out}


@pytest.mark.parametrize(("share", "left"), [(0.001, 0), (0.999, 40)])
def test_a_share_that_divides_nothing(tmp_path, share, left):
    with pytest.raises(UserError, match=f"pairs.eval_size: {share} of 40 problems with pairs leaves {left} to look at"):
        run_pairs(tmp_path, ROWS, eval_size=share)


@pytest.mark.parametrize("setting", ["warmup.early_stopping_patience=2", "learn.load_best_model_at_end=true"])
def test_without_held_out_pairs_there_is_nothing_to_look_at(tmp_path, setting):
    (tmp_path / "micro.yaml").write_text(MICRO.format(folder=tmp_path))
    section = setting.partition(".")[0]
    with pytest.raises(UserError, match=f"{section}: early_.* look at pairs that do not train: set pairs.eval_size"):
        load_config(tmp_path / "micro.yaml", [setting])


def test_a_run_of_it(tmp_path, capsys):
    """Of every stage that reads pairs."""
    (config := tmp_path / "micro.yaml").write_text(MICRO.format(folder=tmp_path))
    quick = ["seeds=[0]", "rivals=[]", "locate.score=linear", "rewards.source=confidence"]
    held_out = ["pairs.eval_size=0.4", "learn.eval_steps=1", "learn.load_best_model_at_end=true"]
    assert main(["run", str(config), *quick, *held_out]) == 0
    folder = tmp_path / "micro"
    looked_at = {row["id"] for row in read_jsonl(folder / "03-pairs/seed-0/eval_pairs.jsonl")}
    forgotten = {row["id"] for row in read_jsonl(folder / "06-rewards/seed-0/rewards.jsonl")}
    assert looked_at and forgotten and not looked_at & forgotten
    manifest = json.loads((folder / "08-learn/seed-0" / MANIFEST).read_text())
    rows = read_jsonl(folder / "08-learn/seed-0/metrics.jsonl")
    assert all(LOSS in row and 0 <= row["moved"] <= 1 and row["eval_kl"] > -1e-6 for row in rows)
    assert manifest["facts"]["best_step"] == 1 + min(range(len(rows)), key=lambda step: rows[step][LOSS])
    assert not [*folder.rglob("checkpoint-*"), *folder.rglob("best-*")]


def test_the_report_shows_both():
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in range(1, 5)]
    alone, _ = training_curves({"learn": {"seed 0": rows}})  # and that of the gradient's norm
    rows[1][LOSS] = rows[3][LOSS] = 0.5
    both, _ = training_curves({"learn": {"seed 0": rows}})
    assert len(re.findall('id="[^"]*line2d', both)) == len(re.findall('id="[^"]*line2d', alone)) + 1
    assert both.count("stroke-dasharray") == alone.count("stroke-dasharray") + 1
    rows[1]["eval_kl"] = rows[3]["eval_kl"] = 0.1
    assert "kl by training step" in training_curves({"learn": {"seed 0": rows}})[1], "seen by looks alone"
