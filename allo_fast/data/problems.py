"""Problems from JSON lines, a hub data set or the arithmetic generator; rows that cannot be used are set aside."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from allo_fast.config import UserError
from allo_fast.data.arithmetic import arithmetic_row


@dataclass(frozen=True)
class Problem:
    id: str  # where it came from: file:row
    prompt: str | list[dict]  # the question, or chat messages
    solution: str  # the gold response, worked steps included
    answer: str  # the gold final answer
    options: tuple[str, ...] = ()  # given responses, the right one first; empty where responses are sampled


@dataclass(frozen=True)
class Quarantined:
    id: str
    reason: str


def read_problems(source: str, format: str) -> tuple[list[Problem], list[Quarantined]]:
    """All usable problems of a source, and the rows that were set aside with the reason.

    source: file.jsonl, org/name:config:split (Hugging Face hub) or arithmetic:train, each with an optional [i:j].
    format: problems {problem, solution, answer}; gsm8k {question, answer with "#### N"}; multiple_choice {problem with
    an "Options:" list, answer} or {question | question_stem, choices {text, label}, answerKey}; preference {prompt,
    chosen, rejected}, each a text or chat messages. Raises UserError when the source or every row of it is unusable.
    """
    problems, quarantined = [], []
    for row_id, row in _rows(source):
        try:
            problems.append(_FORMATS[format](row_id, row()))
        except UnusableRow as error:
            quarantined.append(Quarantined(row_id, str(error)))
    if not problems:
        raise UserError(f"{source}: no usable row" + (f"; {asdict(quarantined[0])}" if quarantined else ""))
    return problems, quarantined


def split_slice(source: str) -> tuple[str, int, int | None]:
    """ "file.jsonl[3:9]" -> ("file.jsonl", 3, 9)."""
    match = re.fullmatch(r"(.+?)(?:\[(\d*):(\d*)\])?", source, re.DOTALL)
    return match[1], int(match[2] or 0), int(match[3]) if match[3] else None


class UnusableRow(ValueError):
    """Why one row is set aside; never leaves this package."""


def _rows(source: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    name, start, stop = split_slice(source)
    if name in ("arithmetic:train", "arithmetic:test"):
        if stop is None:
            raise UserError(f"{source}: the generator is endless; name a slice like {name}[:500]")
        for index in range(start, stop):
            yield f"{name}:{index}", lambda index=index: arithmetic_row(name.split(":")[1], index)
    elif Path(name).suffix in (".jsonl", ".json") or Path(name).exists():
        yield from islice(_json_lines(Path(name)), start, stop)
    else:
        yield from islice(_hub_rows(name), start, stop)


def _json_lines(path: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path.name}:{number}", lambda line=line: _parse(line)


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # malformed JSON or not UTF-8
        raise UnusableRow(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UnusableRow(f"expected an object, got {type(row).__name__}")
    return row


def _hub_rows(name: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{name}: no such file; reading it from the hub needs `pip install allo-fast[hub]`") from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    if not split:
        raise UserError(f"{name}: expected org/name:config:split, as openai/gsm8k:main:train")
    try:
        rows = load_dataset(path, config, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not to be had from the hub: {str(error).splitlines()[0]}") from None
    for index, row in enumerate(rows):
        yield f"{name}:{index}", lambda row=row: row


def _field(row: dict, name: str) -> str:
    if name not in row:
        raise UnusableRow(f"no field {name!r}; it has {sorted(row)}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UnusableRow(f"{name}: expected a text, got {value!r}")
    return value


def _problem(row_id: str, row: dict) -> Problem:
    return Problem(row_id, _field(row, "problem"), _field(row, "solution"), _field(row, "answer").strip())


def _gsm8k(row_id: str, row: dict) -> Problem:
    steps, marker, answer = _field(row, "answer").rpartition("####")
    if not marker or not answer.strip():
        raise UnusableRow("answer: expected worked steps and a last line '#### N'")
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    return Problem(row_id, _field(row, "question"), f"{steps}\nThe answer is {answer.strip()}", answer.strip())


def _multiple_choice(row_id: str, row: dict) -> Problem:
    if "choices" in row:
        texts, labels = (_texts(row["choices"], name) for name in ("text", "label"))
        answer = dict(zip(labels, texts, strict=False)).get(_field(row, "answerKey"), "")
        stem = _field(row, "question_stem" if "question_stem" in row else "question")
        question, solution = "\n".join([stem, "Options:", *texts]), None
    else:
        question, answer, solution = _field(row, "problem"), _field(row, "answer"), row.get("solution")
        texts = [line.strip() for line in question.rpartition("\nOptions:\n")[2].splitlines()]
    gold = [text for text in texts if text.casefold() == answer.strip().casefold()]
    if len(gold) != 1 or len(set(texts)) != len(texts) or len(texts) < 2:
        raise UnusableRow(f"answer: expected exactly one of the options {texts}, got {answer!r}")
    right, *wrong = (f"The answer is {text}" for text in [gold[0], *(text for text in texts if text != gold[0])])
    return Problem(row_id, question, solution or right, gold[0], (right, *wrong))


def _texts(choices: object, name: str) -> list[str]:
    texts = choices.get(name) if isinstance(choices, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UnusableRow(f"choices.{name}: expected a list of texts, got {texts!r}")
    return texts


def _preference(row_id: str, row: dict) -> Problem:
    prompt = row.get("prompt")
    prompt = _messages(prompt, "prompt") if isinstance(prompt, list) else _field(row, "prompt")
    chosen, rejected = _last_message(row, "chosen"), _last_message(row, "rejected")
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are equal")
    return Problem(row_id, prompt, chosen, chosen, (chosen, rejected))


def _last_message(row: dict, name: str) -> str:
    """A response given as a text or as chat messages whose last one is the assistant's."""
    value = row.get(name)
    return _messages(value, name)[-1]["content"] if isinstance(value, list) else _field(row, name)


def _messages(value: list, name: str) -> list[dict]:
    for message in value or [None]:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) and message[key].strip() for key in ("role", "content")
        ):
            raise UnusableRow(f"{name}: expected chat messages with role and content, got {message!r}")
    return value


_FORMATS = {"problems": _problem, "gsm8k": _gsm8k, "multiple_choice": _multiple_choice, "preference": _preference}
