"""KL estimators, the KL loss, KL as a reward and coefficient schedules, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rlsys.algo.batch import BatchTotals, TokenBatch
from rlsys.algo.divergence import KL_ESTIMATORS, KL_SCHEDULES, kl_loss, kl_rewards, kl_token_rewards
from rlsys.errors import ConfigError

D = torch.tensor([0.5, -1.0, 88.0, 0.0], dtype=torch.float64)  # log π_ref − log π_θ; the third is untrained
MASK = torch.tensor([True, True, False, True])
INDEX = torch.tensor([0, 0, 0, 1])
TOTALS = BatchTotals(tokens=3, responses=2, max_tokens=4)


def batch(ratio: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0), **changes) -> TokenBatch:
    policy = torch.full((4,), -2.0, dtype=torch.float64, requires_grad=True)
    fields = {
        "policy_logprobs": policy,
        "behavior_logprobs": policy.detach() - torch.tensor(ratio, dtype=torch.float64).log(),
        "step_start_logprobs": policy.detach(),
        "reference_logprobs": policy.detach() + D,
        "advantages": torch.zeros(4, dtype=torch.float64),
        "loss_mask": MASK,
        "response_index": INDEX,
        "responses": 2,
    }
    return TokenBatch(**{**fields, **changes})


K3 = (math.exp(0.5) - 1.5, math.exp(-1))


def test_estimators_equal_their_formulas() -> None:
    values = {name: estimator(D[:2]).tolist() for name, estimator in KL_ESTIMATORS.items()}
    assert values["k1"] == [-0.5, 1.0]
    assert values["k2"] == [0.125, 0.5]
    assert values["k3"] == pytest.approx(K3)


def test_all_estimators_but_k2_average_to_the_exact_kl() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    d = (q / p).log()
    exact = float((p * (p / q).log()).sum())
    means = {name: float((p * estimator(d)).sum()) for name, estimator in KL_ESTIMATORS.items()}
    assert means["k1"] == pytest.approx(exact)
    assert means["k3"] == pytest.approx(exact)
    assert abs(means["k2"] - exact) > 0.005


def test_only_the_exponent_of_k3_is_clamped() -> None:
    d = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    value = KL_ESTIMATORS["k3"](d)
    assert value.item() == pytest.approx(math.exp(20) - 31)
    assert torch.autograd.grad(value, d)[0].item() == -1.0


@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        # value and ∂k/∂log π_θ: k2 -> −d, k3 -> 1 − e^d
        ("k2", (0.125, 0.5), (-0.5, 1.0)),
        ("k3", K3, (1 - math.exp(0.5), 1 - math.exp(-1))),
    ],
)
def test_kl_loss_weighs_each_token_by_the_capped_ratio(estimator, values, slopes) -> None:
    """Ratios 1/2 and 3 (capped at 2); the third trained token is at the reference; β = .1, sequence mean."""
    tokens = batch(ratio=(0.5, 3.0, 1.0, 1.0))
    out = kl_loss(tokens, TOTALS, estimator=estimator, reduce="sequence_mean", coef=0.1)
    (gradient,) = torch.autograd.grad(out.loss, tokens.policy_logprobs)
    assert out.loss.item() == pytest.approx(0.1 * (0.5 * values[0] + 2 * values[1]) / 2 / 2)
    assert gradient.tolist() == pytest.approx([0.1 * 0.5 * slopes[0] / 4, 0.1 * 2 * slopes[1] / 4, 0, 0])
    assert out.clipped.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("estimator", "clamped"), [("k2", [False, True, False, False]), ("k3", [True, True, False, False])]
)
def test_a_clamp_is_flagged_where_it_acts_on_the_weight_or_the_exponent(estimator, clamped) -> None:
    """log r = 0, −21 and an untrained 21; d = 21, −1 and an untrained 88: k2 has no exponent to clamp."""
    tokens = batch(ratio=(1.0, math.exp(-21), math.exp(21), 1.0))
    reference = tokens.policy_logprobs.detach() + torch.tensor([21.0, -1.0, 88.0, 0.0], dtype=torch.float64)
    out = kl_loss(replace(tokens, reference_logprobs=reference), TOTALS, estimator=estimator, reduce="constant", coef=1)
    assert out.clamped.tolist() == clamped


def test_kl_in_the_reward_sums_the_step_start_log_ratio_over_trained_tokens() -> None:
    tokens = batch()
    assert tokens.reference_logprobs is not None
    args = (tokens.step_start_logprobs, tokens.reference_logprobs, MASK)
    assert kl_token_rewards(*args, coef=0.2).tolist() == pytest.approx([0.1, -0.2, 0, 0])
    assert kl_rewards(*args, INDEX, 2, coef=0.2).tolist() == pytest.approx([-0.1, 0])


def test_schedules_hold_interpolate_and_steer() -> None:
    assert KL_SCHEDULES["fixed"](0.3, step=5, sequence_kl=9.0) == 0.3
    linear = [
        KL_SCHEDULES["linear"](0.0, step=step, sequence_kl=0.0, initial=0.2, final=0.1, steps=10)
        for step in (0, 5, 10, 99)
    ]
    assert linear == pytest.approx([0.2, 0.15, 0.1, 0.1])
    adaptive = [
        KL_SCHEDULES["adaptive"](1.0, step=0, sequence_kl=kl, target=6.0, gain=0.1) for kl in (0.0, 6.0, 6.6, 60.0)
    ]
    assert adaptive == pytest.approx([0.98, 1.0, 1.01, 1.02])


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"kl.estimator='k4'"):
        kl_loss(batch(), TOTALS, estimator="k4", reduce="constant", coef=0.1)
    with pytest.raises(ConfigError, match="reference"):
        kl_loss(batch(reference_logprobs=None), TOTALS, estimator="k3", reduce="constant", coef=0.1)
