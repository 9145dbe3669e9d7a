"""Responses judged by a reward model: `data.scorer: reward_model:FOLDER`; and by numbers between right and wrong."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, tiny_llama
from test_verifier import rows_of, write_rows
from transformers import LlamaConfig, LlamaForSequenceClassification

from allo_fast.__main__ import main
from allo_fast.compare import results
from allo_fast.config import ModelConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.scoring import labels, scorers_with
from allo_fast.model.reward import RewardModel
from allo_fast.plan.inference import evaluate_phase, sample_phase
from allo_fast.plan.job import job_of
from allo_fast.runs.rows import read_jsonl
from allo_fast.stages.check import check

FP32 = ModelConfig(dtype="float32", device="cpu")
CHAT = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
CHAT += "+{% endfor %}{% if add_generation_prompt %}a: {% endif %}"


def reward_model(folder, num_labels=1, chat=None, **changes):
    torch.manual_seed(5)
    tokenizer = character_tokenizer()
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForSequenceClassification(LlamaConfig(**TINY | own | changes, num_labels=num_labels))
    torch.nn.init.normal_(model.score.weight, std=2.0)
    model.save_pretrained(folder)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def row(prompt="1 + 2", **more):
    return {"id": "rows:1", "prompt": prompt, "tools": None, **more}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([], []),
        ([True, False, True], [True, False, True]),
        ([1.0, 1.0], [True, True]),
        ([0.0, 0.0], [False, False]),
        ([0.5], [None]),
        ([0.5, 0.5], [None, None]),
        ([0.2, 0.5, 0.9, 0.9], [False, None, True, True]),
        ([0.0, 0.5, 0.4], [False, True, None]),
        ([1.0, 0.5, 0.6], [True, False, None]),
    ],
)
def test_the_highest_are_right_and_the_lowest_wrong(scores, said):
    assert labels(scores) == said


def test_one_and_zero_say_nothing_of_themselves_where_there_are_no_bounds():
    assert labels([1.0, 0.0, 2.0, -1.0], -math.inf, math.inf) == [None, None, True, False]
    assert labels([1.0, 1.0], -math.inf, math.inf) == [None, None]


@pytest.mark.parametrize(
    ("template", "chat", "text"),
    [
        (None, None, "1 + 2 3"),
        ("{} =", None, "1 + 2 = 3"),
        (None, CHAT, "u: 1 + 2 +a: 3<eos>+"),
    ],
)
def test_a_reward_is_the_logit_of_the_conversation(tmp_path, template, chat, text):
    model, tokenizer = reward_model(tmp_path, chat=chat)
    ids = tokenizer(text.replace("<eos>", tokenizer.eos_token), add_special_tokens=False).input_ids
    ids += [] if chat else [tokenizer.eos_token_id]
    response = "3" if chat else " 3"
    by_hand = model(torch.tensor([ids])).logits.item()
    assert RewardModel(str(tmp_path), FP32, template)(response, row()) == pytest.approx(by_hand, abs=1e-6)


def test_it_reads_as_far_as_it_can(tmp_path):
    model, tokenizer = reward_model(tmp_path)
    ids = tokenizer("1 + 2" + " 3" * 200, add_special_tokens=False).input_ids[:256]
    judge = RewardModel(str(tmp_path), FP32)
    assert judge(" 3" * 200, row()) == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-6)
    assert judge(" 3<eos> 4", row()) == judge(" 3", row()), "up to what ends it"


def test_rewards_that_bfloat16_would_make_equal_differ(tmp_path):
    reward_model(tmp_path)
    judge = RewardModel(str(tmp_path), ModelConfig(dtype="bfloat16", device="cpu"))
    rewards = {judge(f" {n}", row()) for n in range(100, 160)}
    assert len({torch.tensor(reward).bfloat16().item() for reward in rewards}) < len(rewards) == 60


def test_what_it_cannot_read_is_said_of_its_row(tmp_path):
    reward_model(tmp_path)
    model = RewardModel(str(tmp_path), FP32)
    with pytest.raises(
        UserError, match=r"rows:1: data.scorer: .*: chat messages need a tokenizer with a chat template"
    ):
        model("3", row([{"role": "user", "content": "1 + 2"}]))
    torch.nn.init.constant_(model.model.score.weight, math.nan)
    with pytest.raises(UserError, match=r"rows:1: data.scorer: .*: a reward of nan"):
        model("3", row())


def words_of(tmp_path, **more):
    rows = [{"problem": made["problem"]} for made in rows_of(12)]
    paths = {"data.train": write_rows(tmp_path / "train.jsonl", rows)}
    paths["data.test"] = write_rows(tmp_path / "test.jsonl", [{"problem": r["problem"]} for r in rows_of(6, 20)])
    said = {"data.scorer": f"reward_model:{tmp_path}/rm", "method": "dpo", "rivals": "[]", "seeds": "[0]", **paths}
    said |= {"sample.temperature": 3, "sample.top_p": 1, "warmup.learning_rate": 1e-2, **more}
    return [f"{key}={value}" for key, value in said.items()]


@pytest.mark.xdist_group("runs")
def test_a_run_that_a_reward_model_judges(copied, tmp_path, capsys):
    """Two rounds; neither solutions nor answers anywhere."""
    reward_model(tmp_path / "rm", max_position_embeddings=2048)
    model = next((tmp_path / "micro").glob("00-pretrain/base/model"))
    words = words_of(tmp_path, rounds=2, name="rewarded", **{"model.name_or_path": model})
    assert main(["run", str(copied[0]), *words]) == 0
    out, folder = capsys.readouterr().out, tmp_path / "rewarded"
    for sampled in read_jsonl(next(folder.glob("*-sample/seed-0")) / "responses.jsonl"):
        rewards = [response["reward"] for response in sampled["responses"]]
        assert len({*rewards}) > 1
        for response in sampled["responses"]:
            best, worst = response["reward"] == max(rewards), response["reward"] == min(rewards)
            assert response["correct"] is (True if best else False if worst else None)

    judge = RewardModel(str(tmp_path / "rm"), FP32, "{}=")
    problems = read_jsonl(next(folder.glob("*-evaluate/base")) / "problems.jsonl")
    base, dpo = (
        read_jsonl(next(folder.glob(f"*-evaluate/{key}")) / "predictions.jsonl") for key in ("base", "dpo-seed-0")
    )
    assert [line["reward_model"] for line in base] == [0.5] * 6
    for problem, before, after in zip(problems, base, dpo, strict=True):
        assert after["reward"] == pytest.approx(judge(after["response"], problem), abs=1e-5)
        assert after["reward_model"] == pytest.approx(1 / (1 + math.exp(before["reward"] - after["reward"])))
    assert any(line["reward_model"] != 0.5 for line in dpo)
    summary = json.loads((folder / "summary.json").read_text())["models"]
    assert summary["base"]["ci95"] == [0.5, 0.5] and summary["dpo"]["scorers"] == {}
    assert summary["dpo"]["accuracy"] == pytest.approx(sum(line["reward_model"] for line in dpo) / 6)
    assert summary["dpo"]["reward"] == [pytest.approx(sum(line["reward"] for line in dpo) / 6)]
    assert "wins" in out and f"dpo: mean reward {summary['dpo']['reward'][0]:.4g}" in out and "round 2: wins" in out
    page = (folder / "report.html").read_text()
    assert "<h2>Wins</h2>" in page and f"dpo: mean reward {summary['dpo']['reward'][0]:.4g}" in page
    rounds = json.loads((folder / "rounds.json").read_text())
    assert [r["gain"]["points"] for r in rounds] == [pytest.approx(r["wins"] - 0.5) for r in rounds]
    last = read_jsonl(next((tmp_path / "rewarded-round-2-seed-0").glob("*-evaluate/dpo-seed-0")) / "predictions.jsonl")
    mean = sum(line["reward"] for line in last) / 6
    assert f"mean reward {mean:.4g}, " in next(line for line in out.splitlines() if line.startswith("round 2: wins"))

    aligned = next(folder.glob("*-warmup/seed-0")) / "model"
    assert main(["eval", str(aligned), str(copied[0]), *words]) == 0
    said = capsys.readouterr().out
    mean = f"mean reward {summary['dpo']['reward'][0]:.4g}"
    assert f"{summary['dpo']['accuracy']:.2%} of wins over the base, {mean}; 6 problems" in said
    assert main(["eval", str(model), str(copied[0]), *words]) == 0
    said = capsys.readouterr().out
    assert "wins" not in said and f"mean reward {summary['base']['reward'][0]:.4g}" in said, "nothing to compare with"

    reward_model(tmp_path / "rm", hidden_size=48, max_position_embeddings=2048)
    assert main(["run", str(copied[0]), *words]) == 2
    assert "data.scorer: model.safetensors was" in capsys.readouterr().err


@pytest.mark.xdist_group("runs")
def test_several_responses_have_a_mean_reward(copied, tmp_path):
    reward_model(tmp_path / "rm", max_position_embeddings=2048)
    model = next((tmp_path / "micro").glob("00-pretrain/base/model"))
    several = {"evaluate.num_return_sequences": 3, "evaluate.temperature": 2, "model.name_or_path": model}
    assert main(["run", str(copied[0]), *words_of(tmp_path, name="several", **several)]) == 0
    folder, judge = tmp_path / "several", RewardModel(str(tmp_path / "rm"), FP32, "{}=")
    evaluated = next(folder.glob("*-evaluate/base"))
    for problem, line in zip(*(read_jsonl(evaluated / f"{n}.jsonl") for n in ("problems", "predictions")), strict=True):
        rewards = [judge(text, problem) for text in line["responses"]]
        assert line["rewards"] == pytest.approx(rewards, abs=1e-5) and "pass" not in line
        assert line["reward"] == pytest.approx(sum(rewards) / 3, abs=1e-5)
        assert line["reward_model"] == pytest.approx(0.5), "each against each"
    base, dpo = (read_jsonl(next(folder.glob(f"*-evaluate/{key}*")) / "predictions.jsonl") for key in ("base", "dpo"))
    for before, after in zip(base, dpo, strict=True):
        chances = [1 / (1 + math.exp(b - a)) for a in after["rewards"] for b in before["rewards"]]
        assert after["reward_model"] == pytest.approx(sum(chances) / 9)


def base(folder):
    tiny_llama(vocab_size=len(character_tokenizer()), max_position_embeddings=256).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return {"model.name_or_path": folder}


def test_it_is_looked_at_before_a_run(tmp_path):
    words = words_of(tmp_path, **base(tmp_path / "base"))

    def problems(*more):
        return " ".join(check(load_config("configs/quickstart.yaml", [*words, *more])).problems)

    assert f"data.scorer: {tmp_path}/rm" in problems()
    reward_model(tmp_path / "rm")
    assert "data.scorer" not in problems()
    reward_model(tmp_path / "two", num_labels=2)
    assert "LlamaForSequenceClassification: not a reward model, a decoder that classifies sequences" in problems(
        f"data.scorer=reward_model:{tmp_path}/two"
    )
    assert "expected strict" in str(
        pytest.raises(UserError, load_config, "configs/quickstart.yaml", ['data.scorer="reward_model:"']).value
    )
    assert scorers_with("reward_model:x/y") == scorers_with("reward_model:a.py:f") == ("reward_model",)
    assert "data.scorer" not in problems("data.scorer=reward_model:nobody/nothing", "data.format=multiple_choice")


def test_a_plan_counts_its_weights(tmp_path):
    model, _ = reward_model(tmp_path / "rm")
    size = 2 * (sum(w.numel() for w in model.parameters()) - model.score.weight.numel())  # its head is one row
    words = words_of(tmp_path, **base(tmp_path / "base"), **{"model.dtype": "bfloat16"})
    config = load_config("configs/quickstart.yaml", words)
    job = job_of(config, 1, 80e9)
    without = replace(job, judging=0)
    for phase in (sample_phase, evaluate_phase):
        assert size <= phase(job, None).memory["reward model"] <= 2 * size
        assert "reward model" not in phase(without, None).memory
        assert phase(job, None).seconds > phase(without, None).seconds
    assert job_of(load_config("configs/quickstart.yaml"), 1, 80e9).judging == 0


def test_a_comparison_has_one_base(monkeypatch):
    """Wins of two arms are comparable over the same responses alone."""
    rewards = {"a": 1.0, "b": 1.0, "c": 2.0}
    monkeypatch.setattr(results, "_predictions", lambda run, key: [[{"id": "x", "reward": rewards[run]}]])
    results._check_alike({"first": "a", "second": "b"})
    with pytest.raises(UserError, match="arms: third has another base than first; a reward model sees wins over one"):
        results._check_alike({"first": "a", "third": "c"})
