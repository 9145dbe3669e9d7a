"""Is a response right? The final answer is what follows the last `The answer is`."""

import re
from collections.abc import Sequence
from decimal import Decimal
from statistics import NormalDist, fmean, variance

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
    text = re.sub(r"\s+", " ", line).strip(" ,;:!?*_`'\"$()[]").rstrip(" .*_").casefold()
    number = re.fullmatch(r"([-+]?)\$?(\d[\d,]*\.?\d*|\.\d+)%?", text)
    return f"{Decimal(number[1] + number[2].replace(',', '')).normalize():f}" if number else text


def accuracy_interval(correct: Sequence[Sequence[bool]]) -> tuple[float, tuple[float, float]]:
    """Accuracy and its 95 % Wilson interval; correct[s][i]: did seed s answer problem i.

    Answers of several seeds to one problem are not independent, and seeds differ: the interval uses the effective
    sample size at which a binomial has the variance between problems (clustered) plus that between seeds.
    """
    mean, spread = _mean_and_variance(correct)
    count = len(correct[0])
    effective = min(mean * (1 - mean) / spread, count * len(correct)) if spread and 0 < mean < 1 else count
    centre, scale = mean + _Z * _Z / (2 * effective), 1 + _Z * _Z / effective
    half = _Z * (mean * (1 - mean) / effective + _Z * _Z / (4 * effective * effective)) ** 0.5
    # At 0 and 1 one bound is the mean itself, which rounding may miss.
    return mean, (min(mean, (centre - half) / scale), max(mean, (centre + half) / scale))


def difference_interval(
    better: Sequence[Sequence[bool]], worse: Sequence[Sequence[bool]]
) -> tuple[float, tuple[float, float]]:
    """Difference of two accuracies on the same problems and its 95 % interval, paired and clustered by problem.

    A model without seeds (one row) is paired with every seed of the other. Two pseudo-problems, one won and one lost
    by half (Agresti & Min 2005), keep the interval open where the models never differ.
    """
    rows = max(len(better), len(worse))
    pairs = zip((better * rows)[:rows], (worse * rows)[:rows], strict=True)
    differences = [[int(a) - int(b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    mean, _ = _mean_and_variance(differences)
    adjusted, spread = _mean_and_variance([[*row, 0.5**0.5, -(0.5**0.5)] for row in differences])
    return mean, (adjusted - _Z * spread**0.5, adjusted + _Z * spread**0.5)


def _mean_and_variance(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the mean over seeds and problems: the variance between problems plus that between seeds."""
    per_problem, per_seed = [fmean(column) for column in zip(*values, strict=True)], [fmean(row) for row in values]
    parts = [variance(x) / len(x) for x in (per_problem, per_seed) if len(x) > 1]
    return fmean(per_problem), sum(parts)
