"""Whose responses a judge prefers: a language model behind a server of OpenAI's API. `allo-fast judge A B OUT`.

Every question is asked twice, with the responses in both orders, since judges favour a place. alpaca_eval: one letter,
as of AlpacaEval's judge (arXiv 2404.04475; lengths are said, and not corrected for); arena_hard: the judge answers
first, then compares by one of five labels, as Arena-Hard's (arXiv 2406.11939). The wording is this project's.
"""

import hashlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from allo_fast.config import SampleConfig, UserError
from allo_fast.config_file import validated
from allo_fast.data.intervals import accuracy_interval
from allo_fast.data.prompts import as_text
from allo_fast.data.sources import lacks, read_rows
from allo_fast.journal import Journal
from allo_fast.model.server import Server
from allo_fast.report.summary import percent, shown_interval
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.unit import Progress
from allo_fast.stages.evaluate import PREDICTIONS
from allo_fast.stages.problems import PROBLEMS

MAX_TOKENS = 2048  # of a verdict, by a judge that answers first
_CHUNK = 16  # questions between two writes
Responses = dict[str, str]  # by instruction


@dataclass(frozen=True)
class Style:
    """question: of {instruction}, {first} and {second}. verdict: what is found last. scores: of the first response."""

    system: str
    question: str
    verdict: str
    scores: Mapping[str, float]


def _asked(first: str, second: str, close: str) -> str:
    heads = ("Instruction", f"Response {first}", f"Response {second}")
    fields = ("{instruction}", "{first}", "{second}")
    parts = [f"# {head}\n\n{field}" for head, field in zip(heads, fields, strict=True)]
    return "\n\n".join([*parts, f"# Your verdict\n\n{close}"])


STYLES = {
    "alpaca_eval": Style(
        "You compare the answers of two assistants, m and M, and are impartial. You prefer the one that a careful "
        "human reader would prefer.",
        _asked("m", "M", "Which response is better? Reply with one letter and nothing else: m or M."),
        r"(?:\A|\n|:|\bis|\bresponse)\W*([mM])\W*\Z",  # at its end: "I'm sorry" is no verdict
        {"m": 1.0, "M": 0.0},
    ),
    "arena_hard": Style(
        "You are an impartial judge of two assistants, A and B. First write your own answer to the instruction. Then "
        "compare both responses with it: name mistakes, and whether each is helpful, relevant and concise. Close with "
        "one label: [[A>>B]] if A is much better, [[A>B]] if it is better, [[A=B]] if both are as good, [[B>A]] or "
        "[[B>>A]] if B is.",
        _asked("A", "B", "Judge, and close with one label."),
        r"(?<=\[\[)(?:A>>?B|A=B|B>>?A)(?=\]\])",
        {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0},
    ),
}


def verdict(style: Style, said: str) -> float | None:
    """Of the first response: 1 better, 0.5 as good, 0 worse; None where the judge does not say."""
    found = re.findall(style.verdict, said)
    return style.scores[found[-1]] if found else None


def read_responses(path: Path) -> Responses:
    """Of an evaluation in a run's folder, or rows {instruction, output} as AlpacaEval's files. Raises UserError."""
    if (path / PREDICTIONS).is_file():
        problems, answers = read_jsonl(path / PROBLEMS), read_jsonl(path / PREDICTIONS)
        if "response" not in answers[0] or "responses" in answers[0]:
            raise UserError(f"{path}: its models answered not with one text of their own")
        return {as_text(p["prompt"]): row["response"] for p, row in zip(problems, answers, strict=True)}
    found = {}
    for name, row in read_rows(str(path)):
        fields = row()
        for field in ("instruction", "output"):
            if not isinstance(fields.get(field), str):
                raise UserError(f"{path}: {name}: {lacks(fields, field)}")
        found[fields["instruction"]] = fields["output"]
    return found


