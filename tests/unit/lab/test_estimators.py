"""Moments of the real loss's gradient, against one autograd pass per response; and what each objective claims."""

import pytest
import torch

from rlsys.algo.batch import BatchTotals
from rlsys.algo.corrections import CORRECTIONS
from rlsys.algo.objectives import OBJECTIVES, policy_loss
from rlsys.lab import exact
from rlsys.lab.estimators import (
    Situation,
    batch_gradients,
    coefficients,
    correction_of,
    enumerated,
    response_coefficients,
    scores,
)
from rlsys.lab.study import allowed
from rlsys.lab.tree import make_tree, random_policy, random_rewards, sample, seeded

TREE = make_tree(3, 3, ends=True)
POLICY = random_policy(TREE, seeded(1))
BEHAVIOR = POLICY + random_policy(TREE, seeded(2), 0.4)
START = POLICY + random_policy(TREE, seeded(3), 0.1)
REWARDS = random_rewards(TREE, seeded(4))
OFF_POLICY = Situation(tree=TREE, behavior=BEHAVIOR, start=START, policy=POLICY, rewards=REWARDS, baseline=0.3)
ON_POLICY = Situation(tree=TREE, behavior=POLICY, policy=POLICY, rewards=REWARDS)
TRUTH = exact.reward_gradient(TREE, POLICY, REWARDS)
PAIRS = [(o, c) for o in OBJECTIVES for c in CORRECTIONS if c != "m2" and allowed(o, c)]


def error(measured: torch.Tensor) -> float:
    return float((measured - TRUTH).norm() / TRUTH.norm())


@pytest.mark.parametrize(("objective", "correction"), PAIRS)
def test_moments_are_those_of_one_gradient_per_response(objective: str, correction: str) -> None:
    """E ĝ and E‖ĝ − E ĝ‖² from a backward pass through the loss of each response alone."""
    parameters = POLICY.clone().requires_grad_()
    gradients = []
    for response in range(TREE.responses):
        positions, index = TREE.tokens_of(torch.tensor([response]))
        fixed = OFF_POLICY.batch(objective, positions, index, 1)
        logprobs = TREE.logprobs(parameters, positions)
        batch = type(fixed)(**{name: getattr(fixed, name) for name in fixed.__slots__} | {"policy_logprobs": logprobs})
        out = policy_loss(
            batch,
            BatchTotals(tokens=1, responses=1, max_tokens=1),
            objective=objective,
            reduce="constant",
            correction=correction_of(batch, objective, correction),
        )
        gradients.append(-torch.autograd.grad(out.loss, parameters)[0])
    stacked, mu = torch.stack(gradients), TREE.probabilities(BEHAVIOR)
    mean = torch.einsum("y,ysa->sa", mu, stacked)
    variance = mu @ (stacked - mean).square().sum((1, 2))
    found = enumerated(OFF_POLICY, objective, correction)
    torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=1e-14)
    assert found.variance == pytest.approx(float(variance), rel=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_policy_no_objective_is_biased(objective: str) -> None:
    assert error(enumerated(ON_POLICY, objective).mean) < 1e-12


def test_off_policy_the_sequence_weight_is_unbiased_and_the_token_weight_is_not() -> None:
    assert error(enumerated(OFF_POLICY, "is_sequence").mean) < 1e-12
    assert error(enumerated(OFF_POLICY, "is_token").mean) > 0.01


def test_batches_average_to_the_enumerated_mean_and_spread_by_its_variance() -> None:
    count, size = 2000, 16
    drawn = sample(TREE, BEHAVIOR, count * size, seeded(5))
    positions, index = TREE.tokens_of(drawn)
    c = response_coefficients(OFF_POLICY, "is_token")[positions] / size
    gradients = batch_gradients(TREE, POLICY, positions, index // size, count, c)
    found = enumerated(OFF_POLICY, "is_token")
    spread = float((gradients - found.mean).square().sum((1, 2)).mean())
    assert spread == pytest.approx(found.variance / size, rel=0.1)
    assert float((gradients.mean(0) - found.mean).norm()) < 4 * (found.variance / size / count) ** 0.5


def test_one_batch_alone_gives_the_same_gradient_as_among_others() -> None:
    drawn = sample(TREE, BEHAVIOR, 8, seeded(6))
    positions, index = TREE.tokens_of(drawn)
    c = coefficients(OFF_POLICY.batch("ppo_clip", positions, index, 8), "ppo_clip", responses=4)
    both = batch_gradients(TREE, POLICY, positions, index // 4, 2, c)
    first = index < 4
    alone = scores(TREE.prefix_ids[positions][first], TREE.cells[positions][first], c[first], POLICY)
    torch.testing.assert_close(both[0], alone)


def test_raft_sees_the_reward_and_others_the_advantage() -> None:
    assert torch.equal(OFF_POLICY.advantages("raft"), REWARDS)
    assert torch.equal(OFF_POLICY.advantages("ppo_clip"), REWARDS - 0.3)
