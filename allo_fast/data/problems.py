"""Rows as problems with their responses, in every format that is read; rows that cannot be used are set aside."""

import hashlib
import json
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import BinaryIO

import numpy as np

from allo_fast.config import UserError
from allo_fast.data.conversations import Messages, text
from allo_fast.data.preferences import Turn, distinct, read_preference, without_end
from allo_fast.data.sources import UnusableRow, lacks, parse_json, read_rows
from allo_fast.data.verifier import is_own, reward_model_of


@dataclass(frozen=True)
class Problem:
    id: str  # where it came from: file:row
    prompt: str | Messages  # the question, or chat messages
    solution: str  # the gold response, worked steps included
    answer: str  # the gold final answer
    right: tuple[Turn, ...] = ()  # given responses; none where responses are sampled
    wrong: tuple[Turn, ...] = ()
    tools: list[dict] | None = None
    plain_prompt: str | None = None  # what a model without a chat template continues, where it is not `prompt`
    fields: dict | None = None  # the row itself, for a judge of the user's own
    loss_weight: float = 1.0  # of its pairs
    # Of the one right response and the one wrong one, where they are given: a number for each token.
    right_weights: list[float] | None = None
    wrong_weights: list[float] | None = None


@dataclass(frozen=True)
class Quarantined:
    id: str
    reason: str


def read_problems(source: str, format: str, scorer: str = "strict") -> Iterator[Problem | Quarantined]:
    """The usable problems of a source, one by one, and between them the rows that are set aside with the reason.

    source: see `read_rows`. format: problems {problem, solution, answer}; gsm8k {question, answer with "#### N"};
    release, the published code's, {input, output with "The answer is ..."};
    multiple_choice {problem with an "Options:" list, answer} or {question | question_stem, choices {text, label},
    answerKey}; preference, see `read_preference`: single judged completions come behind all others, those of one prompt
    as one problem. `loss_weight` of any row weighs its pairs, lists `chosen_token_weights` and `rejected_token_weights`
    of a preference the tokens of its two responses. scorer: see `DataConfig`; a function of the user's sees the rows,
    and where it judges, or a reward model, those of `problems` need neither solution nor answer. Raises UserError when
    the source or, at its end, every row of it is unusable.
    """
    read = (_read(row_id, row, format, scorer) for row_id, row in read_rows(source))
    aside, usable = "", False
    for outcome in _grouped(read) if format == "preference" else read:
        usable = usable or isinstance(outcome, Problem)
        if not usable and not aside:
            aside = f"; {outcome.id}: {outcome.reason}"
        yield outcome
    if not usable:
        raise UserError(f"{source}: no usable row{aside}")


def _read(row_id: str, row: Callable[[], dict], format: str, scorer: str) -> Problem | Quarantined:
    needs_none = is_own(scorer) or reward_model_of(scorer)
    read = _unsolved if format == "problems" and needs_none else _FORMATS[format]
    try:
        fields = _as_json(row()) if is_own(scorer) else row()
        problem = replace(read(row_id, fields), fields=fields if is_own(scorer) else None)
        weight = _cell(fields, "loss_weight")
        return problem if weight is None else replace(problem, loss_weight=_loss_weight(weight))
    except UnusableRow as error:
        return Quarantined(row_id, str(error))


def _as_json(row: dict) -> dict:
    """As a judge will see it when it has been written. Raises UnusableRow."""
    try:
        return json.loads(json.dumps(row))
    except (TypeError, ValueError) as error:
        raise UnusableRow(
            f"a field that JSON does not know, which data.scorer's function would need: {error}"
        ) from None


def _field(row: dict, name: str) -> str:
    if name not in row:
        raise lacks(row, name)
    return text(row[name], name)


def _problem(row_id: str, row: dict) -> Problem:
    return Problem(row_id, _field(row, "problem"), _field(row, "solution"), _field(row, "answer").strip())


def _unsolved(row_id: str, row: dict) -> Problem:
    given = {name: row[name] for name in ("solution", "answer") if isinstance(row.get(name), str)}
    solution, answer = (given.get(name, "") for name in ("solution", "answer"))
    return Problem(row_id, _field(row, "problem"), solution, answer.strip())


def _gsm8k(row_id: str, row: dict) -> Problem:
    steps, marker, answer = _field(row, "answer").rpartition("####")
    if not marker or not answer.strip():
        raise UnusableRow("answer: expected worked steps and a last line '#### N'")
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    return Problem(row_id, _field(row, "question"), f"{steps}\nThe answer is {answer.strip()}", answer.strip())


def _release(row_id: str, row: dict) -> Problem:
    _, marker, answer = _field(row, "output").rpartition("The answer is")
    if not marker or not answer.strip():
        raise UnusableRow("output: expected a solution that ends in 'The answer is ...'")
    return Problem(row_id, _field(row, "input"), row["output"], answer.strip())


def _multiple_choice(row_id: str, row: dict) -> Problem:
    if "choices" in row:
        texts, labels = (_texts(row["choices"], name) for name in ("text", "label"))
        answer = dict(zip(labels, texts, strict=False)).get(_field(row, "answerKey"), "")
        stem = _field(row, "question_stem" if "question_stem" in row else "question")
        question, solution = "\n".join([stem, "Options:", *texts]), None
    else:
        question, answer, solution = _field(row, "problem"), _field(row, "answer"), row.get("solution")
        texts = _listed_options(question)
        solution = solution if solution is None else text(solution, "solution")
    gold = [option for option in texts if option.casefold() == answer.strip().casefold()]
    if len(gold) != 1 or len(set(texts)) != len(texts) or len(texts) < 2:
        raise UnusableRow(f"answer: expected exactly one of the options {texts}, got {answer!r}")
    right, *wrong = (f"The answer is {option}" for option in [gold[0], *(o for o in texts if o != gold[0])])
    return Problem(row_id, question, solution or right, gold[0], (right,), tuple(wrong))


