"""Is a response right? The final answer is what follows the last `The answer is`."""

import re
from collections.abc import Sequence
from statistics import NormalDist, fmean

SCORERS = ("strict", "release")
_Z = NormalDist().inv_cdf(0.975)
_MARKER = re.compile(r"the answer is\s*:?", re.IGNORECASE)


def is_correct(response: str, answer: str, scorer: str = "strict") -> bool:
    """strict: case, surrounding punctuation and markdown do not matter, numbers compare as numbers.

    release: the published code's rule, kept to measure the difference: an exact lower-cased match with a gold answer
    that is not lower-cased, so that "The answer is beads." is wrong for "beads".
    """
    if scorer == "release":
        return "The answer is" in response and response.split("The answer is")[-1].strip().lower() == answer.strip()
    tail = _MARKER.split(response)
    return len(tail) > 1 and _normalized(tail[-1]) == _normalized(answer)


def _normalized(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "")
    text = re.sub(r"\s+", " ", line).strip(" .,;:!?*_`'\"$()[]").casefold()
    number = re.fullmatch(r"[-+]?\$?(\d[\d,]*(?:\.\d+)?)%?", text)
    return f"{float(text.replace(',', '').replace('$', '').rstrip('%')):g}" if number else text


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, tuple[float, float]]:
    """Accuracy and its 95 % Wilson interval; correct[s][i]: did seed s answer problem i.

    Answers of several seeds to one problem are not independent: the interval uses the effective sample size at which
    a binomial has the variance seen between problems (clustered by problem), at most one a response.
    """
    per_problem = _per_problem(correct)
    mean, variance = _mean_and_variance(per_problem)
    count = len(per_problem)
    effective = min(mean * (1 - mean) / variance, count * len(correct)) if variance else count
    centre, scale = mean + _Z * _Z / (2 * effective), 1 + _Z * _Z / effective
    half = _Z * (mean * (1 - mean) / effective + _Z * _Z / (4 * effective * effective)) ** 0.5
    return mean, ((centre - half) / scale, (centre + half) / scale)


def difference_interval(
    better: Sequence[Sequence[bool]], worse: Sequence[Sequence[bool]]
) -> tuple[float, tuple[float, float]]:
    """Difference of two accuracies on the same problems and its 95 % interval, paired and clustered by problem."""
    pairs = zip(_per_problem(better), _per_problem(worse), strict=True)
    mean, variance = _mean_and_variance([a - b for a, b in pairs])
    return mean, (mean - _Z * variance**0.5, mean + _Z * variance**0.5)


def _per_problem(correct: Sequence[Sequence[bool]]) -> list[float]:
    return [fmean(answers) for answers in zip(*correct, strict=True)]


def _mean_and_variance(values: list[float]) -> tuple[float, float]:
    """Of their mean."""
    mean = fmean(values)
    return mean, sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1) / len(values)
