"""What a claim hands back: checks that can fail, and a picture of the evidence."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlsys.lab.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One prediction and its measurement."""

    quantity: str
    predicted: str
    measured: Estimate
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All checks of a claim, what else a reader should know, and how to draw the evidence."""

    checks: tuple[Check, ...]
    draw: Callable[["Figure"], None]
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A row of the table of claims. `measure(tasks)` does the work; tasks: how many random problems to try it on."""

    number: int
    statement: str
    source: str
    predicted: str
    measure: Callable[[int], Outcome]


SOURCES = (
    "Sources: A, *RL on Language under Single-step Settings*; B, *Sequence-level vs. Token-level Importance "
    "Sampling in RL for LLMs*; C, *Post-Training is a Contextual Bandit*; D, *When RL Meets LLM*."
)
"""What the letters in `Claim.source` stand for, as Markdown."""

Measured = float | Estimate | Iterable[float]
"""What a check looks at. Of several exact numbers the worst counts, and NaN is worst of all."""


def equal(quantity: str, predicted: float, measured: Measured, tolerance: float) -> Check:
    """|measured − predicted| ≤ tolerance; for a sampled number, the interval holds the prediction and is no wider.

    The second half keeps an imprecise measurement from passing for an agreement.
    """
    found = _worst(measured, lambda value: abs(value - predicted))
    if found.interval is None:
        passed = abs(found.value - predicted) <= tolerance
    else:
        passed = found.low <= predicted <= found.high and (found.high - found.low) / 2 <= tolerance
    return Check(quantity=quantity, predicted=f"{predicted:.6g} ± {tolerance:.2g}", measured=found, passed=passed)


def at_least(quantity: str, bound: float, measured: Measured) -> Check:
    """measured ≥ bound, with the whole interval."""
    found = _worst(measured, lambda value: -value)
    return Check(quantity=quantity, predicted=f"≥ {bound:.6g}", measured=found, passed=found.low >= bound)


def at_most(quantity: str, bound: float, measured: Measured) -> Check:
    """measured ≤ bound, with the whole interval."""
    found = _worst(measured, lambda value: value)
    return Check(quantity=quantity, predicted=f"≤ {bound:.6g}", measured=found, passed=found.high <= bound)


def _worst(measured: Measured, badness: Callable[[float], float]) -> Estimate:
    """Raises ValueError where there is nothing to look at: no evidence passes no check."""
    if isinstance(measured, Estimate):
        return measured
    values = [float(value) for value in (measured if isinstance(measured, Iterable) else (measured,))]
    return Estimate(max(values, key=lambda value: math.inf if math.isnan(value) else badness(value)))
