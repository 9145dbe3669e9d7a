"""Is a response right, and which is preferred; means and their intervals.

The final answer is what follows the last `The answer is`. Responses that were scored are {logp, tokens, correct}: the
sum of the tokens' log-probabilities, their number, and whether it is a right one; ref_logp is the base model's sum.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, product
from math import fsum
from statistics import NormalDist, fmean, variance

from allo_fast.data.equivalence import is_equivalent
from allo_fast.data.verifier import Judge, is_own, own_judge, reward_model_of
from allo_fast.errors import UserError

SCORERS = ("strict", "release")  # of every evaluation
REWARD, WINS = "reward", "reward_model"  # of a response by a reward model, and the share of wins that it makes expected
_Z = NormalDist().inv_cdf(0.975)
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


def _normalized(text: str) -> str:
    text = re.sub(r"\s+", " ", _first_line(text)).strip(" ,;:!?*_`'\"$()[]").rstrip(" .*_").casefold()
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


def problem_values(pairs: Sequence[Sequence[float]]) -> list[float]:
    """One number a problem, from one number for each of its pairs: v_i = m + (C / N) sum_j (x_ij - m).

    C problems have N pairs, m is the mean over pairs. The v_i have the mean m, and their variance / C is the variance
    of m clustered by problem, 1 / N^2 C / (C - 1) sum_i (sum_j (x_ij - m))^2. With one pair each, v_i is its number.
    """
    count = sum(map(len, pairs))
    mean = fsum(x for xs in pairs for x in xs) / count
    return [mean + len(pairs) / count * fsum(x - mean for x in xs) for xs in pairs]


def mean_interval(values: Sequence[Sequence[float]]) -> tuple[float, tuple[float, float] | None]:
    """Mean of values[s][i], of problem i by seed s, and its 95 % interval: mean +- 1.96 s.

    s^2 is the variance between problems (each the mean of its seeds) / problems, plus that between seeds / seeds. One
    problem has no interval: None.
    """
    mean, spread = _mean_and_variance(values)
    half = _Z * spread**0.5
    return mean, (mean - half, mean + half) if len(values[0]) > 1 else None


def accuracy_interval(
    correct: Sequence[Sequence[float]], answers: int | None = None
) -> tuple[float, tuple[float, float]]:
    """Accuracy and its 95 % Wilson interval; correct[s][i]: did seed s answer problem i, or its `problem_values`.

    answers: of one seed to all problems; None: one a problem. Answers to one problem are not independent, and seeds
    differ: the interval uses the effective sample size at which a binomial has the variance between problems
    (clustered) plus that between seeds. With two or three seeds that differ by more than chance it is too narrow.
    """
    mean, spread = _mean_and_variance(correct)
    count = answers or len(correct[0])
    clusters = len(correct[0])  # as many as differ from each other at most, where the answers show no spread
    effective = min(mean * (1 - mean) / spread, count * len(correct)) if spread and 0 < mean < 1 else clusters
    centre, scale = mean + _Z * _Z / (2 * effective), 1 + _Z * _Z / effective
    half = _Z * (mean * (1 - mean) / effective + _Z * _Z / (4 * effective * effective)) ** 0.5
    # At 0 and 1 one bound is the mean itself, which rounding may miss.
    return mean, (min(mean, (centre - half) / scale), max(mean, (centre + half) / scale))


def difference_interval(
    better: Sequence[Sequence[float]], worse: Sequence[Sequence[float]]
) -> tuple[float, tuple[float, float]]:
    """Difference of two accuracies on the same problems and its 95 % interval, paired and clustered by problem.

    A model without seeds (one row) is paired with every seed of the other. Two pseudo-problems, one won and one lost
    by half (Agresti & Min 2005), keep the interval open where the models never differ.
    """
    rows = max(len(better), len(worse))
    pairs = zip((better * rows)[:rows], (worse * rows)[:rows], strict=True)
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    mean, _ = _mean_and_variance(differences)
    adjusted, spread = _mean_and_variance([[*row, 0.5**0.5, -(0.5**0.5)] for row in differences])
    half = _Z * spread**0.5
    return mean, (max(-1.0, adjusted - half), min(1.0, adjusted + half))


def _mean_and_variance(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the mean over seeds and problems: the variance between problems plus that between seeds."""
    per_problem, per_seed = [fmean(column) for column in zip(*values, strict=True)], [fmean(row) for row in values]
    parts = [variance(x) / len(x) for x in (per_problem, per_seed) if len(x) > 1]
    return fmean(per_problem), sum(parts)
