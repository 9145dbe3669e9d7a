"""How models are judged: preferences, multiple choice, ties, scores that are no numbers, and what is said of them."""

import json
import math
import random
import re
from collections import deque
from html import escape
from statistics import fmean

import pytest
import torch
from conftest import tiny_llama, units_read
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.compare.judging import asking
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import ALPHABET, character_tokenizer
from allo_fast.data.intervals import accuracy_interval, mean_interval, problem_values, student
from allo_fast.data.scoring import best_response, is_tie, pair_margins
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.saving import save_model
from allo_fast.report.summary import percent, preference_metrics, preference_values, shown, table
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.evaluate import _scored, evaluate
from allo_fast.stages.models import inference
from allo_fast.stages.scores import response_logps

TOKENIZER = character_tokenizer()
CONFIG = """
name: judged
output_dir: {folder}
seeds: [0, 1]
rivals: [dpo]
model: {{name_or_path: {folder}/base, dtype: float32}}
data: {{train: {folder}/rows.jsonl, test: {folder}/rows.jsonl, format: preference, prompt_template: "{{}}="}}
locate: {{score: delta, windows: 2}}
warmup: {{learning_rate: 1e-3, beta: 0.2, gradient_accumulation_steps: 1}}
rewards: {{template: "{{}}#{{}}#{{}}>", train: {{num_train_epochs: 1, gradient_accumulation_steps: 2}}}}
forget: {{learning_rate: 1e-3, gradient_accumulation_steps: 1}}
learn: {{learning_rate: 1e-3, beta: 0.4, gradient_accumulation_steps: 1, ratio: 0.1}}
sample: {{max_new_tokens: 8}}
evaluate: {{max_new_tokens: 8, batch_size: 3}}
"""


def scored(logp, tokens, correct, ref_logp=None):
    row = {"logp": logp, "tokens": tokens, "correct": correct}
    return row if ref_logp is None else {**row, "ref_logp": ref_logp}


def model(folder, change=lambda model: None, seed=0):
    made = tiny_llama(seed, vocab_size=len(TOKENIZER))
    with torch.no_grad():
        change(made)
    made.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def flat(made):
    """Every token has the same probability after any text."""
    made.lm_head.weight.zero_()


def broken(made):
    made.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan


