"""How far a difference between two models may be chance."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Difference:
    """In accuracy; interval: 95 %, paired by problem and seed."""

    points: float
    interval: Interval

    @property
    def verdict(self) -> str:
        low, high = self.interval
        return "clear of zero" if low > 0 or high < 0 else "inside the noise"


def difference(better: np.ndarray, worse: np.ndarray) -> Difference:
    """Of [S, P], S seeds on P problems, or of a model without seeds [1, P].

    Two pseudo-problems, one won and one lost by half (Agresti & Min 2005), keep the interval open where models rarely
    differ, as `difference_interval` of a run's summary does.
    """
    paired = better - worse
    pseudo = np.tile([0.5**0.5, -(0.5**0.5)], (len(paired), 1))
    middle, half = mean_and_half(np.concatenate([paired, pseudo], axis=1))
    return Difference(float(paired.mean()), (max(-1.0, middle - half), min(1.0, middle + half)))


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """The mean of values [S, P], and half of its 95 % interval, for other seeds and other problems than these.

    Two crossed random factors: Var = (MS_seeds + MS_problems - MS_rest) / (S P), no less than of one factor alone, and
    Student's t with Satterthwaite's degrees of freedom (Searle, Casella & McCulloch 1992). Few seeds that differ by
    more than chance make it wide, as they should. One seed: Var = MS_problems / P.
    """
    seeds, problems = values.shape
    mean = values.mean()
    by_problem = seeds * values.mean(0).var(ddof=1)
    if seeds == 1:
        return float(mean), _t(problems - 1) * (by_problem / problems) ** 0.5
    by_seed = problems * values.mean(1).var(ddof=1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + mean
    of_rest = (rest**2).sum() / ((seeds - 1) * (problems - 1))
    total = max(by_seed + by_problem - of_rest, by_seed, by_problem)
    parts = [(by_seed, seeds - 1), (by_problem, problems - 1), (of_rest, (seeds - 1) * (problems - 1))]
    spread = sum(part**2 / degrees for part, degrees in parts)
    degrees = total**2 / spread if spread else problems - 1
    return float(mean), float(_t(degrees) * (total / (seeds * problems)) ** 0.5)


def _t(degrees: float) -> float:
    """Student's 97.5 % quantile, by Abramowitz & Stegun 26.7.5: to 1 % from two degrees of freedom on."""
    z, n = _Z, max(1.0, degrees)
    terms = [
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    ]
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))