def _listed_options(question: str) -> list[str]:
    """The lines behind the last line `Options:`."""
    *_, behind = re.split(r"^Options:[ \t]*\r?$", question, flags=re.MULTILINE)
    options = [line.strip() for line in behind.strip().splitlines()]
    if behind == question or not all(options):
        raise UnusableRow("problem: expected a line 'Options:', and behind it one option a line and nothing else")
    return options


def _texts(choices: object, name: str) -> list[str]:
    texts = choices.get(name) if isinstance(choices, dict) else None
    if not isinstance(texts, list) or not all(isinstance(option, str) for option in texts):
        raise UnusableRow(f"choices.{name}: expected a list of texts, got {texts!r}")
    return [text(option, f"choices.{name}") for option in texts]


def _preference(row_id: str, row: dict) -> Problem:
    read = read_preference(row)
    gold = next((turn for turn in read.right if isinstance(turn, str)), "")
    weights = {
        f"{side}_weights": _weights(row, f"{name}_token_weights", turns)
        for side, name, turns in (("right", "chosen", read.right), ("wrong", "rejected", read.wrong))
    }
    return Problem(row_id, read.prompt, gold, gold, read.right, read.wrong, read.tools, read.plain_prompt, **weights)


def _weights(row: dict, name: str, turns: tuple[Turn, ...]) -> list[float] | None:
    if other := next((other for other in _NO_WEIGHTS if row.get(other) not in (None, "")), None):
        raise UnusableRow(f"{other}: not read; weights are loss_weight, chosen_token_weights, rejected_token_weights")
    if (weights := _cell(row, name)) is None:
        return None
    if len(turns) != 1:
        raise UnusableRow(f"{name}: expected one response, got {len(turns)}; write a row for each pair")
    if not isinstance(weights, list) or not all(map(_is_weight, weights)):
        raise UnusableRow(f"{name}: expected a list of numbers from 0 to {_HEAVIEST}, got {row[name]!r:.80}")
    return weights


def _loss_weight(weight: object) -> float:
    if not _is_weight(weight):
        raise UnusableRow(f"loss_weight: expected a number from 0 to {_HEAVIEST}, got {weight!r:.80}")
    return weight


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _HEAVIEST


def _cell(row: dict, name: str) -> object:
    """A value, also from a table's cell, which is a text; None where there is none."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except UnusableRow:
        return value


def digest_of_prompt(problem: Problem) -> bytes:
    """32 bytes, the same for problems that ask the same: a text is what a user says."""
    prompt = problem.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return hashlib.sha256(json.dumps([messages, problem.tools], sort_keys=True).encode()).digest()


def _grouped(read: Iterable[Problem | Quarantined]) -> Iterator[Problem | Quarantined]:
    """Judged completions of one prompt as one problem, behind the others, in the order of their first ones.

    Until all are read they wait in a nameless file; in memory is which belong together.
    """
    groups: dict[bytes, int] = {}  # by a digest of the prompt
    numbers, places = array("i"), array("q")  # of each completion: of its group, and where in the file it lies
    with tempfile.TemporaryFile() as waiting:
        for outcome in read:
            if isinstance(outcome, Quarantined) or (outcome.right and outcome.wrong):
                yield outcome
                continue
            numbers.append(groups.setdefault(digest_of_prompt(outcome), len(groups)))
            places.append(waiting.tell())
            waiting.write(json.dumps(vars(outcome)).encode() + b"\n")
        for _, members in groupby(np.argsort(numbers, kind="stable"), key=numbers.__getitem__):
            problem = _merged([_waited(waiting, places[member]) for member in members])
            if isinstance(problem, Quarantined):
                yield problem
                continue
            missing = "wrong" if problem.right else "right"
            both = problem.right and problem.wrong
            yield problem if both else Quarantined(problem.id, f"its prompt has no {missing} completion beside it")


def _waited(file: BinaryIO, place: int) -> Problem:
    file.seek(place)
    row = json.loads(file.readline())
    return Problem(**row | {side: tuple(row[side]) for side in _SIDES})


def _merged(group: list[Problem]) -> Problem | Quarantined:
    if any((problem.loss_weight, problem.right_weights, problem.wrong_weights) != (1, None, None) for problem in group):
        return Quarantined(group[0].id, "weights are of pairs; its completions are judged one by one")
    right, wrong = (distinct(turn for problem in group for turn in getattr(problem, side)) for side in _SIDES)
    better = [without_end(turn) for turn in right]
    wrong = tuple(turn for turn in wrong if without_end(turn) not in better)
    gold = next((turn for turn in right if isinstance(turn, str)), "")
    return replace(group[0], right=right, wrong=wrong, solution=gold, answer=gold)


_SIDES = ("right", "wrong")
_HEAVIEST = 1000
_NO_WEIGHTS = ("weight", "weights", "sample_weight", "pair_weight", "loss_weights", "token_weights")
_NO_WEIGHTS += ("chosen_weights", "rejected_weights")
_FORMATS = {"problems": _problem, "gsm8k": _gsm8k, "release": _release}
_FORMATS |= {"multiple_choice": _multiple_choice, "preference": _preference}
