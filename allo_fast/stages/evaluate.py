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
from allo_fast.data.problems import Problem
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import SCORERS, is_correct
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.models import Inference, base_path, inference, make_prompts
from allo_fast.stages.sample import usable_problems


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    producer = {"base": None, "dpo": "warmup", "allo": "learn"}[unit.key.partition("-")[0]]
    facts = yield from evaluate(unit, unit.needed(producer) / "model" if producer else base_path(unit))
    return facts


def evaluate(unit: Unit, path: str | Path) -> Generator[Progress, None, dict]:
    """The accuracy of the model at `path`, by either scorer, and how many test rows were set aside."""
    settings, prompts = unit.config.evaluate, make_prompts(unit, load_tokenizer(path))
    problems, quarantined = usable_problems(unit, unit.config.data.test, prompts)
    scoring = bool(problems[0].options)
    with inference(unit, path, scoring=scoring) as found:

        def work(chunk: list[Problem], start: int) -> list[dict]:
            if scoring:
                texts = _likeliest(found, prompts, chunk, settings.batch_size)
            else:
                texts = _answers(found, prompts, chunk, settings)
            return [_judged(problem, text) for problem, text in zip(chunk, texts, strict=True)]

        rows = yield from by_chunks(unit.folder / "predictions.jsonl", problems, settings.batch_size, "problem", work)
    right = {scorer: sum(row[scorer] for row in rows) for scorer in SCORERS}
    return {"problems": len(rows), "quarantined": len(quarantined), **right}


def _judged(problem: Problem, text: str) -> dict:
    """Right or not by each scorer; of given responses there is one right one whatever the scorer."""
    if problem.options:
        right = dict.fromkeys(SCORERS, text == problem.options[0])
    else:
        right = {scorer: is_correct(text, problem.answer, scorer) for scorer in SCORERS}
    return {"id": problem.id, **right, "response": text}


@torch.no_grad()
def _likeliest(found: Inference, prompts: Prompts, chunk: list[Problem], rounds: int) -> list[str]:
    """One forward pass a problem; `rounds` of them whatever the chunk has, as all ranks share a sharded model."""
    texts = []
    for problem in chunk + chunk[:1] * (rounds - len(chunk) if found.sharded else 0):
        corpus = Corpus()
        options = map(prompts.encode_response, problem.options)
        corpus.examples.append(tuple(corpus.add(prompts.encode_prompt(problem.prompt), options)))
        batch = collate(corpus, corpus.examples, share_prompts=found.share_prompts).to(found.model.device)
        texts.append(problem.options[int(found.compute(batch).sum(1).argmax())])
    return texts[: len(chunk)]


def _answers(found: Inference, prompts: Prompts, chunk: list[Problem], settings: EvaluateConfig) -> list[str]:
    encoded = [prompts.encode_prompt(problem.prompt) for problem in chunk]
    responses = generate(
        found.model,
        prompts.tokenizer,
        encoded,
        prompts.end_tokens,
        max_new_tokens=settings.max_new_tokens,
        sharded=found.sharded,
    )
    return [texts[0] for texts in responses]
