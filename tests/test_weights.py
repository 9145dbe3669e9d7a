"""Weights that rows bring along: of pairs, and of the tokens of their responses."""

import json
from math import log

import pytest
import torch
from conftest import pair_corpus, tiny_llama
from test_pair_losses import assert_it_may_be_cut, nls

from allo_fast.config import TrainConfig
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.batch import collate
from allo_fast.data.encoding import Limits, corpus_of_pairs, encode_problems
from allo_fast.data.problems import Quarantined, read_problems
from allo_fast.data.prompts import Prompts
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.pair_losses import LOSSES
from allo_fast.stages.pairs import _pair
from allo_fast.training.engine import Trainer
from allo_fast.training.examples import Examples

PAIR = {"prompt": "1 + 2 = ", "chosen": "3", "rejected": "4 5"}  # a token a character, and one that ends it


def read(tmp_path, *rows, format="preference"):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = Prompts(character_tokenizer(), template="{}")
    return [*encode_problems(read_problems(str(path), format), prompts, Limits(99, 99, 9, 99, 99))]


def test_rows_bring_them_along(tmp_path):
    weights = {"loss_weight": 0.5, "chosen_token_weights": [1, 0.5], "rejected_token_weights": [0, 2, 0, 1.5]}
    plain, weighted = read(tmp_path, PAIR, PAIR | weights)
    assert "loss_weight" not in plain and not any("weights" in response for response in plain["responses"])
    assert weighted["loss_weight"] == 0.5
    assert [response["weights"] for response in weighted["responses"]] == [[1, 0.5], [0, 2, 0, 1.5]]
    assert _pair(plain, *plain["responses"]).keys() & {"chosen_weights", "rejected_weights", "loss_weight"} == set()
    pair = _pair(weighted, *weighted["responses"])
    assert (pair["chosen_weights"], pair["rejected_weights"], pair["loss_weight"]) == ([1, 0.5], [0, 2, 0, 1.5], 0.5)
    (problem,) = read(tmp_path, {"problem": "1", "solution": "2", "answer": "2", "loss_weight": 3}, format="problems")
    assert problem["loss_weight"] == 3, "of any format"
    texts = {"loss_weight": "0.5", "chosen_token_weights": "[1, 0.5]", "rejected_token_weights": " "}
    of_table, without = read(tmp_path, PAIR | texts, PAIR | {"loss_weight": "", "weight": ""})
    assert of_table["loss_weight"] == 0.5 and of_table["responses"][0]["weights"] == [1, 0.5]
    assert "weights" not in of_table["responses"][1] and "loss_weight" not in without, "empty cells of a table"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_weight": -1}, "loss_weight: expected a number from 0 to 1000, got -1"),
        ({"loss_weight": True}, "loss_weight: expected a number from 0 to 1000, got True"),
        ({"loss_weight": 1001}, "loss_weight: expected a number from 0 to 1000, got 1001"),
        ({"loss_weight": "much"}, "loss_weight: expected a number from 0 to 1000, got 'much'"),
        ({"loss_weights": 2}, "loss_weights: not read; weights are loss_weight, chosen_token_weights, rejected_token"),
        ({"chosen_token_weights": 2}, "chosen_token_weights: expected a list of numbers from 0 to 1000, got 2"),
        ({"chosen_token_weights": [1, None]}, "chosen_token_weights: expected a list of numbers from 0 to 1000"),
        (
            {"chosen_token_weights": [1]},
            "chosen_token_weights: expected 2 numbers, one for each token of the response, with what ends it, got 1",
        ),
        ({"rejected_token_weights": [1] * 5}, "rejected_token_weights: expected 4 numbers"),
        (
            {"rejected": ["4", "5"], "rejected_token_weights": [1]},
            "rejected_token_weights: expected one response, got 2",
        ),
    ],
)
def test_what_weighs_nothing_sensible_is_set_aside(tmp_path, changes, said):
    aside, usable = read(tmp_path, PAIR | changes, PAIR)
    assert isinstance(aside, Quarantined) and said in aside.reason and "responses" in usable


def test_completions_that_are_judged_one_by_one_have_none(tmp_path):
    rows = [{"prompt": "1", "completion": text, "label": text == "2"} for text in "23"]
    usable, aside = read(tmp_path, PAIR, {**rows[0], "loss_weight": 2}, rows[1])
    assert "weights are of pairs" in aside.reason and "responses" in usable
    assert len(read(tmp_path, *rows)) == 1


def pair(name, chosen, rejected, **weights):
    return {"id": name, "prompt_ids": [7, 8], "chosen_ids": chosen, "rejected_ids": rejected, **weights}


def test_a_corpus_has_them_where_any_row_has():
    assert (plain := corpus_of_pairs([pair("a", [1], [2])])).weights is plain.loss_weights is None
    rows = [
        pair("a", [1, 2], [3]),
        pair("b", [4], [5, 6], rejected_weights=[0.5, 2], loss_weight=3),
        pair("b", [4], [6, 6], rejected_weights=[0, 1], loss_weight=3),
        pair("c", [1], [2]),
    ]
    corpus = corpus_of_pairs(rows)
    assert corpus.weights == [[1, 1], [1], [1], [0.5, 2], [0, 1], [1], [1]]
    assert corpus.loss_weights.values.tolist() == [1, 3, 1]
    batch = collate(corpus, corpus.examples)
    assert batch.loss_weights.tolist() == [1, 3, 3, 1]
    assert [row[valid].tolist() for row, valid in zip(batch.token_weights, batch.valid, strict=True)] == corpus.weights
    assert collate(corpus, corpus.examples[3:]).loss_weights.tolist() == [1]
    assert len([*corpus.arrays()]) == len([*plain.arrays()]) + 3, "ranks agree on them, too"


