"""Forgetting watches right responses, and ends where they lose too much."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama

from allo_fast.__main__ import main
from allo_fast.config import ModelConfig, TrainConfig
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import Layout
from allo_fast.data.corpus import Corpus
from allo_fast.data.prompts import Prompts
from allo_fast.method.objectives import Npo
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.loading import load_model
from allo_fast.report.samples import _forgotten
from allo_fast.runs.home import MANIFEST
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.stages.forget import guard_of
from allo_fast.training.engine import Trainer
from allo_fast.training.guard import CHANGE, REPEATED, Guard, repeated
from allo_fast.training.reference import Opened

QUICK = ["seeds=[0]", "rivals=[]"]
SETTINGS = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def kept() -> Corpus:
    """Some of what is forgotten, so that it is sure to lose."""
    every, corpus = pair_corpus(), Corpus()
    for response in every.responses[:3]:
        corpus.add(every.prompts[response.prompt], [response.tokens])
    return corpus


def trainer(folder, every=2, max_drop=1e9, guarded=True, **changes) -> Trainer:
    folder.mkdir(exist_ok=True)
    model, corpus = tiny_llama(), pair_corpus()
    corpus.examples = [(index,) for index in range(len(corpus.responses))]
    guard = Guard(kept(), every, max_drop) if guarded else None
    policy = SparsePolicy(model, random_selection(model))
    config, weights = TrainConfig(**SETTINGS | changes), [[1.0] * len(r.tokens) for r in corpus.responses]
    return Trainer(policy, corpus, Npo(0.1), config, folder, token_weights=weights, guard=guard)


def values_of(training) -> torch.Tensor:
    return torch.cat([value.detach().clone() for value in training.policy.values.values()])


def mean_logp(model) -> float:
    total = count = 0
    for prompt, tokens in ((r.prompt, r.tokens) for r in kept().responses):
        ids = kept().prompts[prompt] + tokens
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(logps[len(ids) - len(tokens) - 1 + n, token].item() for n, token in enumerate(tokens))
        count += len(tokens)
    return total / count


def test_it_sees_the_mean_of_all_tokens_since_the_first_step(tmp_path):
    training = trainer(tmp_path, every=3)
    before = mean_logp(training.policy.model)
    rows = [metrics.row() for metrics in training.run()]
    looks = [row["step"] for row in rows if CHANGE in row]
    assert looks == [*range(3, len(rows), 3), len(rows)], "and after the last step"
    assert rows[-1][CHANGE] == pytest.approx(mean_logp(training.policy.model) - before, abs=1e-5)
    assert training.made == len(training.steps) == len(rows)
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1][CHANGE] == rows[-1][CHANGE]


def test_it_changes_no_step_until_it_ends_training(tmp_path):
    free = [metrics.loss for metrics in trainer(tmp_path / "free", guarded=False).run()]
    rows = [metrics.row() for metrics in trainer(tmp_path / "watched", every=1).run()]
    assert [row["loss"] for row in rows] == free
    drops = [row[CHANGE] for row in rows]
    end = next(number for number, drop in enumerate(drops) if drop < -1e-3)  # one that exceeds it
    ended = trainer(tmp_path / "ended", every=1, max_drop=1e-3)
    assert [metrics.loss for metrics in ended.run()] == free[: end + 1]
    assert ended.made == end + 1 < len(ended.steps)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4, 5, 6], 0),
        ([7] * 6, 2 / 3),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 1, 2, 3], 0),
    ],
)
def test_what_a_response_repeats_of_itself(tokens, share):
    assert repeated(tokens) == pytest.approx(share)


def test_responses_that_begin_to_repeat_themselves_end_training(tmp_path):
    """Two of them, of which one repeats ever more; the first look is before the first step."""
    once = [*range(20)]

    def watched(folder, most):
        training, looks = trainer(folder, every=1), iter(range(2, 99))
        training.guard.speak = lambda: [once, [7] * (next(looks) + 3)]  # 1 - 1 / looks
        training.guard.max_repeated = most
        return training

    rows = [metrics.row() for metrics in watched(tmp_path / "free", 1.0).run()]
    shares = [(1 - 1 / (look + 3)) / 2 - 1 / 4 for look in range(len(rows))]
    assert [row[REPEATED] for row in rows] == pytest.approx(shares)
    ended = watched(tmp_path / "ended", (shares[1] + shares[2]) / 2)
    assert [*ended.run()][-1].row()[REPEATED] == pytest.approx(shares[2]) and ended.made == 3 < len(ended.steps)


@pytest.mark.parametrize("save_steps", [1, 99])
def test_what_it_was_at_the_last_good_look_is_left(tmp_path, save_steps):
    free, weights, drops = trainer(tmp_path / "free", every=1), [], [0.0]
    for metrics in free.run():
        weights.append(values_of(free))
        drops.append(-metrics.row()[CHANGE])
    end = next(step for step in range(2, len(drops)) if drops[step] > max(drops[:step]))
    most = (max(drops[:end]) + drops[end]) / 2
    ended = trainer(tmp_path / "ended", every=1, max_drop=most, save_steps=save_steps)
    assert len([*ended.run()]) == end and ended.watches.leaves == end - 1
    assert torch.equal(values_of(ended), weights[end - 2])
    again = trainer(tmp_path / "ended", every=1, max_drop=most, save_steps=save_steps)
    assert len([*again.run()]) == (0 if save_steps == 1 else end) and torch.equal(values_of(again), weights[end - 2])
    late = trainer(tmp_path / "late", every=end, max_drop=drops[end] / 2, save_steps=save_steps)
    before = values_of(late)
    assert len([*late.run()]) == end and late.watches.leaves == 0 and torch.equal(values_of(late), before)
    assert torch.equal(late.policy.model.lm_head.weight, tiny_llama().lm_head.weight)


def test_a_training_that_it_ended_stays_ended(tmp_path):
    first = trainer(tmp_path, every=1, max_drop=1e-3, save_steps=1)
    made = len([*first.run()])
    again = trainer(tmp_path, every=1, max_drop=1e-3, save_steps=1)
    assert [*again.run()] == [] and again.made == made < len(again.steps)
    assert again.guard.state == first.guard.state, "not what it was when training went on"


def test_a_killed_training_compares_with_its_first_step(tmp_path):
    whole = [metrics.row().get(CHANGE) for metrics in trainer(tmp_path / "whole", save_steps=1).run()]
    killed = trainer(tmp_path / "killed", save_steps=1).run()
    for _ in range(3):
        next(killed)
    killed.close()
    rest = [metrics.row().get(CHANGE) for metrics in trainer(tmp_path / "killed", save_steps=1).run()]
    assert rest == whole[-len(rest) :] and len(rest) < len(whole)


def unit(folder, rows, *words):
    write_jsonl(folder / "responses.jsonl", rows)
    config = load_config("configs/quickstart.yaml", list(words))
    return SimpleNamespace(config=config, seed=0, zero=None, needed=lambda stage: folder)


def watching(folder, rows, *words):
    return guard_of(unit(folder, rows, *words), Prompts(character_tokenizer()), tiny_llama(vocab_size=40))


def row(number, right=(), wrong=(), **more):
    responses = [{"text": str(ids), "ids": ids, "correct": True} for ids in right]
    responses += [{"text": str(ids), "ids": ids, "correct": False} for ids in wrong]
    return {"id": f"row {number}", "prompt_ids": [number], "responses": responses, **more}


@pytest.mark.parametrize(("seen", "ends"), [(0.1, False), (-0.5, False), (-0.6, True), (math.nan, True)])
def test_what_is_no_number_is_not_good(seen, ends):
    assert Guard(pair_corpus(), 1, 0.5).ends({CHANGE: seen}) == ends
    assert Guard(pair_corpus(), 1, 0.5, max_repeated=0.5).ends({CHANGE: 0.0, REPEATED: -seen}) == ends


def test_what_it_watches(tmp_path, caplog):
    rows = [
        row(3, right=[[4, 5]], wrong=[[9, 9]]),
        row(4, right=[[5], [6]]),
        row(5, wrong=[[9]], solution_ids=[7, 7]),
        row(6, wrong=[[9]]),
    ]
    guard = watching(tmp_path, rows)
    assert (guard.every, guard.max_drop) == (10, 0.5)
    watched = {guard.corpus.prompts[r.prompt][0]: r.tokens for r in guard.corpus.responses}
    assert watched.keys() == {3, 4, 5} and watched[3] == [4, 5] and watched[5] == [7, 7]
    assert watched[4] in ([5], [6])
    few = watching(tmp_path, rows, "forget.guard.responses=2")
    assert len(few.corpus.responses) == 2
    assert "nothing is watched" not in caplog.text
    assert watching(tmp_path, rows[3:]) is None and "no problem has a right response" in caplog.text
    assert watching(tmp_path, rows, "forget.guard=null") is None
    release = ["protocol=release", "locate.score=delta"]
    assert watching(tmp_path, rows, *release) is None


@pytest.mark.xdist_group("runs")
def test_what_the_last_look_sees_is_said_too(copied, caplog):
    words = [*QUICK, "name=late", "forget.guard.max_drop=1e-6", "forget.guard.steps=1000"]
    assert main(["run", str(copied[0]), *words, "forget.learning_rate=0.1"]) == 0
    facts = json.loads(next((copied[1].parent / "late").glob(f"*-forget/seed-0/{MANIFEST}")).read_text())["facts"]
    assert "ended_before_steps" not in facts
    assert (facts["left_step"], facts["changed"], facts[CHANGE]) == (0, 0, 0.0)
    assert f"forgetting ended after {facts['steps']} of {facts['steps']} steps: right responses lost" in caplog.text
    assert "what it was after step 0 is left" in caplog.text and "none of the selected weights" not in caplog.text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, ""),
        ({Npo.CHANGE: 0.0}, " Before its last step the log-probability of a forgotten token had changed by +0.000."),
        (
            {CHANGE: -0.5, REPEATED: 0.123, "steps": 2, "ended_before_steps": 6, "left_step": 1},
            " After it that of a token of right responses had changed by -0.500. The share of greedy responses "
            "that repeats runs of four tokens had changed by +0.123. It ended after 2 of 6 steps. "
            "What it was after step 1 is left.",
        ),
    ],
)
def test_a_report_says_what_forgetting_gave_and_cost(facts, said):
    assert _forgotten(SimpleNamespace(manifest=lambda: {"facts": facts})) == said


def test_a_look_keeps_to_the_budget_of_a_pass():
    guard, seen = Guard(kept(), 1, 1.0), []

    def compute(batch):
        seen.append(batch.input_ids.numel())
        return torch.zeros(batch.valid.shape)

    guard.look(0, Opened(compute, Layout(), torch.device("cpu")), budget=1)
    assert len(seen) == len({response.prompt for response in kept().responses})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_as_it_is_answers_the_problems_that_are_watched(tmp_path, checkpointing):
    rows = [row(number, right=[[4, 5]], wrong=[[9, 9]]) for number in range(3, 20)]
    tiny_llama(vocab_size=40).save_pretrained(tmp_path / "model")
    settings = {"dtype": "float32", "device": "cpu", "gradient_checkpointing": checkpointing}
    model, prompts = load_model(tmp_path / "model", ModelConfig(**settings)), Prompts(character_tokenizer())
    plain = tiny_llama(vocab_size=40)
    guard = guard_of(unit(tmp_path, rows, "sample.max_new_tokens=9"), prompts, model)
    asked = [[*guard.corpus.prompts[number]] for number in range(8)]
    plain.generation_config.eos_token_id = sorted(prompts.end_tokens)

    def greedy():
        ids = [plain.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, 1:] for prompt in asked]
        return [[token for token in new.tolist() if token not in prompts.end_tokens] for new in ids]

    before = guard.speak()
    assert before == greedy() and any(before)
    assert any(module.training for module in model.modules()) == checkpointing, "as it was"
    for changed in (model, plain):
        torch.manual_seed(1)
        torch.nn.init.normal_(changed.lm_head.weight)
    assert guard.speak() == greedy() != before
    assert guard_of(unit(tmp_path, rows, "forget.guard.max_repeated=null"), prompts, model).speak is None


@pytest.mark.xdist_group("runs")
def test_a_run_says_that_its_responses_repeat_themselves(copied, caplog, monkeypatch):
    said = iter([0.1, 0.2, 0.5, 0.5, 0.5])
    monkeypatch.setattr("allo_fast.training.guard.fmean", lambda shares: [*shares] and next(said))
    words = [*QUICK, "name=again", "forget.guard.steps=1", "forget.guard.max_repeated=0.3"]
    assert main(["run", str(copied[0]), *words, "forget.learning_rate=1e-3"]) == 0
    facts = json.loads(next((copied[1].parent / "again").glob(f"*-forget/seed-0/{MANIFEST}")).read_text())["facts"]
    assert facts["steps"] == 2 < facts["ended_before_steps"]
    assert facts["left_step"] == 1 and facts[REPEATED] == pytest.approx(0.1)
    assert "the repeated share of greedy responses rose by 0.4, forget.guard.max_repeated is 0.3" in caplog.text


@pytest.mark.xdist_group("runs")
def test_a_run_says_that_forgetting_ended(copied, capsys):
    config, folder = copied
    words = [*QUICK, "name=ended", "forget.guard.max_drop=1e-6", "forget.guard.steps=1"]
    assert main(["run", str(config), *words, "forget.learning_rate=0.1"]) == 0
    said = capsys.readouterr()
    manifest = json.loads(next((folder.parent / "ended").glob(f"*-forget/seed-0/{MANIFEST}")).read_text())
    facts = manifest["facts"]
    assert facts["left_step"] == facts["steps"] - 1 > 0 and facts[CHANGE] >= -1e-6 and -1 <= facts[REPEATED] <= 1
    page = (folder.parent / "ended" / "report.html").read_text()
    assert f"After it that of a token of right responses had changed by {facts[CHANGE]:+.3f}. The share" in page
    assert f"What it was after step {facts['left_step']} is left." in page
    assert facts["steps"] < facts["ended_before_steps"]
    assert f"forgetting ended after {facts['steps']} of {facts['ended_before_steps']} steps" in said.out + said.err
