"""Token rewards, 0..1: for each token of a wrong response, how well it stands there; low ones are forgotten.

    confidence   p(y_t | prompt, y_<t) by the frozen base: nothing is trained
    rewriter     p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t), see rewriting.py
    prompted     the same by the base itself, for instruct models that can
    implicit     how much less DPO on the pairs made of the token than of the others of its response, see implicit.py
    file         the user's own
    `allo-fast rewards CONFIG`

Departs from the release, whose rewriter learns densely from corrections that a teacher wrote. Writes rewards.jsonl {id,
prompt, response, the token ids of both, rewards: one float per token of the response, what ends it included}.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from allo_fast import ranks
from allo_fast.data.corpus import Corpus
from allo_fast.data.sources import UnusableRow, parse_json
from allo_fast.errors import UserError, no_such
from allo_fast.model.weights import fingerprint
from allo_fast.runs.rows import Rows, read_jsonl, rendered_once, write_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.driving import cache_of, responses_done
from allo_fast.stages.implicit import implicit
from allo_fast.stages.models import base_path, inference
from allo_fast.stages.responses import REWARDS, reward_row, wrong_responses
from allo_fast.stages.rewriting import prompted, rewriter
from allo_fast.training.reference import Opened, described, kept, reference_logps

_WRONG = "wrong.jsonl"  # the responses; of no use once they have rewards


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    source = unit.config.reward_source
    responses = rendered_once(unit, _WRONG, lambda: wrong_responses(unit))
    facts = yield from _SOURCES[source](unit, responses)
    rewarded_responses = ranks.on_main(lambda: len(read_jsonl(unit.folder / REWARDS)))  # which rank 0 has written
    left_out = len(responses) - rewarded_responses
    ranks.on_main((unit.folder / _WRONG).unlink)
    return {**facts, "responses": rewarded_responses, "left_out": left_out, "source": source}


def _confidence(unit: Unit, responses: Rows) -> Generator[Progress, None, dict]:
    """By the log-probabilities that forgetting compares with, where it compares with the same model."""
    corpus = Corpus.on_disk(unit.folder)
    for row in responses:
        corpus.add(row["prompt_ids"], [row["response_ids"]])
    with inference(unit, unit.config.rewards.model or base_path(unit), scoring=True) as frozen:
        place = kept(cache_of(unit), described(frozen.model, fingerprint(frozen.model), frozen.layout))
        opened = nullcontext(Opened(frozen.compute, frozen.layout, frozen.model.device))
        logps = yield from responses_done(reference_logps(*place, corpus, np.arange(len(responses)), opened))
    rewards = (torch.tensor(logps[number]).exp().tolist() for number in range(len(responses)))
    ranks.on_main(lambda: write_jsonl(unit.folder / REWARDS, map(reward_row, responses, rewards)))
    return {}


def _file(unit: Unit, responses: Rows) -> Generator[Progress, None, dict]:
    """The user's rewards for the responses of this run; every response must have one number per token."""
    path = unit.config.rewards.path

    def rewards() -> Iterator[dict]:
        by_response = read_rewards(path)
        for row in responses:
            rewards, length = by_response(row["prompt"], row["response"]), len(row["response_ids"])
            if rewards is None or len(rewards) != length:
                got = "none" if rewards is None else str(len(rewards))
                raise UserError(f"{path}: {row['id']}: expected {length} rewards, one per token, got {got}")
            yield reward_row(row, rewards)

    ranks.on_main(lambda: write_jsonl(unit.folder / REWARDS, rewards()))
    yield Progress(len(responses), len(responses), "response")
    return {"path": path}


_SOURCES: dict[str, Callable[[Unit, Rows], Generator[Progress, None, dict]]] = {
    "confidence": _confidence,
    "rewriter": rewriter,
    "prompted": prompted,
    "implicit": implicit,
    "file": _file,
}


def read_rewards(path: str) -> Callable[[object, str], list[float] | None]:
    """What finds a user's rewards by prompt and response in JSON lines {prompt, response, rewards}. Raises UserError.

    Or {input, output, reward}, as the published code writes them. Of the rows only where they lie is kept.
    """
    if not Path(path).is_file():
        raise UserError(f"rewards.path: {no_such(path)}")

    def rewards_at(place: int) -> list[float]:
        with Path(path).open("rb") as file:
            file.seek(place)
            return _named(json.loads(file.readline()))["rewards"]

    places, place = {}, 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parse_rewards(line, f"{path}:{number}")
                earlier = places.setdefault(_key(row["prompt"], row["response"]), place)
                if earlier != place and rewards_at(earlier) != row["rewards"]:
                    raise UserError(f"{path}:{number}: other rewards than an earlier row has for the same response")
            place += len(line)

    def find(prompt: object, response: str) -> list[float] | None:
        place = places.get(_key(prompt, response))
        return None if place is None else rewards_at(place)

    return find


def _key(prompt: object, response: object) -> bytes:
    return hashlib.sha256(repr((str(prompt), response)).encode()).digest()


def _named(row: object) -> object:
    """With our names, where it has the published code's."""
    if isinstance(row, dict) and {"input", "output", "reward"} <= row.keys():
        return {"prompt": row["input"], "response": row["output"], "rewards": row["reward"]}
    return row


def _parse_rewards(line: bytes, where: str) -> dict:
    try:
        row = _named(parse_json(line))
    except UnusableRow as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(row, dict) or not {"prompt", "response", "rewards"} <= row.keys():
        raise UserError(f"{where}: expected the fields prompt, response and rewards")
    if not isinstance(row["response"], str):
        raise UserError(f"{where}: response: expected a text, got {row['response']!r:.80}")
    rewards = row["rewards"]
    if not isinstance(rewards, list) or not all(type(x) in (int, float) and 0 <= x <= 1 for x in rewards):
        raise UserError(f"{where}: rewards: expected numbers in 0..1")
    return row
