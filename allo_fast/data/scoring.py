"""Is a response right, and which is preferred.

The final answer is what follows the last `The answer is`. Responses that were scored are {logp, tokens, correct}: the
sum of the tokens' log-probabilities, their number, and whether it is a right one; ref_logp is the base model's sum.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, product

from allo_fast.data.equivalence import is_equivalent
from allo_fast.data.verifier import Judge, is_own, own_judge, reward_model_of
from allo_fast.errors import UserError

SCORERS = ("strict", "release")  # of every evaluation
REWARD, WINS = "reward", "reward_model"  # of a response by a reward model, and the share of wins that it makes expected
_AROUND = " ,;:!?*_`'\"$\u201c\u201d\u2018\u2019"
_MARKER = re.compile(r"the answer is\s*:?", re.IGNORECASE)


def is_correct(response: str, answer: str, scorer: str = "strict") -> bool:
    """strict: case, surrounding punctuation and markdown do not matter, numbers compare as numbers, to the last digit.

    math: also what math-verify finds equal to a gold answer with digits or LaTeX, to six digits: the final answer is
    then the line after the marker or, without one, what LaTeX's last boxed{} holds.
    release: the published code's rule, kept to measure the difference: an exact lower-cased match with a gold answer
    that is not lower-cased, so that "The answer is beads." is wrong for "beads".
    """
    if scorer == "release":
        return "The answer is" in response and response.split("The answer is")[-1].strip().lower() == answer.strip()
    tail = _MARKER.split(response)
    if len(tail) > 1 and _normalized(tail[-1]) == _normalized(answer):
        return True
    if scorer != "math" or not re.search(r"[\d\\]", answer):
        return False
    said = _first_line(tail[-1]) if len(tail) > 1 else _boxed(response)
    return said is not None and is_equivalent(said, answer)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """What a model said before the first of these (`sample.stop`): its response, or its answer to a test problem."""
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].rstrip()


def final_answer(response: str) -> str | None:
    """As `strict` compares it, or what is in the last boxed{}; None where there is none."""
    tail = _MARKER.split(response)
    return _normalized(tail[-1]) if len(tail) > 1 else _boxed(response)


def _boxed(response: str) -> str | None:
    """Up to the brace that closes it."""
    _, found, rest = response.rpartition("\\boxed{")
    depths = accumulate(1 if char == "{" else -1 if char == "}" else 0 for char in rest)
    end = next((place for place, depth in enumerate(depths) if depth < 0), None)
    return rest[:end] if found and end is not None else None


def judge_of(scorer: str) -> Judge:
    """Of a response and its row of `encode_problems`: by `is_correct`, or by a function of the user's own."""
    if is_own(scorer):
        return lambda response, row: _own(scorer, response, row)
    return lambda response, row: is_correct(response, row["answer"], scorer)


def labels(scores: Sequence[float], wrong: float = 0.0, right: float = 1.0) -> list[bool | None]:
    """Whether each response to one problem is a right one: True if its score is `right`, or the highest of several;
    False if it is `wrong`, or the lowest; None for those between."""
    low, high = min(scores, default=wrong), max(scores, default=right)
    return [
        True if score == right or low < score == high else False if score == wrong or score == low < high else None
        for score in scores
    ]


def _own(scorer: str, response: str, row: dict) -> float:
    try:
        return own_judge(scorer)(response, row["fields"])
    except UserError as error:
        raise UserError(f"{row['id']}: {error}") from error


def scorer_name(scorer: str) -> str:
    """Under which predictions have what it says: of a function of the user's `name()`, wherever its file lies."""
    if reward_model_of(scorer):
        return WINS
    return f"{scorer.rpartition(':')[2]}()" if is_own(scorer) else scorer


def scorers_with(scorer: str) -> tuple[str, ...]:
    """The names of those by which evaluation judges."""
    alone = is_own(scorer) or reward_model_of(scorer)
    return (scorer_name(scorer),) if alone else tuple(dict.fromkeys([*SCORERS, scorer]))


def judges_with(scorer: str) -> dict[str, Judge]:
    """By these names."""
    return {scorer_name(scorer): judge_of(scorer)} if is_own(scorer) else {n: judge_of(n) for n in scorers_with(scorer)}


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _bare(text: str) -> str:
    """Without what stands around it, however deep: of "(**beads**.)" beads. A full stop before it is a decimal point;
    brackets go where both belong together, or one to nothing: [1, 2) stays."""
    before = None
    while text != before:
        before, text = text, text.strip(_AROUND).rstrip("." + _AROUND)
        opened, closed = (sum(map(text.count, brackets)) for brackets in ("([", ")]"))
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        elif opened > closed and text[0] in "([":
            text = text[1:]
        elif closed > opened and text[-1] in ")]":
            text = text[:-1]
    return text


def _normalized(text: str) -> str:
    line = re.sub(r"\s+", " ", _first_line(text)).strip().casefold()
    text = _bare(line) or line
    number = re.fullmatch(r"([-+]?)\$?([1-9]\d{0,2}(?:,\d{3})+|\d*)(?:\.(\d*))?%?", text)
    if not number or not (number[2] or number[3]):
        return text
    whole, fraction = (re.sub(r"\d", lambda digit: str(int(digit[0])), part or "") for part in number.group(2, 3))
    size = f"{whole.replace(',', '').lstrip('0') or '0'}.{fraction.rstrip('0')}"
    return "-" * (number[1] == "-" and size != "0.") + size


def best_response(scores: Sequence[float], responses: Sequence[dict]) -> int:
    """The index of the highest score; of equal ones a wrong response's, so that a tie is never right."""
    return max(range(len(scores)), key=lambda index: (scores[index], not responses[index]["correct"]))


def is_tie(scores: Sequence[float], responses: Sequence[dict]) -> bool:
    """Whether right and wrong responses share the highest score."""
    return len({row["correct"] for score, row in zip(scores, responses, strict=True) if score == max(scores)}) > 1


def pair_margins(responses: Sequence[dict], beta: float | None) -> dict[str, list[float]]:
    """Of each pair, every right response with every wrong one, the difference of their scores, by score:

    rewards: the implicit reward beta (logp - ref_logp) of arXiv 2305.18290, where there is a ref_logp; logps: logp;
    logps_per_token: logp / tokens. The right one is preferred where the difference is above 0, so that a tie is wrong.
    """
    scores = {"logps": lambda row: row["logp"], "logps_per_token": lambda row: row["logp"] / row["tokens"]}
    if "ref_logp" in responses[0]:
        scores = {"rewards": lambda row: beta * (row["logp"] - row["ref_logp"]), **scores}
    pairs = [pair for pair in product(responses, responses) if pair[0]["correct"] and not pair[1]["correct"]]
    return {name: [score(chosen) - score(rejected) for chosen, rejected in pairs] for name, score in scores.items()}
