"""Problems as rows of token ids, the form in which a run stores and trains them; what does not fit is set aside."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from allo_fast.data.corpus import Corpus
from allo_fast.data.problems import Problem, Quarantined
from allo_fast.data.prompts import Prompts, turn_text
from allo_fast.data.sources import UnusableRow

CUT = "\ufffd"  # what a part of a character is decoded to


@dataclass(frozen=True)
class Limits:
    """In tokens. new: that may be sampled after a prompt without given responses."""

    prompt: int  # data.max_prompt_tokens
    response: int  # data.max_response_tokens
    new: int
    positions: float  # that the model can read
    vocabulary: float  # rows of its embedding


def encode_problems(
    problems: Iterable[Problem | Quarantined], prompts: Prompts, limits: Limits
) -> Iterator[dict | Quarantined]:
    """Of each problem its row {id, prompt, tools, solution, answer, prompt_ids, responses: [{text, ids, correct}]}, or
    why it is set aside.

    Where responses are to be sampled there are none, and `solution_ids` instead, where there is a solution. `fields`,
    where the problem has them.
    """
    for problem in problems:
        try:
            yield problem if isinstance(problem, Quarantined) else _encode(problem, prompts, limits)
        except UnusableRow as error:
            yield Quarantined(problem.id, str(error))


def encode_responses(row: dict, texts: list[str], prompts: Prompts, positions: float) -> dict:
    """The row with sampled responses {text, ids}; `unusable`: why others could not be encoded.

    positions: tokens that the model reads. A response has one more than was sampled where no end was, and others where
    the tokenizer writes its text in another way.
    """
    responses, unusable = [], []
    for text in texts:
        try:
            _, (ids,) = prompts.encode(row["prompt"], [text], row["tools"])
            if (length := len(row["prompt_ids"]) + len(ids)) > positions:
                raise UnusableRow(f"with its prompt it has {length} tokens, the model reads {positions}")
            responses.append({"text": text, "ids": ids})
        except UnusableRow as error:
            unusable.append(str(error))
    return {**row, "responses": responses, "unusable": unusable}


def max_positions(model: PreTrainedConfig) -> float:
    """Tokens that a model of this configuration can read; infinite where it names no limit."""
    return getattr(model, "max_position_embeddings", None) or float("inf")


def prompt_digest(row: dict) -> int:
    """Of a row's prompt, as it is rendered: 64 bits."""
    return int.from_bytes(hashlib.blake2b(array("q", row["prompt_ids"]), digest_size=8).digest())


def count_trained(test: Sequence[int], train: Sequence[int]) -> int:
    """How many of the test prompts are among those that train, both as digests."""
    return int(np.isin(np.array(test, "u8"), np.array(train, "u8")).sum())


def corpus_of_pairs(rows: Iterable[dict], folder: Path | None = None) -> Corpus:
    """From rows {id, prompt_ids, chosen_ids, rejected_ids}, those of a problem together: each problem once with all
    responses of its pairs.

    Rows may have weights, too: `loss_weight`, and lists `chosen_weights` and `rejected_weights`, of tokens; what has
    none weighs 1. Examples are (chosen, rejected). folder: where its numbers lie; None: in memory.
    """
    corpus = Corpus.on_disk(folder) if folder else Corpus()
    for name, members in groupby(rows, key=itemgetter("id")):
        first, *others = members
        pairs = [(tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in (first, *others)]
        responses = list(dict.fromkeys(ids for pair in pairs for ids in pair))
        weights = {
            tuple(row[f"{side}_ids"]): row[f"{side}_weights"]
            for row in (first, *others)
            for side in ("chosen", "rejected")
            if f"{side}_weights" in row
        }
        more = {"weights": weights, "loss_weight": first.get("loss_weight", 1.0)}
        number = dict(zip(responses, corpus.add(first["prompt_ids"], responses, name, **more), strict=True))
        corpus.examples += [(number[chosen], number[rejected]) for chosen, rejected in pairs]
    return corpus


def _encode(problem: Problem, prompts: Prompts, limits: Limits) -> dict:
    prompt = problem.prompt if prompts.chat or problem.plain_prompt is None else problem.plain_prompt
    turns = [*problem.right, *problem.wrong]
    prompt_ids, ids = prompts.encode(prompt, turns or [problem.solution], problem.tools)
    row = {"id": problem.id, "prompt": prompt, "tools": problem.tools, "solution": problem.solution}
    row |= {"answer": problem.answer, "prompt_ids": prompt_ids}
    _check_lengths(len(prompt_ids), max(map(len, ids)), limits, given=bool(turns))
    _check_vocabulary([*prompt_ids, *(token for response in ids for token in response)], prompts, limits)
    row |= {"fields": problem.fields} if problem.fields else {}
    row |= {"loss_weight": problem.loss_weight} if problem.loss_weight != 1 else {}
    if not turns:
        return row | ({"solution_ids": ids[0]} if problem.solution else {}) | {"responses": []}
    right = {tuple(tokens) for tokens in ids[: len(problem.right)]}
    responses = [
        {"text": turn_text(turn), "ids": tokens, "correct": number < len(problem.right)}
        for number, (turn, tokens) in enumerate(zip(turns, ids, strict=True))
        if number < len(problem.right) or tuple(tokens) not in right
    ]
    if all(response["correct"] for response in responses):
        raise UnusableRow("chosen and rejected are the same tokens")
    weights = {True: ("chosen", problem.right_weights), False: ("rejected", problem.wrong_weights)}
    responses = [response | _weights(response, *weights[response["correct"]]) for response in responses]
    return {**row, "responses": responses}


def _weights(response: dict, name: str, weights: list[float] | None) -> dict[str, list[float]]:
    """Of a response's tokens, where they are given."""
    if weights is None:
        return {}
    if len(weights) != (length := len(response["ids"])):
        expected = f"expected {length} numbers, one for each token of the response, with what ends it"
        raise UnusableRow(f"{name}_token_weights: {expected}, got {len(weights)}")
    return {"weights": weights}


def _check_lengths(prompt: int, response: int, limits: Limits, given: bool) -> None:
    if prompt > limits.prompt:
        raise UnusableRow(f"the prompt has {prompt} tokens, data.max_prompt_tokens is {limits.prompt}")
    if response > limits.response:
        raise UnusableRow(
            f"a response or the solution has {response} tokens, data.max_response_tokens is {limits.response}"
        )
    after = response if given else max(response, limits.new)
    if prompt + after > limits.positions:
        what = "the longest response" if after == response else "max_new_tokens"
        raise UnusableRow(
            f"the prompt has {prompt} tokens, and with {after} of {what} that is more than the {limits.positions} that "
            "the model reads"
        )


def _check_vocabulary(ids: list[int], prompts: Prompts, limits: Limits) -> None:
    if (highest := max(ids)) >= limits.vocabulary:
        token = prompts.tokenizer.convert_ids_to_tokens(highest)
        raise UnusableRow(f"the token {token!r} is {highest}, the model's embedding has {limits.vocabulary} rows")
