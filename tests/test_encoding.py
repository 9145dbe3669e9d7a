"""Problems as rows of token ids; what a model cannot read is set aside, with the numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import apart
from tiny import family

from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.encoding import Limits, corpus_of_pairs, encode_problems, encode_responses
from allo_fast.data.problems import Problem, Quarantined
from allo_fast.data.prompts import Prompts
from allo_fast.data.splitting import read_split
from allo_fast.stages.seen import look

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = Prompts(character_tokenizer(), template="{}=")
WIDE = Limits(prompt=100, response=100, new=10, positions=1000, vocabulary=1000)
GIVEN = Problem("a:1", "1+1", "2", "2", ("2", "02"), ("3",))
SAMPLED = Problem("a:2", "1+1", "12", "2")


def encoded(*problems, prompts=PROMPTS, limits=WIDE):
    return apart(encode_problems(problems, prompts, limits))


def test_rows():
    (given, sampled), _ = encoded(GIVEN, SAMPLED)
    prompt, (two, long, three) = PROMPTS.encode("1+1", ["2", "02", "3"])
    assert given["prompt_ids"] == prompt and given["id"] == "a:1" and "solution_ids" not in given
    assert given["responses"] == [
        {"text": "2", "ids": two, "correct": True},
        {"text": "02", "ids": long, "correct": True},
        {"text": "3", "ids": three, "correct": False},
    ]
    assert sampled["responses"] == [] and sampled["solution_ids"] == PROMPTS.encode_response("12")


@pytest.mark.parametrize(
    "problem, changes, reason",
    [
        (GIVEN, {"prompt": 3}, "the prompt has 4 tokens, data.max_prompt_tokens is 3"),
        (GIVEN, {"response": 2}, "a response or the solution has 3 tokens, data.max_response_tokens is 2"),
        (GIVEN, {"positions": 6}, "with 3 of the longest response that is more than the 6"),
        (SAMPLED, {"positions": 13}, "the prompt has 4 tokens, and with 10 of max_new_tokens that is more than the 13"),
        (SAMPLED, {"positions": 6, "new": 1}, "with 3 of the longest response that is more than the 6"),
        (GIVEN, {"vocabulary": 15}, "the token '=' is 15, the model's embedding has 15 rows"),
    ],
)
def test_what_does_not_fit(problem, changes, reason):
    assert encoded(problem)[1] == []
    rows, (aside,) = encoded(problem, limits=replace(WIDE, **changes))
    assert rows == [] and aside.id == problem.id and reason in aside.reason


def test_texts_that_are_the_same_tokens():
    """This template trims what is said."""
    same, mixed = Problem("1", "q", "", "", ("a",), (" a ",)), Problem("2", "q", "", "", ("a",), ("a\n", "b"))
    (row,), (aside,) = encoded(same, mixed, prompts=Prompts(family("gemma")))
    assert aside.id == "1" and aside.reason == "chosen and rejected are the same tokens"
    assert [response["text"] for response in row["responses"]] == ["a", "b"]


def test_sampled_responses_that_cannot_be_trained_are_counted():
    (row,), _ = encoded(SAMPLED)
    right, long = len(row["prompt_ids"]) + len(PROMPTS.encode_response("2")), "2" * 9
    row = encode_responses(row, ["2", "\ud83d", long], PROMPTS, right)
    assert row["responses"] == [{"text": "2", "ids": PROMPTS.encode_response("2")}]
    refused, too_long = row["unusable"]
    assert "the tokenizer refuses it" in refused
    length = len(row["prompt_ids"]) + len(PROMPTS.encode_response(long))
    assert too_long == f"with its prompt it has {length} tokens, the model reads {right}"


def test_pairs_of_one_problem_share_its_prompt():
    pair = {"id": "a", "prompt_ids": [1], "chosen_ids": [2, 9], "rejected_ids": [3, 9]}
    rows = [pair, {**pair, "rejected_ids": [4, 9]}, {**pair, "id": "b", "prompt_ids": [5]}]
    corpus = corpus_of_pairs(rows)
    assert corpus.prompts == [[1], [5]] and corpus.examples == [(0, 1), (0, 2), (3, 4)]
    assert [response.tokens for response in corpus.responses] == [[2, 9], [3, 9], [4, 9], [2, 9], [3, 9]]


def test_the_example_rows_are_rows():
    """Eight to train on and two to test, by the configuration that lies beside them."""
    config, counts = load_config(CONFIGS / "preference.yaml"), []
    config.data.train = str(CONFIGS.parent / config.data.train)
    for key in ("train", "test"):
        problems = read_split(config.data, key)
        rows, set_aside = encoded(*problems, prompts=Prompts(family("gemma")), limits=Limits(512, 512, 0, 999, 999))
        assert not set_aside
        assert all([response["correct"] for response in row["responses"]] == [True, False] for row in rows)
        counts.append(len(rows))
    assert counts == [8, 2]


def test_reasons_for_which_rows_are_set_aside():
    aside = [
        Quarantined(f"f:{n}", f"no field 'chosen'; rename 'Chosen' to it; it has {['Chosen', 'x'][:n]}") for n in (1, 2)
    ]
    aside += [Quarantined("f:3", "no field 'chosen'; it has ['Win']")]
    assert look(aside, 1, None).reasons == [f"{aside[0].id}: {aside[0].reason} (2 rows)", f"f:3: {aside[2].reason}"]
    aside += [Quarantined(f"g:{n}", f"reason {'abcde'[n // 2]}") for n in range(10)]
    assert look(aside, 1, None).reasons[-1] == "and 3 rows for 2 other reasons"
