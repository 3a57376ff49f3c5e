"""Intervals, against tables; and checks, which must be able to fail."""

import pytest

from rlsys.lab.claims.outcome import at_least, at_most, equal
from rlsys.lab.estimate import Estimate, geometric_mean, mean, ratio_of_means, share, student_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 63.657), (2, 9.925), (3, 5.841), (7, 3.499), (30, 2.750), (100, 2.626)]
)
def test_quantiles_of_student_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_the_interval_of_a_mean_by_hand() -> None:
    """Mean 2, s = 1, n = 3: 2 ± 9.925·1/√3."""
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high == pytest.approx(2 + 9.925 / 3**0.5, abs=1e-3)


def test_a_share_stays_between_zero_and_one_and_is_unsure_at_both_ends() -> None:
    none, every = share(0, 20), share(20, 20)
    assert (none.value, none.low, every.value, every.high) == (0.0, 0.0, 1.0, 1.0)
    assert none.high == pytest.approx(1 - every.low)
    assert 0.2 < none.high < 0.3


def test_a_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([0.25, 4.0]).value == pytest.approx(1.0)


def test_a_ratio_of_proportional_measurements_is_certain() -> None:
    found = ratio_of_means([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.low, found.value, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_an_exact_number_must_meet_its_prediction() -> None:
    assert equal("x", 1.0, 1.0 + 1e-13, 1e-12).passed
    assert not equal("x", 1.0, 1.0 + 1e-11, 1e-12).passed


def test_a_sampled_number_must_hold_the_prediction_and_be_precise() -> None:
    assert equal("x", 1.0, Estimate(1.01, (0.98, 1.04)), 0.05).passed
    assert not equal("x", 1.1, Estimate(1.01, (0.98, 1.04)), 0.05).passed
    assert not equal("x", 1.0, Estimate(1.01, (0.5, 1.5)), 0.05).passed, "too wide to tell"


def test_a_bound_must_hold_with_the_whole_interval() -> None:
    found = Estimate(1.0, (0.8, 1.2))
    assert at_least("x", 0.7, found).passed
    assert not at_least("x", 0.9, found).passed
    assert at_most("x", 1.3, found).passed
    assert not at_most("x", 1.1, found).passed


def test_a_number_that_is_not_a_number_passes_nothing() -> None:
    nan = float("nan")
    assert not any(
        check.passed for check in (equal("x", 0.0, nan, 1.0), at_least("x", 0.0, nan), at_most("x", 0.0, nan))
    )