@pytest.fixture
def place(tmp_path):
    """A config of preferences, its base model, and eight rows whose right response is the shorter one."""
    model(tmp_path / "base")
    rows = [{"prompt": f"{i}+1", "chosen": str(i + 1), "rejected": f"{i}, so {i + 2}"} for i in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def choice(place, *problems):
    write_jsonl(place / "rows.jsonl", [{"problem": f"1+1\nOptions:\n{a}\n{b}", "answer": a} for a, b in problems])
    return "data.format=multiple_choice"


def test_margins_of_pairs_by_hand():
    right, wrong, longer = scored(-4.0, 2, True, -5.0), scored(-3.0, 1, False, -3.5), scored(-6.0, 6, False, -6.0)
    margins = pair_margins([right, wrong, longer], 0.1)
    assert margins["rewards"] == pytest.approx([0.1 * (1 - 0.5), 0.1 * (1 - 0)])
    assert margins["logps"] == [-1.0, 2.0] and margins["logps_per_token"] == [1.0, -1.0]
    assert "rewards" not in pair_margins([scored(-1.0, 1, True), scored(-2.0, 1, False)], None)
    two = pair_margins([scored(-1.0, 1, True), scored(-2.0, 1, True), wrong, longer], None)
    assert two["logps"] == [2.0, 5.0, 1.0, 4.0], "each right one with each wrong one"


def test_what_is_no_url_is_said():
    with pytest.raises(UserError, match=r"server.url: String should match pattern .* \(got 'localhost:1/v1'\)"):
        asking("localhost:1/v1", "m")


def test_pairs_of_one_problem_are_one_cluster():
    values = problem_values([[1.0, 0.0], [1.0]])  # mean 2/3 of three pairs; the problems differ from it by -1/3, +1/3
    assert values == pytest.approx([4 / 9, 8 / 9])
    mean, (low, high) = mean_interval([values])
    error = (2 * (1 / 9 + 1 / 9) / 9) ** 0.5  # C / (C - 1) of the squares, / N^2
    assert mean == pytest.approx(2 / 3) and (low, high) == pytest.approx(
        (2 / 3 - student(1) * error, 2 / 3 + student(1) * error)
    )
    draws = random.Random(0)  # pairs that have nothing to do with their problem are as many problems of one pair
    pairs = [[float(draws.random() < 0.6) for _ in range(9)] for _ in range(100)]
    _, (low, high) = accuracy_interval([problem_values(pairs)], 900)
    assert high - low == pytest.approx(2 * 1.96 * (0.24 / 900) ** 0.5, rel=0.15)
    assert problem_values([[3.0], [5.0]]) == [3.0, 5.0]


def test_intervals_of_means_by_hand():
    mean, (low, high) = mean_interval([[1.0, 2.0, 3.0]])
    assert mean == 2 and (low, high) == pytest.approx((2 - student(2) / 3**0.5, 2 + student(2) / 3**0.5))
    mean, (low, high) = mean_interval([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    # MS of seeds 1.5, of problems 2, of the rest 0: 3.5 / 6, with 3.5 ** 2 / (1.5 ** 2 / 1 + 2 ** 2 / 2) degrees.
    assert mean == 2.5 and high - mean == pytest.approx(student(3.5**2 / 4.25) * (3.5 / 6) ** 0.5)
    assert mean_interval([[1.0]]) == (1.0, None), "one problem says nothing of the others"


def test_metrics_of_preferences_by_hand():
    """Four problems of one pair; log-ratios to the base (2, 1), (1, 2), (3, 3), (1, 0): won, lost, a tie, won."""
    ratios = [(2, 1), (1, 2), (3, 3), (1, 0)]
    rows = [
        {"responses": [scored(-9.0 + a, 3, True, -9.0), scored(-8.0 + b, 4, False, -8.0)]} for a, b in ratios
    ]  # sums -7 -7, -8 -6, -6 -5, -8 -8; means -7/3 -7/4, -8/3 -6/4, -2 -5/4, -8/3 -2
    metrics = preference_metrics(*preference_values([rows], 0.5), 4)
    assert list(metrics) == ["rewards/accuracies", "rewards/margins", "logps/accuracies", "logps/accuracies_per_token"]
    assert metrics["rewards/accuracies"]["mean"] == 0.5 and metrics["rewards/accuracies"]["ties"] == 1
    assert metrics["rewards/accuracies"]["ci95"] == pytest.approx(accuracy_interval([[1, 0, 0, 1]])[1])
    assert metrics["rewards/margins"]["mean"] == pytest.approx(0.5 * (1 - 1 + 0 + 1) / 4)
    spread = 0.5 * (11 / 12 / 4) ** 0.5  # the variance of 1, -1, 0, 1 is 11/12
    assert metrics["rewards/margins"]["ci95"][1] == pytest.approx(0.125 + student(3) * spread)
    assert metrics["logps/accuracies"]["mean"] == 0 and metrics["logps/accuracies"]["ties"] == 2
    assert metrics["logps/accuracies_per_token"]["mean"] == 0


def test_the_best_response_and_ties():
    right, wrong, other = ({"correct": correct} for correct in (True, False, False))
    assert best_response([-1.0, -2.0], [right, wrong]) == 0 and not is_tie([-1.0, -2.0], [right, wrong])
    assert best_response([-1.0, -1.0], [right, wrong]) == 1 and is_tie([-1.0, -1.0], [right, wrong])
    assert best_response([-1.0, -1.0], [wrong, right]) == 0, "whatever comes first"
    assert not is_tie([-2.0, -1.0, -1.0], [right, wrong, other]), "of wrong ones it does not matter which"


def test_log_probabilities_of_responses_are_the_models(place):
    unit = Unit(Run(load_config(place / "config.yaml"), STAGES), "evaluate", "base")
    long = list(range(5, 18))
    ids = [long, [8, 9], long, [4]]
    row = {"prompt_ids": [3, 4, 5], "responses": [{"ids": each} for each in ids]}
    with inference(unit, place / "base", scoring=True) as frozen:
        ((first, second, third, last),) = response_logps(frozen, [row])
    made = tiny_llama(vocab_size=len(TOKENIZER))
    for each, found in zip(ids, (first, second, third, last), strict=True):
        logps = made(torch.tensor([[3, 4, 5] + each])).logits[0].log_softmax(-1)
        assert found == pytest.approx(sum(logps[2 + i, token].item() for i, token in enumerate(each)), abs=1e-5)
    assert first == third, "the same tokens tie to the last bit"


def test_a_random_model_knows_no_preference_whichever_side_is_longer(place, capsys):
    draw = torch.Generator().manual_seed(0)

    letters = sorted(set(ALPHABET) - set(" \n"))  # many: a model's liking of a few would add up over a long response

    def text(low, high):
        count = int(torch.randint(low, high, (), generator=draw))
        return "".join(letters[i] for i in torch.randint(0, len(letters), (count,), generator=draw))

    rows = [{"prompt": text(2, 6), "chosen": text(1, 6), "rejected": text(9, 30)} for _ in range(100)]
    write_jsonl(place / "rows.jsonl", rows)
    other = model(place / "other", seed=5)
    assert main(["eval", other, str(place / "config.yaml")]) == 0
    said = capsys.readouterr().out
    accuracy = {name: float(number) for name, number in re.findall(r"(\S+/accuracies\S*) (\S+)%", said)}
    assert 35 < accuracy["rewards/accuracies"] < 65
    assert accuracy["logps/accuracies"] == 100, "which is what it says: the shorter side is the likelier one"
    assert "100 pairs of 100 problems, 0 rows set aside" in said


def test_a_whole_run_on_preferences(place, capsys):
    assert main(["run", str(place / "config.yaml")]) == 0
    shown_table, folder = capsys.readouterr().out, place / "judged"
    summary = json.loads((folder / "summary.json").read_text())
    models = summary["models"]
    assert list(models) == ["base", "dpo", "allo"] and "accuracy" not in models["base"]
    assert list(models["base"]["metrics"]) == ["logps/accuracies", "logps/accuracies_per_token"]
    base = read_jsonl(folder / "09-evaluate/base/predictions.jsonl")
    for name, beta in (("dpo", 0.2), ("allo", 0.4)):
        margins, won = [], []
        for seed in (0, 1):
            for row, origin in zip(
                read_jsonl(folder / f"09-evaluate/{name}-seed-{seed}/predictions.jsonl"), base, strict=True
            ):
                chosen, rejected = (
                    mine["logp"] - its["logp"] for mine, its in zip(row["responses"], origin["responses"], strict=True)
                )
                margins.append(beta * (chosen - rejected))
                won.append(chosen > rejected)
        metrics = models[name]["metrics"]
        assert metrics["rewards/margins"]["mean"] == pytest.approx(fmean(margins)) != 0
        assert metrics["rewards/accuracies"]["mean"] == pytest.approx(fmean(won))
        assert len(metrics["rewards/margins"]["seeds"]) == 2 and models[name]["beta"] == beta
        low, high = metrics["rewards/margins"]["ci95"]
        assert low < metrics["rewards/margins"]["mean"] < high
    assert {"allo - dpo, rewards/accuracies", "dpo - base, logps/accuracies"} <= set(summary["differences"])
    assert "dpo - base, rewards/accuracies" not in summary["differences"]
    manifest = json.loads((folder / "09-evaluate/allo-seed-1/MANIFEST.json").read_text())
    assert units_read(manifest) == {"learn/seed-1", "evaluate/base"}
    assert manifest["facts"]["pairs"] == 8 and manifest["facts"]["rewards/ties"] == 0
    assert "problems.jsonl" not in manifest["outputs"], "rendered once, for the base: both read the same tokens"
    assert re.search(r"^allo +rewards/margins +\S+ +\S+ \.\. \S+ +8 +8 ", shown_table, re.MULTILINE)
    page = (folder / "report.html").read_text()
    assert "8 rows, 0 set aside<" in page and "<dd>data.test: 8 of 8 prompts are in data.train, too<" in page
    assert "\ndata.test: 8 of 8 prompts are in data.train, too\n" in shown_table
    assert "<h2>Preferences</h2>" in page and "rewards/margins" in page and "<h2>Accuracy</h2>" not in page
    judged = Unit(Run(load_config(place / "config.yaml"), STAGES), "evaluate", "whole")
    judged.folder.mkdir()
    deque(evaluate(judged, folder / "08-learn/seed-1/model", folder / "09-evaluate/base"), maxlen=0)
    rows = read_jsonl(judged.folder / "predictions.jsonl")
    assert rows == read_jsonl(folder / "09-evaluate/allo-seed-1/predictions.jsonl"), "base and delta are that model"
    problems = read_jsonl(folder / "09-evaluate/base/problems.jsonl")
    answers = {name: read_jsonl(folder / f"09-evaluate/{name}/samples.jsonl") for name in ("base", "allo-seed-0")}
    model = AutoModelForCausalLM.from_pretrained(folder / "08-learn/seed-0/model", dtype=torch.float32)
    (text,), *_ = generate(model, load_tokenizer(place / "base"), [problems[0]["prompt_ids"]], {1}, max_new_tokens=8)
    assert answers["allo-seed-0"][0] == {"id": problems[0]["id"], "response": text}
    assert [row["id"] for row in answers["base"]] == [row["id"] for row in problems[:4]]
    shown = page[page.index("<h2>Before and after") :]
    shown = shown[: shown.index("</section>")]
    assert shown.count("<figure>") == 4 and ">base</h3>" in shown and ">the better response of the pair</h3>" in shown
    assert escape(text) in shown and escape(problems[3]["solution"]) in shown
    steps = read_jsonl(folder / "08-learn/seed-0/metrics.jsonl")
    assert "key_rewards/accuracies" in steps[-1] and "rewards/accuracies" in steps[-1]


@pytest.mark.parametrize("format", ["preference", "multiple_choice"])
def test_every_model_is_judged_on_the_rows_of_the_base(place, format):
    run = Run(load_config(place / "config.yaml", [f"data.format={format}", f"name={format}"]), STAGES)
    upstream = {key: [unit.name for unit in Unit(run, "evaluate", key).upstream()] for key in ("base", "dpo-seed-0")}
    assert upstream == {"base": [], "dpo-seed-0": ["warmup", "evaluate"]}


def test_nobody_asks_for_answers_to_preferences(place, capsys, monkeypatch):
    monkeypatch.setattr("allo_fast.stages.evaluate.generate", lambda *_, **__: pytest.fail("it was asked"))
    assert main(["eval", str(place / "base"), str(place / "config.yaml")]) == 0, "which is of numbers alone"
    words = [
        "run",
        str(place / "config.yaml"),
        "name=quiet",
        "method=dpo",
        "rivals=[]",
        "evaluate.samples=0",
        "seeds=[0]",
    ]
    assert main(words) == 0
    assert "No prompt was answered (evaluate.samples)." in (place / "quiet/report.html").read_text()


def test_tied_preferences_are_wrong_and_said(place, capsys):
    write_jsonl(place / "rows.jsonl", [{"prompt": "1", "chosen": "23", "rejected": ["32", "234"]}])
    assert main(["eval", model(place / "flat", flat), str(place / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert "logps/accuracies 50.0%" in said and "logps/accuracies_per_token 0.0%" in said
    assert "logps/accuracies: 1 ties, counted as wrong; logps/accuracies_per_token: 2 ties" in said
    assert "2 pairs of 1 problems" in said


def test_a_model_that_cannot_tell_options_apart_gets_none_right(place, capsys):
    ties = choice(place, ("2", "3"), ("3", "2"), ("22", "3"), ("3", "22"))
    settings = [ties, f"model.name_or_path={model(place / 'flat', flat)}", "method=dpo", "seeds=[0]"]
    assert main(["run", str(place / "config.yaml"), *settings, "warmup.learning_rate=1e-12"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^base +25.0%", said, re.MULTILINE), "the short option of the last row"
    assert "base: 2 ties, counted as wrong" in said
    summary = json.loads((place / "judged/summary.json").read_text())
    assert summary["models"]["base"]["ties"] == 2 and summary["models"]["base"]["accuracy"] == 0.25
    facts = summary["stages"]["09-evaluate/base"]
    assert (facts["strict"], facts["ties"], facts["per_token"]) == (1, 2, 0)
    rows = read_jsonl(place / "judged/09-evaluate/base/predictions.jsonl")
    assert [row["tie"] for row in rows] == [True, True, False, False]
    assert [row["response"] for row in rows] == [f"The answer is {wrong}" for wrong in ("3", "2", "3", "3")]
    assert rows[0]["responses"][0] == {"logp": rows[0]["responses"][1]["logp"], "tokens": 16, "correct": True}
    assert main(["eval", str(place / "flat"), str(place / "config.yaml"), ties]) == 0
    assert re.search("25.00% by the strict .* 4 problems, 0 rows set aside; of these: 2 ties", capsys.readouterr().out)


@pytest.mark.parametrize("format", ["preference", "multiple_choice", "problems"])
def test_a_model_that_is_not_finite_is_an_error(place, capsys, format):
    if format == "multiple_choice":
        choice(place, ("2", "3"))
    if format == "problems":
        write_jsonl(place / "rows.jsonl", [{"problem": "1+1", "solution": "The answer is 2", "answer": "2"}])
    path = model(place / "broken", broken)
    assert main(["eval", path, str(place / "config.yaml"), f"data.format={format}"]) == 2
    said = capsys.readouterr()
    assert re.search(rf"{path}: .*up_proj.weight.* NaN", said.err) and "accura" not in said.out


@pytest.mark.parametrize("format", ["preference", "multiple_choice"])
def test_scores_that_are_not_finite_are_an_error(place, capsys, format):
    """Finite weights, whose products are not."""
    if format == "multiple_choice":
        choice(place, ("2", "3"))
    path = model(place / "large", lambda made: made.model.layers[1].mlp.up_proj.weight.fill_(3e38))
    assert main(["eval", path, str(place / "config.yaml"), f"data.format={format}"]) == 2
    said = capsys.readouterr()
    assert "LlamaForCausalLM: what it computes from a row of tokens is not finite" in said.err
    assert "accura" not in said.out


def test_one_score_that_is_not_finite_is_enough(place):
    unit = Unit(Run(load_config(place / "config.yaml"), STAGES), "evaluate", "base")
    row = {"id": "rows.jsonl:7", "responses": [{"ids": [1], "correct": True}, {"ids": [2], "correct": False}]}
    with pytest.raises(UserError, match="model: .* rows.jsonl:7 are .*-inf.* not finite"):
        _scored(unit, "model", row, [-1.0, -math.inf], {})


def test_rows_that_the_model_cannot_read_are_set_aside(place, capsys):
    write_jsonl(place / "rows.jsonl", [{"prompt": "1", "chosen": "2", "rejected": "3" * n} for n in (1, 60)])
    short = tiny_llama(vocab_size=len(character_tokenizer()), max_position_embeddings=16)
    save_model(short, character_tokenizer(), place / "short")
    assert main(["eval", str(place / "short"), str(place / "config.yaml")]) == 0
    assert "1 pairs of 1 problems, 1 rows set aside" in capsys.readouterr().out


def test_without_a_base_there_are_no_implicit_rewards(place, capsys, caplog):
    other, config = model(place / "other", seed=5), str(place / "config.yaml")
    assert main(["eval", other, config, "model.name_or_path=/nowhere"]) == 0
    assert "not compared with the base: /nowhere: no such file or folder" in caplog.text
    said = capsys.readouterr().out
    assert "logps/accuracies " in said and "rewards/" not in said
    larger = character_tokenizer()
    larger.add_tokens(["zz"])
    save_model(tiny_llama(vocab_size=len(larger)), larger, place / "larger")
    assert main(["eval", other, config, f"model.name_or_path={place / 'larger'}"]) == 0
    assert "other has another vocabulary than" in caplog.text
    capsys.readouterr()
    assert main(["eval", other, config, f"data.test={place / 'rows.jsonl'}[:1]"]) == 0
    assert re.search(r"rewards/margins \S+ \(one problem\)", capsys.readouterr().out)
    assert main(["eval", str(place / "base"), config]) == 0
    assert "rewards/" not in capsys.readouterr().out, "the base has none"


def test_the_base_reads_what_the_model_reads(place, capsys):
    """A copy of the base with a chat template: the base reads the same prompts, so that there are no rewards."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}?{% endfor %}"
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, place / "chat")
    assert main(["eval", str(place / "chat"), str(place / "config.yaml")]) == 0
    assert "rewards/accuracies: 8 ties" in capsys.readouterr().out


def test_no_minus_before_zero():
    assert percent(-1e-9) == "0.0%" and percent(-0.0004, "+") == "+0.0%" and percent(-0.001) == "-0.1%"
    assert shown("rewards/margins", -0.0) == "0" and shown("rewards/margins", -0.0125) == "-0.0125"
    assert accuracy_interval([[1, 1]], 24) == accuracy_interval([[1, 1]]), "two problems of twelve pairs each are two"
    mean, interval = accuracy_interval([[False] * 10])
    held = {"accuracy": mean, "n": 10, "ci95": (-1e-17, interval[1]), "seeds": [mean], "scorers": {"strict": -0.0}}
    differences = {"a - b": {"points": -0.0, "ci95": (-0.0001, 0.0001)}}
    data = {"test": {"trained": 0}}
    assert "-0.0" not in table({"data": data, "models": {"a": held}, "differences": differences})
