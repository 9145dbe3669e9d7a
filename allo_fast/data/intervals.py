"""How far a mean over problems and seeds, or a difference of two, may be chance: intervals of 95 %.

Values are of S seeds on P problems, [S, P]; of a model without seeds [1, P]. Problems and seeds are two crossed random
factors: an interval is for other problems and, where several seeds ran, other seeds than these.
"""

from collections.abc import Sequence
from math import fsum, inf, pi, tan

import numpy as np

Interval = tuple[float, float]
Values = Sequence[Sequence[float]] | np.ndarray


def mean_interval(values: Values) -> tuple[float, Interval | None]:
    """The mean, and mean +- t s; one problem says nothing of others: None."""
    mean, variance, t = spread(values)
    half = t * variance**0.5
    return mean, (mean - half, mean + half) if len(values[0]) > 1 else None


def accuracy_interval(correct: Values, answers: int | None = None) -> tuple[float, Interval]:
    """Accuracy and its Wilson interval; correct[s][i]: did seed s answer problem i, or its `problem_values`.

    answers: of one seed to all problems; None: one a problem. In Wilson's formula stand t, and the sample size at which
    a binomial has the variance that there is: answers to one problem are not independent, and seeds differ.
    """
    mean, variance, t = spread(correct)
    most = (answers or len(correct[0])) * len(correct)
    clusters = len(correct[0])  # as many as differ from each other at most, where the answers show no spread
    effective = min(mean * (1 - mean) / variance, most) if variance and 0 < mean < 1 else clusters
    centre, scale = mean + t * t / (2 * effective), 1 + t * t / effective
    half = t * (mean * (1 - mean) / effective + t * t / (4 * effective * effective)) ** 0.5
    # At 0 and 1 one bound is the mean itself, which rounding may miss.
    return mean, (min(mean, (centre - half) / scale), max(mean, (centre + half) / scale))


def difference_interval(better: Values, worse: Values) -> tuple[float, Interval]:
    """Difference of two accuracies on the same problems, paired by problem and seed.

    A model without seeds is paired with every seed of the other. Two pseudo-problems, one won and one lost by half
    (Agresti & Min 2005), keep the interval open where models rarely differ.
    """
    paired = np.asarray(better, float) - np.asarray(worse, float)
    pseudo = np.tile([0.5**0.5, -(0.5**0.5)], (len(paired), 1))
    middle, variance, t = spread(np.concatenate([paired, pseudo], axis=1))
    half = t * variance**0.5
    return float(paired.mean()), (max(-1.0, middle - half), min(1.0, middle + half))


def spread(values: Values) -> tuple[float, float, float]:
    """The mean of values [S, P], its variance, and Student's 97.5 % quantile for that.

    Var = (MS_seeds + MS_problems - MS_rest) / (S P), no less than of one factor alone, with Satterthwaite's degrees of
    freedom (Searle, Casella & McCulloch 1992): few seeds that differ by more than chance make an interval wide, as they
    should. One seed: Var = MS_problems / P.
    """
    values = np.asarray(values, float)
    (seeds, problems), mean = values.shape, values.mean()
    by_problem = seeds * values.mean(0).var(ddof=1) if problems > 1 else 0.0
    by_seed = problems * values.mean(1).var(ddof=1) if seeds > 1 else 0.0
    free = (seeds - 1) * (problems - 1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + mean
    of_rest = (rest**2).sum() / free if free else 0.0
    total = max(by_seed + by_problem - of_rest, by_seed, by_problem)
    parts = [(by_seed, seeds - 1), (by_problem, problems - 1), (of_rest, free)]
    squares = sum(part**2 / degrees for part, degrees in parts if degrees)
    return float(mean), float(total / (seeds * problems)), student(total**2 / squares if squares else inf)


def student(degrees: float) -> float:
    """Student's 97.5 % quantile: sqrt(n) tan(a), where of cos(x) ** (n - 1) on [0, pi / 2] 95 % are below a."""
    degrees = min(degrees, 1e4)
    angles = np.linspace(0, pi / 2, 20_001)
    mass = np.cumsum(np.cos((angles[1:] + angles[:-1]) / 2) ** (degrees - 1))
    return degrees**0.5 * tan(np.interp(0.95 * mass[-1], mass, angles[1:]))


def problem_values(pairs: Sequence[Sequence[float]]) -> list[float]:
    """One number a problem, from one number for each of its pairs: v_i = m + (C / N) sum_j (x_ij - m).

    C problems have N pairs, m is the mean over pairs. The v_i have the mean m, and their variance / C is the variance
    of m clustered by problem, 1 / N^2 C / (C - 1) sum_i (sum_j (x_ij - m))^2. With one pair each, v_i is its number.
    """
    count = sum(map(len, pairs))
    mean = fsum(x for xs in pairs for x in xs) / count
    return [mean + len(pairs) / count * fsum(x - mean for x in xs) for xs in pairs]
