"""Accuracy on the held-out problems, of one model.

Problems with given responses: the most likely response wins, by the sum of its tokens' log-probabilities. Others: a
greedy response whose final answer must match. `allo-fast evaluate CONFIG`; `allo-fast eval MODEL CONFIG` for any model.
Writes predictions.jsonl {id, strict, release (right by either scorer), response}.
"""

from collections.abc import Generator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from allo_fast.config import EvaluateConfig
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.problems import Problem
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import SCORERS, is_correct
from allo_fast.generation import generate
from allo_fast.logps import ResponseLogps
from allo_fast.models import load_model, load_tokenizer
from allo_fast.runs import Progress, Unit
from allo_fast.stages.common import base_path, by_chunks, make_prompts
from allo_fast.stages.sample import usable_problems


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    producer = {"base": None, "dpo": "warmup", "allo": "learn"}[unit.key.partition("-")[0]]
    facts = yield from evaluate(unit, unit.needed(producer) / "model" if producer else base_path(unit))
    return facts


def evaluate(unit: Unit, path: str | Path) -> Generator[Progress, None, dict]:
    """The accuracy of the model at `path`, by either scorer, and how many test rows were set aside."""
    settings, prompts = unit.config.evaluate, make_prompts(unit, load_tokenizer(path))
    problems, quarantined = usable_problems(unit, unit.config.data.test, prompts)
    model = load_model(path, unit.config.model).eval()
    logps = ResponseLogps(model) if problems[0].options else None

    def work(chunk: list[Problem], start: int) -> list[dict]:
        if logps:
            texts = [_likeliest(logps, prompts, problem) for problem in chunk]
        else:
            texts = _answers(model, prompts, chunk, settings)
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
def _likeliest(logps: ResponseLogps, prompts: Prompts, problem: Problem) -> str:
    corpus = Corpus()
    options = map(prompts.encode_response, problem.options)
    corpus.examples.append(tuple(corpus.add(prompts.encode_prompt(problem.prompt), options)))
    batch = collate(corpus, corpus.examples, share_prompts=logps.share_prompts).to(logps.model.device)
    return problem.options[int(logps(batch).sum(1).argmax())]


def _answers(model: PreTrainedModel, prompts: Prompts, chunk: list[Problem], settings: EvaluateConfig) -> list[str]:
    encoded = [prompts.encode_prompt(problem.prompt) for problem in chunk]
    responses = generate(model, prompts.tokenizer, encoded, prompts.end_tokens, max_new_tokens=settings.max_new_tokens)
    return [texts[0] for texts in responses]
