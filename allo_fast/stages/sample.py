"""Responses to every training problem: sampled from the base model, or given with the data.

    y ~ p_base(. | problem), temperature 0.7, top_p 0.95, 10 each
    `allo-fast sample CONFIG`

Departs from the release: a seed reaches the sampler, and responses are sampled after the prompt they are trained on.
Writes responses.jsonl and quarantine.jsonl (rows that were set aside, with the reason).
"""

from collections.abc import Generator

from allo_fast.config import UserError
from allo_fast.data.problems import Problem, Quarantined, read_problems
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import is_correct
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.runs.rows import by_chunks, write_jsonl
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.models import base_path, inference, make_prompts


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    prompts = make_prompts(unit, load_tokenizer(base_path(unit)))
    problems, quarantined = usable_problems(unit, unit.config.data.train, prompts)
    if problems[0].options:
        write_jsonl(unit.folder / "responses.jsonl", (_given(problem) for problem in problems))
        responses = sum(len(problem.options) for problem in problems)
    else:
        responses = yield from _sample(unit, problems, prompts)
    return {"problems": len(problems), "responses": responses, "quarantined": len(quarantined)}


def usable_problems(unit: Unit, source: str, prompts: Prompts) -> tuple[list[Problem], list[Quarantined]]:
    """The problems of a source whose prompt, options and solution are not over-long; the rest into quarantine.jsonl."""
    data = unit.config.data
    problems, quarantined = read_problems(source, data.format)
    kept = []
    for problem in problems:
        prompt = len(prompts.encode_prompt(problem.prompt))
        response = max(len(prompts.encode_response(text)) for text in (*problem.options, problem.solution))
        if prompt > data.max_prompt_tokens:
            reason = f"the prompt has {prompt} tokens, data.max_prompt_tokens is {data.max_prompt_tokens}"
        elif response > data.max_response_tokens:
            limit = data.max_response_tokens
            reason = f"a response or the solution has {response} tokens, data.max_response_tokens is {limit}"
        else:
            kept.append(problem)
            continue
        quarantined.append(Quarantined(problem.id, reason))
    write_jsonl(unit.folder / "quarantine.jsonl", map(vars, quarantined))
    if not kept:
        raise UserError(f"{source}: no usable row; {quarantined[0].id}: {quarantined[0].reason}")
    return kept, quarantined


def _sample(unit: Unit, problems: list[Problem], prompts: Prompts) -> Generator[Progress, None, int]:
    settings = unit.config.sample
    if unit.config.protocol == "release" and not prompts.chat:
        prompts.template += " "  # the release samples after one space more than it trains after
    with inference(unit, base_path(unit)) as found:

        def work(chunk: list[Problem], start: int) -> list[dict]:
            texts = generate(
                found.model,
                prompts.tokenizer,
                [prompts.encode_prompt(problem.prompt) for problem in chunk],
                prompts.end_tokens,
                max_new_tokens=settings.max_new_tokens,
                seed=unit.seed * 1_000_003 + start,
                num_return_sequences=settings.num_return_sequences,
                temperature=settings.temperature,
                top_p=settings.top_p,
                sharded=found.sharded,
            )
            return [_judged(unit, problem, held) for problem, held in zip(chunk, texts, strict=True)]

        rows = yield from by_chunks(unit.folder / "responses.jsonl", problems, settings.batch_size, "problem", work)
    return len(rows) * settings.num_return_sequences


def _judged(unit: Unit, problem: Problem, texts: list[str]) -> dict:
    cut = [_cut(text, unit.config.sample.stop) for text in texts]
    return _row(problem, [(text, is_correct(text, problem.answer, unit.config.data.scorer)) for text in cut])


def _given(problem: Problem) -> dict:
    return _row(problem, [(option, number == 0) for number, option in enumerate(problem.options)])


def _row(problem: Problem, responses: list[tuple[str, bool]]) -> dict:
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "solution": problem.solution,
        "answer": problem.answer,
        "responses": [{"text": text, "correct": correct} for text, correct in responses],
    }


def _cut(text: str, stops: list[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].rstrip()
