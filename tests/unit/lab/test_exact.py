"""Exact answers, against autograd, closed forms, and the independent enumeration of the algorithms' tests."""

import pytest
import torch
from torch import Tensor

from rlsys.lab import exact
from rlsys.lab.tree import Tree, make_tree, random_policy, random_rewards, seeded
from tests.unit.algo import enumeration

TREE = make_tree(3, 4, ends=True)
POLICY = random_policy(TREE, seeded(1))
OTHER = random_policy(TREE, seeded(2))
REWARDS = random_rewards(TREE, seeded(3))


def test_the_gradient_of_expected_reward_is_the_policy_gradient() -> None:
    """Σ_y π(y) r(y) ∇log π(y), with ∇log π(a|s) = e_a − π(·|s) in row s, summed without autograd."""
    weight = (TREE.probabilities(POLICY) * REWARDS)[TREE.response_index]
    by_hand = torch.zeros_like(POLICY)
    for row, token, w in zip(TREE.prefix_ids, TREE.token_ids, weight, strict=True):
        by_hand[row] -= w * POLICY[row].softmax(-1)
        by_hand[row, token] += w
    torch.testing.assert_close(exact.reward_gradient(TREE, POLICY, REWARDS), by_hand, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_expected_reward_predicts_a_small_step() -> None:
    gradient = exact.reward_gradient(TREE, POLICY, REWARDS)
    ahead, behind = (exact.expected_reward(TREE, POLICY + h * OTHER, REWARDS) for h in (1e-5, -1e-5))
    assert float((ahead - behind) / 2e-5) == pytest.approx(float((gradient * OTHER).sum()), rel=1e-7)


@pytest.mark.parametrize(("vocabulary", "horizon", "ends"), [(2, 6, False), (3, 4, True), (6, 3, False)])
def test_sequence_kl_is_the_sum_of_token_kls_at_the_prefixes_of_the_first_policy(
    vocabulary: int, horizon: int, ends: bool
) -> None:
    tree = make_tree(vocabulary, horizon, ends=ends)
    policy, other = random_policy(tree, seeded(4)), random_policy(tree, seeded(5))
    chained = exact.occupancy(tree, policy) @ exact.token_kl(policy, other)
    torch.testing.assert_close(exact.sequence_kl(tree, policy, other), chained, rtol=1e-12, atol=0)


def test_every_response_visits_the_empty_prefix_and_visits_add_up_to_the_mean_length() -> None:
    visits = exact.occupancy(TREE, POLICY)
    assert visits[0].item() == pytest.approx(1.0)
    mean_length = TREE.probabilities(POLICY) @ TREE.lengths.double()
    torch.testing.assert_close(visits.sum(), mean_length)


def test_values_obey_their_recursion() -> None:
    """J = Σ_a π(a|empty) Q(empty, a)."""
    values = exact.action_values(TREE, POLICY, REWARDS)
    torch.testing.assert_close(POLICY[0].softmax(-1) @ values[0], exact.expected_reward(TREE, POLICY, REWARDS))


def test_chi_squares_are_variances_of_weights() -> None:
    mu, ratio = TREE.probabilities(OTHER), TREE.probabilities(POLICY) / TREE.probabilities(OTHER)
    variance = mu @ ratio.square() - (mu @ ratio).square()
    torch.testing.assert_close(exact.sequence_chi2(TREE, POLICY, OTHER), variance)
    p, q = POLICY[3].softmax(-1), OTHER[3].softmax(-1)
    torch.testing.assert_close(exact.token_chi2(POLICY, OTHER)[3], (p * p / q).sum() - 1)


def test_two_independent_enumerations_agree() -> None:
    theirs = enumeration.tree(3, 4, ends=True)
    logits = enumeration.random_logits(theirs, seed=6)
    ours = translated(TREE, theirs, logits)
    order = [theirs.responses.index(tuple(y.tolist())) for y in TREE.token_ids.split(TREE.lengths.tolist())]
    rewards = torch.rand(len(order), generator=seeded(7), dtype=torch.float64)
    torch.testing.assert_close(TREE.probabilities(ours), theirs.probabilities(logits)[order])
    theirs_rewards = torch.empty_like(rewards).scatter(0, torch.tensor(order), rewards)
    torch.testing.assert_close(
        exact.reward_gradient(TREE, ours, rewards),
        translated(TREE, theirs, enumeration.reward_gradient(theirs, logits, theirs_rewards)),
    )


def translated(tree: Tree, theirs: enumeration.Tree, table: Tensor) -> Tensor:
    """A table of the other enumeration in this one's numbering of prefixes."""
    rows: dict[tuple[int, ...], int] = {}
    place = 0
    for response in theirs.responses:
        for t in range(len(response)):
            rows[response[:t]] = int(theirs.prefix_ids[place])
            place += 1
    numbering = [-1] * tree.prefixes
    position = 0
    for response in tree.token_ids.split(tree.lengths.tolist()):
        for t in range(len(response)):
            numbering[int(tree.prefix_ids[position])] = rows[tuple(response[:t].tolist())]
            position += 1
    return table[numbering]
