"""The wrong responses of a run, and what a model says of each of their tokens."""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from allo_fast.config import UserError
from allo_fast.data.batch import Batch, Corpus, collate
from allo_fast.runs.rows import by_chunks, read_jsonl
from allo_fast.runs.run import Progress, Unit

REWARDS = "rewards.jsonl"


def wrong_responses(unit: Unit) -> list[dict]:
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


def reward_row(row: dict, rewards: list[float]) -> dict:
    names = ("id", "prompt", "response", "prompt_ids", "response_ids")
    return {name: row[name] for name in names} | {"rewards": rewards}


def rewarded(
    unit: Unit, rows: Sequence[dict], score: Callable[[Batch], Tensor], device: torch.device, prompt: str = "prompt_ids"
) -> Generator[Progress, None, None]:
    """Writes rewards.jsonl: score(batch) [R, L] of each response behind the prompt of that name, one row each."""

    def work(chunk: Sequence[dict], start: int) -> list[dict]:
        corpus = Corpus()
        for row in chunk:
            corpus.examples.append(tuple(corpus.add(row[prompt], [row["response_ids"]])))
        batch = collate(corpus, corpus.examples).to(device)
        with torch.no_grad():
            rewards = score(batch)
        if not rewards[batch.valid].isfinite().all():
            raise UserError(f"rewards.source: {unit.config.reward_source}: a token's reward is not finite")
        return [
            reward_row(row, line[valid].tolist()) for row, line, valid in zip(chunk, rewards, batch.valid, strict=True)
        ]

    yield from by_chunks(unit, REWARDS, rows, unit.config.rewards.batch_size, "response", work)
