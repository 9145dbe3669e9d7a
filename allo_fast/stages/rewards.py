"""Token rewards: how likely a rewriting model keeps each token of a wrong response.

    p_t = p_RM(y_t | rewriting prompt(problem, gold solution, response), y_<t)
    `allo-fast rewards CONFIG`

The rewriter learns from mined corrections: for each wrong response, the correct response to the same problem at the
smallest edit distance. Departs from the release, whose corrections a teacher wrote; `rewards.source: file` takes any.
Writes rewards.jsonl {prompt, response, rewards: one float per token, the end of sequence included}.
"""

from collections.abc import Generator
from pathlib import Path

import torch

from allo_fast.config import UserError
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import edit_distance
from allo_fast.engine import Trainer
from allo_fast.models import load_tokenizer, save_model
from allo_fast.objectives import Sft
from allo_fast.policy import DensePolicy
from allo_fast.runs import Progress, Unit
from allo_fast.stages.common import (
    base_path,
    by_chunks,
    dense_policy,
    make_prompts,
    read_jsonl,
    train,
    write_jsonl,
)


def run(unit: Unit) -> Generator[Progress, None, dict]:
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
    corpus = _corrections(wanted, prompts, settings.max_examples)
    facts = yield from train(unit, Trainer(policy, corpus, Sft(), settings.train, unit.folder, seed=unit.seed))
    save_model(policy.model, tokenizer, unit.folder / "model")
    rows = yield from by_chunks(
        unit.folder / "rewards.jsonl",
        wanted,
        16,
        "response",
        lambda chunk, start: [_score(policy, prompts, row) for row in chunk],
    )
    return {**facts, "responses": len(rows), "source": "rewriter"}


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


def _corrections(wanted: list[dict], prompts: Prompts, limit: int | None) -> Corpus:
    corpus = Corpus()
    for row in wanted[:limit]:
        wrong = prompts.encode_response(row["rejected"])
        correct = map(prompts.encode_response, dict.fromkeys(row["correct"]))
        nearest = min(correct, key=lambda tokens: edit_distance(tokens, wrong))
        prompt = prompts.encode_rewrite(row["prompt"], row["solution"], row["rejected"])
        corpus.examples.append(tuple(corpus.add(prompt, [nearest])))
    return corpus


def _score(policy: DensePolicy, prompts: Prompts, row: dict) -> dict:
    corpus = Corpus()
    prompt = prompts.encode_rewrite(row["prompt"], row["solution"], row["rejected"])
    corpus.examples.append(tuple(corpus.add(prompt, [prompts.encode_response(row["rejected"])])))
    with torch.no_grad():
        rewards = policy.response_logps(collate(corpus, corpus.examples).to(policy.model.device))[0].exp().tolist()
    return {"prompt": row["prompt"], "response": row["rejected"], "rewards": rewards}


def _from_file(path: str, wanted: list[dict], prompts: Prompts) -> list[dict]:
    """The user's rewards for the responses of this run; every response must have one number per token."""
    if not Path(path).is_file():
        raise UserError(f"rewards.path: {path}: no such file")
    given = {(str(row["prompt"]), row["response"]): row["rewards"] for row in read_jsonl(Path(path))}
    rows = []
    for row in wanted:
        rewards = given.get((str(row["prompt"]), row["rejected"]))
        length = len(prompts.encode_response(row["rejected"]))
        if rewards is None or len(rewards) != length:
            got = "none" if rewards is None else str(len(rewards))
            raise UserError(f"{path}: {row['id']}: expected {length} rewards, one per token, got {got}")
        rows.append({"prompt": row["prompt"], "response": row["rejected"], "rewards": rewards})
    return rows
