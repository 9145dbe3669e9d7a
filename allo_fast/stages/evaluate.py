"""Accuracy on the held-out problems, of one model.

Problems with given responses: the most likely response wins, by the sum of its tokens' log-probabilities. Others: a
greedy response whose final answer must match. `allo-fast evaluate CONFIG`; `allo-fast eval MODEL CONFIG` for any model.
Writes predictions.jsonl {id, correct, correct_release, response}.
"""

from collections.abc import Generator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from allo_fast.config import EvaluateConfig
from allo_fast.data.batch import Corpus, collate
from allo_fast.data.problems import Problem
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import is_correct
from allo_fast.generation import generate
from allo_fast.logps import ResponseLogps
from allo_fast.models import load_model, load_tokenizer
from allo_fast.runs import Progress, Unit
from allo_fast.stages.common import base_path, by_chunks, make_prompts
from allo_fast.stages.sample import usable_problems


def run(unit: Unit) -> Generator[Progress, None, dict]:
    producer = {"base": None, "dpo": "warmup", "allo": "learn"}[unit.key.partition("-")[0]]
    path = unit.needed(producer) / "model" if producer else base_path(unit)
    rows, quarantined = yield from evaluate(unit, path, unit.folder)
    return {"problems": len(rows), "quarantined": quarantined}


def evaluate(unit: Unit, path: str | Path, folder: Path) -> Generator[Progress, None, tuple[list[dict], int]]:
    """The predictions of the model at `path`, and how many test rows were set aside."""
    settings, prompts = unit.config.evaluate, make_prompts(unit, load_tokenizer(path))
    problems, quarantined = usable_problems(unit, unit.config.data.test, prompts)
    model = load_model(path, unit.config.model).eval()
    logps = ResponseLogps(model)

    def work(chunk: list[Problem], start: int) -> list[dict]:
        if chunk[0].options:
            texts = [_likeliest(logps, prompts, problem) for problem in chunk]
        else:
            texts = _answers(model, prompts, chunk, settings)
        return [_judged(problem, text) for problem, text in zip(chunk, texts, strict=True)]

    rows = yield from by_chunks(folder / "predictions.jsonl", problems, settings.batch_size, "problem", work)
    return rows, len(quarantined)


def _judged(problem: Problem, text: str) -> dict:
    if problem.options:
        correct = release = text == problem.options[0]
    else:
        correct, release = (is_correct(text, problem.answer, scorer) for scorer in ("strict", "release"))
    return {"id": problem.id, "correct": correct, "correct_release": release, "response": text}


@torch.no_grad()
def _likeliest(logps: ResponseLogps, prompts: Prompts, problem: Problem) -> str:
    corpus = Corpus()
    options = map(prompts.encode_response, problem.options)
    corpus.examples.append(tuple(corpus.add(prompts.encode_prompt(problem.prompt), options)))
    batch = collate(corpus, corpus.examples, share_prompts=logps.share_prompts).to(logps.model.device)
    return problem.options[int(logps(batch).sum(1).argmax())]


def _answers(model: PreTrainedModel, prompts: Prompts, chunk: list[Problem], settings: EvaluateConfig) -> list[str]:
    encoded = [prompts.encode_prompt(problem.prompt) for problem in chunk]
    return [texts[0] for texts in generate(model, prompts.tokenizer, encoded, max_new_tokens=settings.max_new_tokens)]
