"""Advantages on hand-computed rewards, and what their baselines do to an exact expected gradient."""

import math
from itertools import product

import pytest
import torch

from rlsys.algo.advantages import (
    ADVANTAGE_OPTIONS,
    ADVANTAGES,
    compute_advantages,
    gae,
    step_advantages,
)
from rlsys.errors import ConfigError

# Groups 7: (1, 0, 1); 3: (2, 2), no variance; 5: a single response. Interleaved on purpose.
REWARDS = torch.tensor([1.0, 2.0, 0.0, 0.5, 2.0, 1.0])
GROUP = torch.tensor([7, 3, 7, 5, 3, 7])
THIRD = 1 / 3
SIGMA = math.sqrt((THIRD**2 * 2 + (2 * THIRD) ** 2) / 2)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("group_mean", {}, [THIRD, 0, -2 * THIRD, 0, 0, THIRD]),
        ("grpo", {"eps": 0.5}, [THIRD / (SIGMA + 0.5), 0, -2 * THIRD / (SIGMA + 0.5), 0, 0, THIRD / (SIGMA + 0.5)]),
        ("rloo", {}, [0.5, 0, -1, 0, 0, 0.5]),
        ("reinforce_ada", {}, [THIRD, 0, -2 * THIRD, 0, 0, THIRD]),
        ("accepted", {}, [1, 1, 0, 0, 1, 1]),
        ("accepted", {"threshold": 0.5}, [1, 1, 0, 1, 1, 1]),
    ],
)
def test_advantage_equals_the_hand_computed(name, options, expected) -> None:
    out = compute_advantages(name, REWARDS, GROUP, **options)
    assert out.advantages.tolist() == pytest.approx(expected)
    assert (out.zero_variance_groups, out.groups) == (2, 3)


def test_batch_whiten_standardises_over_all_responses() -> None:
    """Rewards 0, 1, 2, 3: mean 1.5, σ = √(5/3)."""
    out = compute_advantages("batch_whiten", torch.arange(4.0), torch.tensor([0, 0, 1, 2]), eps=0.0)
    assert out.advantages.tolist() == pytest.approx([x / math.sqrt(5 / 3) for x in (-1.5, -0.5, 0.5, 1.5)])
    assert out.zero_variance_groups == 2


def test_a_kl_term_takes_part_in_the_comparison_and_hides_no_group_without_signal() -> None:
    """Rewards 1, 1 with KL terms −.25, −.75: advantages ±1/4, and still nothing that the task told apart."""
    out = compute_advantages(
        "group_mean", torch.ones(2), torch.zeros(2).long(), kl_rewards=torch.tensor([-0.25, -0.75])
    )
    assert out.advantages.tolist() == [0.25, -0.25]
    assert (out.zero_variance_groups, out.groups) == (1, 1)


def test_equal_rewards_give_exactly_zero_not_rounding_dust_over_epsilon() -> None:
    rewards = torch.full((10,), 0.1, dtype=torch.float64)
    assert rewards.cumsum(0)[-1] != 1.0  # the dust
    for name in ("group_mean", "grpo", "rloo", "batch_whiten"):
        assert (compute_advantages(name, rewards, torch.zeros(10, dtype=torch.int64)).advantages == 0).all()


def test_reinforce_ada_uses_the_mean_of_all_drawn_samples_kept_or_not() -> None:
    """Two kept of sixteen drawn with four positives: r̄ = 1/4, and a group of equal rewards still teaches."""
    out = compute_advantages(
        "reinforce_ada", torch.tensor([1.0, 1.0]), torch.tensor([0, 0]), pass_rate=torch.tensor([0.25, 0.25])
    )
    assert out.advantages.tolist() == [0.75, 0.75]
    scaled = compute_advantages(
        "reinforce_ada", torch.ones(1), torch.zeros(1).long(), pass_rate=torch.tensor([0.25]), scale=1.0, eps=0.0
    )
    assert scaled.advantages.tolist() == [1.5]


