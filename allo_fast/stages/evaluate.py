"""Accuracy on the held-out problems, of one model.

Problems with given responses: the most likely response wins, by the sum of its tokens' log-probabilities. Others: a
greedy response whose final answer must match. `allo-fast evaluate CONFIG`; `allo-fast eval MODEL CONFIG` for any model.
Writes predictions.jsonl {id, strict, release (right by either scorer), response}.
"""

from collections.abc import Generator
from pathlib import Path

import torch

from allo_fast.config import EvaluateConfig
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import SCORERS, is_correct
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.models import Inference, base_path, inference, make_prompts
from allo_fast.stages.problems import unit_problems


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    producer = {"base": None, "dpo": "warmup", "allo": "learn"}[unit.key.partition("-")[0]]
    facts = yield from evaluate(unit, unit.needed(producer) / "model" if producer else base_path(unit))
    return facts


def evaluate(unit: Unit, path: str | Path) -> Generator[Progress, None, dict]:
    """The accuracy of the model at `path`, by either scorer, and how many test rows were set aside."""
    settings, prompts = unit.config.evaluate, make_prompts(unit, load_tokenizer(path))
    problems, quarantined = unit_problems(unit, unit.config.data.test, prompts, settings.max_new_tokens, path)
    scoring = bool(problems[0]["responses"])
    with inference(unit, path, scoring=scoring) as frozen:

        def work(chunk: list[dict], start: int) -> list[dict]:
            if scoring:
                texts = _likeliest(frozen, chunk, settings.batch_size)
            else:
                texts = _answers(frozen, prompts, chunk, settings)
            return [_judged(problem, text) for problem, text in zip(chunk, texts, strict=True)]

        rows = yield from by_chunks(unit.folder / "predictions.jsonl", problems, settings.batch_size, "problem", work)
    right = {scorer: sum(row[scorer] for row in rows) for scorer in SCORERS}
    return {"problems": len(rows), "quarantined": quarantined, **right}


def _judged(problem: dict, text: str) -> dict:
    """Right or not by each scorer; of given responses there is one right one whatever the scorer."""
    if problem["responses"]:
        right = dict.fromkeys(SCORERS, text == problem["responses"][0]["text"])
    else:
        right = {scorer: is_correct(text, problem["answer"], scorer) for scorer in SCORERS}
    return {"id": problem["id"], **right, "response": text}


@torch.no_grad()
def _likeliest(frozen: Inference, chunk: list[dict], rounds: int) -> list[str]:
    """One forward pass a problem; `rounds` of them whatever the chunk has, as all ranks share a sharded model."""
    texts = []
    for problem in chunk + chunk[:1] * (rounds - len(chunk) if frozen.sharded else 0):
        corpus = Corpus()
        responses = [response["ids"] for response in problem["responses"]]
        corpus.examples.append(tuple(corpus.add(problem["prompt_ids"], responses)))
        batch = collate(corpus, corpus.examples, share_prompts=frozen.share_prompts).to(frozen.model.device)
        texts.append(problem["responses"][int(frozen.compute(batch).sum(1).argmax())]["text"])
    return texts[: len(chunk)]


def _answers(frozen: Inference, prompts: Prompts, chunk: list[dict], settings: EvaluateConfig) -> list[str]:
    responses = generate(
        frozen.model,
        prompts.tokenizer,
        [problem["prompt_ids"] for problem in chunk],
        prompts.end_tokens,
        max_new_tokens=settings.max_new_tokens,
        sharded=frozen.sharded,
    )
    return [texts[0] for texts in responses]
