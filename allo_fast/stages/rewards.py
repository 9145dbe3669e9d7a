"""Token rewards: how likely a rewriting model keeps each token of a wrong response.

    p_t = p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t)
    `allo-fast rewards CONFIG`

The rewriter learns from mined corrections: for each wrong response, the correct response to the same problem at the
smallest edit distance. Departs from the release, whose corrections a teacher wrote; `rewards.source: file` takes any.
Writes rewards.jsonl {id, prompt, response, the token ids of both, rewards: one float per token of the response, what
ends it included}.
"""

import json
import random
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein

from allo_fast.config import UserError
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.prompts import Prompts
from allo_fast.data.sources import UnusableRow
from allo_fast.method.objectives import Sft
from allo_fast.method.policy import DensePolicy
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks, read_jsonl, rendered_once, write_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.driving import train
from allo_fast.stages.models import base_path, dense_policy, prompts_of
from allo_fast.stages.problems import limits
from allo_fast.training.engine import Trainer


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings = unit.config.rewards
    responses = _wrong_responses(unit)
    if settings.source == "file":
        rows = _from_file(settings.path, responses)
        write_jsonl(unit.folder / "rewards.jsonl", rows)
        return {"responses": len(rows), "source": settings.path}
    prompts = prompts_of(unit.config, load_tokenizer(base_path(unit)))
    path = settings.model or base_path(unit)
    positions = limits(unit.config, 0, path).positions
    rewrites = rendered_once(unit.folder / "rewrites.jsonl", lambda: _rewrites(responses, prompts))
    readable = [row for row in rewrites if _length(row) <= positions]
    if not readable:
        shortest = min(map(_length, rewrites), default="no")
        raise UserError(
            f"rewards: the shortest rewriting prompt with its response has {shortest} tokens, {path} reads {positions}"
        )
    policy = dense_policy(unit, path)
    corpus = _corrections(_drawn(readable, settings.max_examples, unit.seed))
    trainer = Trainer(policy, corpus, Sft(), settings.train, unit.folder, seed=unit.seed, zero=unit.zero)
    facts = yield from train(unit, trainer)

    def work(chunk: list[dict], start: int) -> list[dict]:
        return _score(policy, chunk)

    rows = yield from by_chunks(unit.folder / "rewards.jsonl", readable, settings.batch_size, "response", work)
    trainer.backend.close()
    return {**facts, "responses": len(rows), "left_out": len(responses) - len(rows), "source": "rewriter"}


def _wrong_responses(unit: Unit) -> list[dict]:
    """Each rejected response once, with its problem's gold solution and the tokens of its correct responses."""
    problems = {row["id"]: row for row in read_jsonl(unit.needed("sample") / "responses.jsonl")}
    responses = {}
    for pair in read_jsonl(unit.needed("pairs") / "pairs.jsonl"):
        problem = problems[pair["id"]]
        correct = [response["ids"] for response in problem["responses"] if response["correct"]]
        row = {name: pair[name] for name in ("id", "prompt", "prompt_ids")} | {"solution": problem["solution"]}
        row |= {"response": pair["rejected"], "response_ids": pair["rejected_ids"]}
        responses[pair["id"], tuple(pair["rejected_ids"])] = {**row, "correct": correct or [pair["chosen_ids"]]}
    return list(responses.values())


def _rewrites(responses: list[dict], prompts: Prompts) -> list[dict]:
    """Each with the tokens of its rewriting prompt; those whose prompt cannot be rendered are left out."""
    rows = []
    for row in responses:
        with suppress(UnusableRow):  # counted by the caller
            ids = prompts.encode_rewrite(row["prompt"], row["solution"], row["response"])
            rows.append({**row, "rewrite_ids": ids})
    return rows


def _length(row: dict) -> int:
    """Tokens of the rewriting prompt with the longest response that may follow it."""
    return len(row["rewrite_ids"]) + max(map(len, (*row["correct"], row["response_ids"])))


def _drawn(rows: list[dict], limit: int | None, seed: int) -> list[dict]:
    return rows if limit is None else random.Random(seed).sample(rows, min(limit, len(rows)))


def _corrections(rows: list[dict]) -> Corpus:
    """Rewriting prompt -> the correct response nearest to the wrong one."""
    corpus = Corpus()
    for row in rows:
        nearest = min(row["correct"], key=lambda ids: Levenshtein.distance(ids, row["response_ids"]))
        corpus.examples.append(tuple(corpus.add(row["rewrite_ids"], [nearest])))
    return corpus


def _score(policy: DensePolicy, rows: list[dict]) -> list[dict]:
    corpus = Corpus()
    for row in rows:
        corpus.examples.append(tuple(corpus.add(row["rewrite_ids"], [row["response_ids"]])))
    batch = collate(corpus, corpus.examples).to(policy.model.device)
    with torch.no_grad():
        rewards = policy.response_logps(batch).exp()
    return [_row(row, line[valid].tolist()) for row, line, valid in zip(rows, rewards, batch.valid, strict=True)]


def _row(row: dict, rewards: list[float]) -> dict:
    names = ("id", "prompt", "response", "prompt_ids", "response_ids")
    return {name: row[name] for name in names} | {"rewards": rewards}


def read_rewards(path: str) -> dict[tuple[str, str], list[float]]:
    """A user's rewards by prompt and response: JSON lines {prompt, response, rewards}. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"rewards.path: {path}: no such file")
    rewards = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _parse_rewards(line, f"{path}:{number}")
            rewards[str(row["prompt"]), row["response"]] = row["rewards"]
    return rewards


def _from_file(path: str, responses: list[dict]) -> list[dict]:
    """The user's rewards for the responses of this run; every response must have one number per token."""
    by_response, rows = read_rewards(path), []
    for row in responses:
        rewards = by_response.get((str(row["prompt"]), row["response"]))
        length = len(row["response_ids"])
        if rewards is None or len(rewards) != length:
            got = "none" if rewards is None else str(len(rewards))
            raise UserError(f"{path}: {row['id']}: expected {length} rewards, one per token, got {got}")
        rows.append(_row(row, rewards))
    return rows


def _parse_rewards(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not {"prompt", "response", "rewards"} <= row.keys():
        raise UserError(f"{where}: expected the fields prompt, response and rewards")
    rewards = row["rewards"]
    if not isinstance(rewards, list) or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in rewards):
        raise UserError(f"{where}: rewards: expected numbers in 0..1")
    return row