def asking(url: str, model: str, api_key_env: str | None = None) -> SampleConfig:
    """How a server is asked for verdicts. Raises UserError for what is no URL."""
    server = {"url": url, "model": model, "api_key_env": api_key_env}
    given = {"engine": "server", "num_return_sequences": 1, "top_p": 1.0, "max_new_tokens": MAX_TOKENS}
    return validated(SampleConfig, given | {"server": server})


def judge(
    first: Responses, second: Responses, server: SampleConfig, style_name: str, out: Path
) -> Generator[Progress, None, dict]:
    """How often the judge prefers `first`, with what that stands on. out: JSON lines, a verdict each; what is there
    already is not asked again. Raises UserError where the two answer other instructions, and where `out` holds anything
    else.
    """
    if first.keys() != second.keys():
        both = len(first.keys() & second.keys())
        raise UserError(f"they answer other instructions: {len(first)} and {len(second)}, of which {both} are the same")
    style, questions = STYLES[style_name], [(text, order) for text in first for order in (0, 1)]
    asked = json.dumps([style_name, server.server.model, [*first.items()], [*second.items()]])
    mark = hashlib.sha256(asked.encode()).hexdigest()
    _check_own(out, mark)
    journal = Journal(out, mark)
    client = Server(server, "")
    client.body["temperature"] = 0.0
    for start in range(journal.count, len(questions), _CHUNK):
        chunk = questions[start : start + _CHUNK]
        requests = [_request(style, text, *((first, second), (second, first))[order]) for text, order in chunk]
        answers = client.respond(requests, None, 0, start)
        said = ["".join(answer.texts) for answer in answers]
        journal.append(
            {"instruction": text, "order": order, "said": words, "score": verdict(style, words), "asked": mark}
            for (text, order), words in zip(chunk, said, strict=True)
        )
        yield Progress(start + len(chunk), len(questions), "verdict")
    journal.finish()
    return {**wins(read_jsonl(out)), "characters": [fmean(map(len, side.values())) for side in (first, second)]}


def _check_own(out: Path, mark: str) -> None:
    """Raises UserError where something else lies than what was begun with these responses, by this judge."""
    if not out.exists() or not out.stat().st_size:
        return
    with suppress(ValueError, TypeError, KeyError):
        with out.open("rb") as file:
            if json.loads(file.readline())["asked"] == mark:
                return
    raise UserError(f"{out}: holds something else than verdicts on these responses by this judge; name another file")


def _request(style: Style, instruction: str, first: Responses, second: Responses) -> dict:
    parts = {"instruction": instruction, "first": first[instruction], "second": second[instruction]}
    question = re.sub(r"\{(instruction|first|second)\}", lambda match: parts[match[1]], style.question)
    return {"messages": [{"role": "system", "content": style.system}, {"role": "user", "content": question}]}


def wins(rows: Sequence[dict]) -> dict:
    """Of verdicts, those of one question next to each other: {wins: mean over questions of the first's score, ci95,
    questions, agree: the share of which both orders say the same, unclear: verdicts that say nothing}.
    """
    scores = [
        [row["score"], None if other["score"] is None else 1 - other["score"]]
        for row, other in zip(*[iter(rows)] * 2, strict=True)
    ]
    clear = [[score for score in pair if score is not None] for pair in scores]
    if not any(clear):
        raise UserError("no verdict is clear; the judge does not follow the question")
    mean, interval = accuracy_interval([[fmean(pair) for pair in clear if pair]])
    both = [pair for pair in clear if len(pair) == 2]
    agree = fmean(a == b for a, b in both) if both else None
    unclear = sum(score is None for pair in scores for score in pair)
    return {"wins": mean, "ci95": interval, "questions": sum(map(bool, clear)), "agree": agree, "unclear": unclear}


def said_of(result: dict) -> str:
    first, second = result["characters"]
    agree = "" if result["agree"] is None else f"; both orders agree on {percent(result['agree'])}"
    return (
        f"the first wins {percent(result['wins'])} ({shown_interval('accuracy', result['ci95'])}) of "
        f"{result['questions']} questions{agree}; {result['unclear']} verdicts are unclear; characters {first:.0f} "
        f"against {second:.0f}"
    )