ROWS = [
    pair("a", [1, 2], [3, 4], chosen_weights=[1, 0.5], rejected_weights=[2, 0], loss_weight=0.25),
    pair("b", [5], [6]),
]
LOGPS, REF = [[-1.0, -2.0], [-1.5, -0.5], [-1.0, 0.0], [-3.0, 0.0]], [[-2.0, -2.5], [-1.0, -1.0], [-1.5, 0], [-2.0, 0]]


@pytest.mark.parametrize("fused", [True, False])
def test_dpo_by_hand(fused):
    batch = collate(corpus := corpus_of_pairs(ROWS), corpus.examples)
    logps, ref = torch.tensor(LOGPS, requires_grad=True), torch.tensor(REF)
    objective = Preference(0.5, losses=(("sigmoid", 1.0 if fused else 2.0),))
    loss, metrics = objective(logps, ref, batch)
    margins = 0.5 * ((1 + 0.5 * 0.5) - 2 * -0.5), 0.5 * (0.5 - -1.0)
    expected = (0.25 * nls(margins[0]) + nls(margins[1])) / 2
    assert loss.item() == pytest.approx(expected * (1 if fused else 2), rel=1e-6)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5 * (1.5 + 0.5) / 2), "of whole responses"
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient[1, 1] == 0 and gradient[1, 0] != 0


def test_key_tokens_are_those_of_weighted_rewards():
    """Of the rejected (-0.5, 0.5), weighted (-1, 0): half are key, the first alone."""
    batch = collate(corpus := corpus_of_pairs(ROWS[:1]), corpus.examples)
    loss, metrics = Preference(0.5, 0.5)(torch.tensor(LOGPS[:2]), torch.tensor(REF[:2]), batch)
    assert loss.item() == pytest.approx(0.25 * nls(0.5 * (1.25 + 1.0)), rel=1e-6)
    assert metrics["key_rewards/rejected"].item() == pytest.approx(-0.5)


@pytest.mark.parametrize("protocol", ["paper", "release"])
def test_weights_of_one_change_nothing(protocol):
    rows = [row | {"rejected_weights": [1.0] * len(row["rejected_ids"]), "loss_weight": 1.0} for row in ROWS]
    rows = [{key: value for key, value in row.items() if key != "chosen_weights"} for row in rows]
    plain = [{key: value for key, value in row.items() if "weight" not in key} for row in rows]
    losses = [
        Preference(0.5, 0.5, protocol=protocol)(
            torch.tensor(LOGPS), torch.tensor(REF), collate(corpus := corpus_of_pairs(made), corpus.examples)
        )[0]
        for made in (rows, plain)
    ]
    assert losses[0] == losses[1]


def test_confpo_asks_the_tokens_own_probabilities():
    """Weighted, the first token of the rejected would be the unsure one."""
    batch = collate(corpus := corpus_of_pairs(ROWS[:1]), corpus.examples)
    logps = torch.tensor([[log(0.9), log(0.1)], [log(0.8), log(0.5)]])
    loss, _ = Preference(2.0, losses=(("confpo", 1.0),), simpo_gamma=0.0)(logps, None, batch)
    assert loss.item() == pytest.approx(0.25 * nls(2.0 * (0.5 * log(0.1) - 0.0)), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_may_be_cut_anywhere(name):
    assert_it_may_be_cut(weighted_corpus(), Preference(0.5, 0.5, losses=((name, 1.0),)))


def weighted_corpus():
    plain, draw = pair_corpus(7), torch.Generator().manual_seed(9)

    def weights(tokens):
        return torch.rand(len(tokens), generator=draw).tolist()

    rows = []
    for chosen, rejected in plain.examples:
        right, wrong = plain.responses[chosen], plain.responses[rejected]
        of_row = {"loss_weight": right.prompt + 0.5, "rejected_weights": weights(wrong.tokens)}
        row = pair(str(right.prompt), right.tokens, wrong.tokens, **of_row)
        rows.append(row | {"prompt_ids": plain.prompts[right.prompt]})
    return corpus_of_pairs(rows)


def test_a_step_trains_by_them(tmp_path):
    config = TrainConfig(learning_rate=1e-3, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    corpus, objective = weighted_corpus(), Preference(0.5)
    trained = DensePolicy(tiny_llama())
    first = next(Trainer(trained, corpus, objective, config, tmp_path).run())
    examples, model = Examples(corpus, config), DensePolicy(tiny_llama())
    examples.layout = model.logps.layout
    batch = examples.collate(tuple(examples.steps[0]))
    logps = model.response_logps(batch)
    by_hand, _ = objective(logps, logps.detach(), batch)
    assert first.loss == pytest.approx(by_hand.item(), rel=1e-5)
    by_hand.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.model.parameters() if weight.grad is not None]).norm()
    assert first.grad_norm == pytest.approx(norm.item(), rel=1e-4)
