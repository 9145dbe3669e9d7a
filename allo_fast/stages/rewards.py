"""Token rewards: how likely a rewriting model keeps each token of a wrong response.

    p_t = p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t)
    `allo-fast rewards CONFIG`

The rewriter learns from mined corrections: for each wrong response, the correct response to the same problem at the
smallest edit distance. Departs from the release, whose corrections a teacher wrote; `rewards.source: file` takes any.
Writes rewards.jsonl {prompt, response, rewards: one float per token, the end of sequence included}.
"""

import json
import random
from collections.abc import Generator
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein

from allo_fast.config import UserError
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.prompts import Prompts
from allo_fast.method.objectives import Sft
from allo_fast.method.policy import DensePolicy
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks, read_jsonl, write_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.driving import max_length, train
from allo_fast.stages.models import base_path, dense_policy, make_prompts
from allo_fast.training.engine import Trainer


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    settings = unit.config.rewards
    tokenizer = load_tokenizer(base_path(unit))
    prompts = make_prompts(unit, tokenizer)
    wanted = _wrong_responses(unit)
    if settings.source == "file":
        rows = _from_file(settings.path, wanted, prompts)
        write_jsonl(unit.folder / "rewards.jsonl", rows)
        return {"responses": len(rows), "source": settings.path}
    path = settings.model or base_path(unit)
    if settings.model and load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"rewards.model: {path} has another vocabulary than {base_path(unit)}")
    policy = dense_policy(unit, path)
    readable = [row for row in wanted if _length(row, prompts) <= max_length(policy.model)]
    corpus = _corrections(_drawn(readable, settings.max_examples, unit.seed), prompts)
    trainer = Trainer(policy, corpus, Sft(), settings.train, unit.folder, seed=unit.seed, zero=unit.zero)
    facts = yield from train(unit, trainer)

    def work(chunk: list[dict], start: int) -> list[dict]:
        return _score(policy, prompts, chunk)

    rows = yield from by_chunks(unit.folder / "rewards.jsonl", readable, settings.batch_size, "response", work)
    trainer.backend.close()
    return {**facts, "responses": len(rows), "too_long": len(wanted) - len(rows), "source": "rewriter"}


def _wrong_responses(unit: Unit) -> list[dict]:
    """Each rejected response once, with its problem's gold solution and correct responses."""
    problems = {row["id"]: row for row in read_jsonl(unit.needed("sample") / "responses.jsonl")}
    wanted = {}
    for pair in read_jsonl(unit.needed("pairs") / "pairs.jsonl"):
        held = wanted.setdefault((pair["id"], pair["rejected"]), {**pair, "correct": []})
        held["solution"] = problems[pair["id"]]["solution"]
        correct = [r["text"] for r in problems[pair["id"]]["responses"] if r["correct"]]
        held["correct"] = correct or [pair["chosen"]]
    return list(wanted.values())


def _length(row: dict, prompts: Prompts) -> int:
    """Tokens of the rewriting prompt with the longest response that may follow it."""
    after = max(len(prompts.encode_response(text)) for text in (*row["correct"], row["rejected"]))
    return len(prompts.encode_rewrite(row["prompt"], row["solution"], row["rejected"])) + after


def _drawn(rows: list[dict], limit: int | None, seed: int) -> list[dict]:
    return rows if limit is None else random.Random(seed).sample(rows, min(limit, len(rows)))


def _corrections(wanted: list[dict], prompts: Prompts) -> Corpus:
    """Rewriting prompt -> the correct response nearest to the wrong one."""
    corpus = Corpus()
    for row in wanted:
        wrong = prompts.encode_response(row["rejected"])
        correct = map(prompts.encode_response, dict.fromkeys(row["correct"]))
        nearest = min(correct, key=lambda tokens: Levenshtein.distance(tokens, wrong))
        prompt = prompts.encode_rewrite(row["prompt"], row["solution"], row["rejected"])
        corpus.examples.append(tuple(corpus.add(prompt, [nearest])))
    return corpus


def _score(policy: DensePolicy, prompts: Prompts, rows: list[dict]) -> list[dict]:
    corpus = Corpus()
    for row in rows:
        prompt = prompts.encode_rewrite(row["prompt"], row["solution"], row["rejected"])
        corpus.examples.append(tuple(corpus.add(prompt, [prompts.encode_response(row["rejected"])])))
    batch = collate(corpus, corpus.examples).to(policy.model.device)
    with torch.no_grad():
        rewards = policy.response_logps(batch).exp()
    return [
        {"prompt": row["prompt"], "response": row["rejected"], "rewards": line[valid].tolist()}
        for row, line, valid in zip(rows, rewards, batch.valid, strict=True)
    ]


def _from_file(path: str, wanted: list[dict], prompts: Prompts) -> list[dict]:
    """The user's rewards for the responses of this run; every response must have one number per token."""
    if not Path(path).is_file():
        raise UserError(f"rewards.path: {path}: no such file")
    given = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = _parse_rewards(line, f"{path}:{number}")
            given[str(row["prompt"]), row["response"]] = row["rewards"]
    rows = []
    for row in wanted:
        rewards = given.get((str(row["prompt"]), row["rejected"]))
        length = len(prompts.encode_response(row["rejected"]))
        if rewards is None or len(rewards) != length:
            got = "none" if rewards is None else str(len(rewards))
            raise UserError(f"{path}: {row['id']}: expected {length} rewards, one per token, got {got}")
        rows.append({"prompt": row["prompt"], "response": row["rejected"], "rewards": rewards})
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
