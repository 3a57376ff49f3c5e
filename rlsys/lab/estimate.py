"""Numbers that say how sure they are: exact ones, and means or shares of samples with an interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval that holds it with 99% confidence; None where the value is exact."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        return self.value if self.interval is None else self.interval[0]

    @property
    def high(self) -> float:
        return self.value if self.interval is None else self.interval[1]


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent measurements with Student's interval; needs at least two."""
    margin = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    centre = fmean(values)
    return Estimate(centre, (centre - margin, centre + margin))


def geometric_mean(values: Sequence[float]) -> Estimate:
    """exp of the mean logarithm of positive measurements: for ratios, which are skewed."""
    logarithm = mean([math.log(value) for value in values])
    return Estimate(math.exp(logarithm.value), (math.exp(logarithm.low), math.exp(logarithm.high)))


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """mean(above)/mean(below) of paired measurements; the interval is that of mean(above − ratio·below), scaled."""
    ratio = fmean(above) / fmean(below)
    rest = mean([a - ratio * b for a, b in zip(above, below, strict=True)])
    margin = (rest.high - rest.low) / 2 / abs(fmean(below))
    return Estimate(ratio, (ratio - margin, ratio + margin))


def share(hits: int, trials: int) -> Estimate:
    """A proportion with Wilson's interval, which stays inside [0, 1] and is honest at both ends."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p = hits / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    margin = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Estimate(p, (min(p, centre - margin), max(p, centre + margin)))


@cache
def student_quantile(degrees: int) -> float:
    """The t with P(|T| ≤ t) = 99% at `degrees` degrees of freedom, at most 500 (then 0.4% too wide)."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_coverage(middle, min(degrees, 500)) < CONFIDENCE else (low, middle)
    return high


def _student_coverage(t: float, degrees: int) -> float:
    """P(|T| ≤ t) for a whole number of degrees: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
