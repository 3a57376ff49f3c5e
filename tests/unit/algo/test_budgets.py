"""Sampling budgets: exact expectations by hand or by brute force, and allocations that spend their budget."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.budgets import (
    BUDGETS,
    Done,
    Draw,
    PassRate,
    ada_est,
    allocate,
    balanced,
    gvm,
    log_optimal,
    signal_loss,
    stopped_pass_rate,
)
from rlsys.errors import ConfigError


def draws_until_done(decide, outcomes, **options) -> tuple[int, Done]:
    """How many of the given outcomes a budget draws, and what it decides."""
    drawn: list[float] = []
    while isinstance(decision := decide(drawn, **options), Draw):
        drawn += outcomes[len(drawn) : len(drawn) + decision.n]
    return len(drawn), decision


def expected_draws(p: float, positives: int, per_round: int) -> float:
    """E[N] of uncapped rounds of M until K positives: a walk over the number found."""
    chance = {0: 1.0}
    total = 0.0
    for _ in range(2000):
        alive = {k: c for k, c in chance.items() if k < positives}
        total += per_round * sum(alive.values())
        chance = {}
        for k, c in alive.items():
            for found in range(per_round + 1):
                step = c * math.comb(per_round, found) * p**found * (1 - p) ** (per_round - found)
                chance[k + found] = chance.get(k + found, 0.0) + step
    return total


def test_signal_loss_of_a_hard_prompt_is_43_percent() -> None:
    assert signal_loss(0.1, 8) == pytest.approx(0.9**8 + 0.1**8)
    assert signal_loss(0.1, 8) == pytest.approx(0.4305, abs=1e-4)


def test_uniform_keeps_all_and_dynamic_only_groups_with_variance() -> None:
    assert BUDGETS["uniform"]([], n=3) == Draw(3)
    assert BUDGETS["uniform"]([1.0], n=3) == Draw(2)
    assert BUDGETS["uniform"]([0.0, 0.0, 0.0], n=3) == Done((0, 1, 2))
    assert BUDGETS["dynamic"]([0.0, 0.0, 0.0], n=3) == Done(())
    assert BUDGETS["dynamic"]([0.0, 1.0, 0.0], n=3) == Done((0, 1, 2))


def test_ada_seq_stops_at_its_positives_or_its_cap_and_balances_what_it_keeps() -> None:
    options = {"n": 4, "positives": 2, "per_round": 2, "max_rounds": 4}
    assert draws_until_done(BUDGETS["ada_seq"], [0, 0, 0, 1, 1, 0, 1, 1], **options) == (6, Done((0, 1, 3, 4)))
    assert draws_until_done(BUDGETS["ada_seq"], [1, 1, 0, 0], **options) == (2, Done((0, 1)))
    assert draws_until_done(BUDGETS["ada_seq"], [0] * 8, **options) == (8, Done((0, 1, 2, 3)))


def test_ada_seq_balance_also_waits_for_negatives() -> None:
    options = {"n": 4, "positives": 1, "per_round": 2, "max_rounds": 4}
    assert draws_until_done(BUDGETS["ada_seq_balance"], [1, 1, 1, 0, 1], **options) == (4, Done((0, 1, 2, 3)))


def test_balanced_fills_up_from_the_other_side() -> None:
    assert balanced([1, 1, 1, 0, 0, 0], 4) == (0, 1, 3, 4)
    assert balanced([1, 0, 0, 0, 0, 0], 4) == (0, 1, 2, 3)
    assert balanced([1, 1, 1, 1, 1, 0], 4) == (0, 1, 2, 5)
    assert balanced([1, 0], 4) == (0, 1)


def test_drawing_until_k_positives_takes_k_over_p_and_rounds_overshoot() -> None:
    assert expected_draws(0.1, positives=4, per_round=1) == pytest.approx(40.0)
    assert expected_draws(0.1, positives=4, per_round=4) == pytest.approx(41.5, abs=0.05)


def test_the_stopped_estimate_is_unbiased_where_the_plain_one_is_too_high() -> None:
    """N is negative binomial: P(N = n) = C(n−1, K−1) p^K (1−p)^{n−K}."""
    p, k = 0.2, 3
    chances = {n: math.comb(n - 1, k - 1) * p**k * (1 - p) ** (n - k) for n in range(k, 400)}
    assert sum(c * stopped_pass_rate(k, n) for n, c in chances.items()) == pytest.approx(p)
    assert sum(c * k / n for n, c in chances.items()) > 1.2 * p
    with pytest.raises(ValueError, match="positives"):
        stopped_pass_rate(1, 5)


def test_pass_rate_is_a_discounted_beta_posterior() -> None:
    """λ = 1/2: N_tot = 8/2 + 4, N_pos = 2/2 + 3."""
    rate = PassRate().updated(8, 2, decay=0.5).updated(4, 3, decay=0.5)
    assert (rate.total, rate.positive) == (8.0, 4.0)
    assert rate.estimate() == pytest.approx(5 / 10)
    assert PassRate().estimate(alpha=1, beta=3) == 0.25


def test_allocations_equal_the_hand_computed() -> None:
    assert allocate([1, 2, 3], 12) == [2, 4, 6]
    assert allocate([1, 1, 1], 10) == [4, 3, 3]
    assert allocate([1, 0, 1], 5) == [3, 0, 2]
    assert allocate([1, 100], 12, lowest=3, highest=9) == [3, 9]
    assert ada_est([0.04, 0.25, 1.0], 12, eps=0.0) == [7, 3, 2]  # weights 5, 2, 1; 1.5 is raised to n_min
    assert gvm([0.25, 0.25, 0.0, 0.5], [1.0, 3.0, 5.0, 0.0], 8, alpha=0.0) == [2, 6, 0, 0]
    assert allocate([0.0, 0.0], 8) == [0, 0]
    with pytest.raises(ConfigError, match="do not fit"):
        allocate([1, 1], 3, lowest=2)


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12),
    st.integers(0, 4),
    st.integers(0, 20),
    st.integers(0, 200),
)
def test_an_allocation_spends_its_budget_within_its_bounds_and_follows_the_weights(weights, low, span, extra) -> None:
    high = low + span
    budget = len(weights) * low + min(extra, len(weights) * span)
    counts = allocate(weights, budget, lowest=low, highest=high)
    assert sum(counts) == budget
    assert all(low <= count <= high for count in counts)
    for i, j in product(range(len(weights)), repeat=2):
        if weights[i] > weights[j]:
            assert counts[i] >= counts[j]


def test_the_log_optimal_allocation_is_the_brute_force_one() -> None:
    """Var of Σ_i log p̂_i ≈ Σ (1 − p_i)/(p_i n_i), over all divisions of 26 samples; weights 3, 1, 1/3."""
    rates, budget = (0.1, 0.5, 0.9), 26

    def variance(counts: tuple[int, ...]) -> float:
        return sum((1 - p) / (p * n) for p, n in zip(rates, counts, strict=True))

    best = min(
        ((a, b, budget - a - b) for a in range(1, budget - 1) for b in range(1, budget - a)),
        key=variance,
    )
    assert tuple(log_optimal(rates, budget)) == best == (18, 6, 2)
