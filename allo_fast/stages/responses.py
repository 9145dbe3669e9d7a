"""The wrong responses of a run, and what a model says of each of their tokens."""

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import torch

from allo_fast.config import UserError
from allo_fast.data.batch import collate
from allo_fast.data.corpus import Corpus
from allo_fast.runs.rows import by_chunks, read_jsonl
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.pairs import PAIRS
from allo_fast.training.reference import Opened

REWARDS = "rewards.jsonl"


def wrong_responses(unit: Unit) -> Iterator[dict]:
    """Each rejected response once, with its problem's gold solution and the tokens of its correct responses.

    Pairs are in the order of their problems, so both files are gone through once, together.
    """
    problems = iter(read_jsonl(unit.needed("sample") / "responses.jsonl"))
    for name, members in groupby(read_jsonl(unit.needed("pairs") / PAIRS), key=itemgetter("id")):
        problem = next(row for row in problems if row["id"] == name)
        correct, responses = [response["ids"] for response in problem["responses"] if response["correct"]], {}
        for pair in members:
            row = {key: pair[key] for key in ("id", "prompt", "prompt_ids")} | {"solution": problem["solution"]}
            row |= {"response": pair["rejected"], "response_ids": pair["rejected_ids"]}
            responses[tuple(pair["rejected_ids"])] = {**row, "correct": correct or [pair["chosen_ids"]]}
        yield from responses.values()


def reward_row(row: dict, rewards: list[float]) -> dict:
    names = ("id", "prompt", "response", "prompt_ids", "response_ids")
    return {name: row[name] for name in names} | {"rewards": rewards}


def rewarded(
    unit: Unit, rows: Sequence[dict], model: Opened, prompt: str = "prompt_ids"
) -> Generator[Progress, None, None]:
    """Writes rewards.jsonl: what `model` computes, [R, L], of each response behind the prompt of that name."""

    def work(chunk: Sequence[dict], start: int) -> list[dict]:
        corpus = Corpus()
        for row in chunk:
            corpus.examples.append(tuple(corpus.add(row[prompt], [row["response_ids"]])))
        batch = collate(corpus, corpus.examples, model.layout).to(model.device)
        with torch.no_grad():
            rewards = model.compute(batch)
        if not rewards[batch.valid].isfinite().all():
            raise UserError(f"rewards.source: {unit.config.reward_source}: a token's reward is not finite")
        return [
            reward_row(row, line[valid].tolist()) for row, line, valid in zip(chunk, rewards, batch.valid, strict=True)
        ]

    yield from by_chunks(unit, REWARDS, rows, unit.config.rewards.batch_size, "response", work)