def test_gvm_weights_are_unbiased_for_the_log_objective_when_the_probe_is_exact() -> None:
    """E over all draws of Σ_i 1[r_i] / (n p) · g_i = E[g | r = 1], enumerated for n = 3, p = 0.2."""
    n, p, g = 3, 0.2, {1.0: 2.5, 0.0: 100.0}
    total = 0.0
    for draws in product((0.0, 1.0), repeat=n):
        weight = compute_advantages(
            "accepted",
            torch.tensor(draws, dtype=torch.float64),
            torch.zeros(n).long(),
            pass_rate=torch.full((n,), p, dtype=torch.float64),
        ).advantages
        chance = math.prod(p if r else 1 - p for r in draws)
        total += chance * sum(float(w) * g[r] for w, r in zip(weight, draws, strict=True))
    assert total == pytest.approx(2.5)
    none = compute_advantages("accepted", torch.ones(1), torch.zeros(1).long(), pass_rate=torch.zeros(1))
    assert none.advantages.tolist() == [0.0]


@pytest.mark.parametrize(("name", "factor"), [("group_mean", 1 - 1 / 3), ("rloo", 1.0)])
def test_expected_gradient_of_a_group_is_the_exact_one_times_a_known_factor(name: str, factor: float) -> None:
    """One Bernoulli action, θ the logit: ∇E[r] = p(1 − p)(r_1 − r_0), against all 2³ groups of three."""
    p, rewards = 0.3, (0.2, 1.0)
    expected = 0.0
    for group in product((0, 1), repeat=3):
        chance = math.prod(p if action else 1 - p for action in group)
        drawn = torch.tensor([rewards[action] for action in group], dtype=torch.float64)
        advantage = compute_advantages(name, drawn, torch.zeros(3).long()).advantages
        expected += chance * sum(float(a) * (y - p) for a, y in zip(advantage, group, strict=True)) / 3
    assert expected == pytest.approx(factor * p * (1 - p) * (rewards[1] - rewards[0]))


def test_step_advantages_sum_the_step_rewards_still_to_come() -> None:
    """Response 0: steps end at tokens 1 (.5) and 2 (outcome 1); response 1: one step, its second token untrained."""
    rewards = torch.tensor([0.0, 0.5, 1.0, 0.0, 9.0, 2.0])
    mask = torch.tensor([True, True, True, True, False, True])
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    assert step_advantages(rewards, mask, index, 2).tolist() == [1.5, 1.5, 1.0, 11.0, 0.0, 2.0]


def test_gae_skips_untrained_positions_and_bootstraps_only_a_cut_response() -> None:
    """γ = 1, λ = 1/2. Response 0: V = 1, 2 with an untrained token between, ends with reward 4.
    δ = (0 + 2 − 1, 4 + 0 − 2) = (1, 2), A = (1 + 2/2, 2). Response 1: V = 3, cut at a state worth 5: A = 2.
    """
    advantages, returns = gae(
        token_rewards=torch.tensor([0.0, 50.0, 4.0, 0.0]),
        values=torch.tensor([1.0, 70.0, 2.0, 3.0]),
        loss_mask=torch.tensor([True, False, True, True]),
        response_index=torch.tensor([0, 0, 0, 1]),
        bootstrap=torch.tensor([0.0, 5.0]),
        lam=0.5,
    )
    assert advantages.tolist() == [2.0, 0.0, 2.0, 2.0]
    assert returns.tolist() == [3.0, 0.0, 4.0, 5.0]


def test_gae_with_lambda_one_is_return_minus_value_for_every_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 0, 6])
    index = torch.repeat_interleave(torch.arange(4), lengths)
    rewards, values = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(11, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, index, torch.zeros(4, dtype=torch.float64), lam=1.0)
    to_go = step_advantages(rewards, mask, index, 4)
    torch.testing.assert_close(advantages, to_go - values)


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"advantage.name='ppo'"):
        compute_advantages("ppo", REWARDS, GROUP)
    with pytest.raises(ConfigError, match="no option eps"):
        compute_advantages("rloo", REWARDS, GROUP, eps=1.0)
    with pytest.raises(ValueError, match=r"group_index: expected \(6,\) like rewards, got \(2,\)"):
        compute_advantages("rloo", REWARDS, GROUP[:2])
    with pytest.raises(ValueError, match=r"pass_rate: expected \(6,\) like rewards, got \(1,\)"):
        compute_advantages("accepted", REWARDS, GROUP, pass_rate=REWARDS[:1])
    with pytest.raises(ValueError, match=r"rewards: expected \[G\], got \(2, 3\)"):
        compute_advantages("rloo", REWARDS.view(2, 3), GROUP)
    assert ADVANTAGES.keys() == ADVANTAGE_OPTIONS.keys()
