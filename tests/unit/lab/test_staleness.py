"""Learners that really move."""

from itertools import pairwise

import torch

from rlsys.lab import exact
from rlsys.lab.staleness import aimless_steps, exact_ascent, learner_steps
from rlsys.lab.tree import make_tree, random_policy, random_rewards, seeded

TREE = make_tree(3, 4)
POLICY = random_policy(TREE, seeded(1))
REWARDS = random_rewards(TREE, seeded(2))


def rewards_of(policies: list[torch.Tensor]) -> list[float]:
    return [float(exact.expected_reward(TREE, policy, REWARDS)) for policy in policies]


def test_a_learner_climbs_and_drifts_a_little_further_with_every_step() -> None:
    passed = learner_steps(TREE, POLICY, REWARDS, 16, seeded(3))
    assert len(passed) == 17
    assert torch.equal(passed[0], POLICY)
    assert rewards_of(passed)[-1] > rewards_of(passed)[0] + 0.1
    distance = [float(exact.sequence_kl(TREE, passed[-1], passed[-1 - k])) for k in (1, 2, 4, 8, 16)]
    assert distance == sorted(distance)
    assert distance[0] < 0.01


def test_a_learner_repeats_with_its_seed() -> None:
    first, again, other = (learner_steps(TREE, POLICY, REWARDS, 3, seeded(s))[-1] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_exact_ascent_never_loses_reward() -> None:
    values = rewards_of(exact_ascent(TREE, POLICY, REWARDS, 8, 2.0))
    assert values == sorted(values)


def test_aimless_steps_are_equal_and_leave_the_start() -> None:
    passed = aimless_steps(TREE, POLICY, 4, seeded(5), 0.1)
    moves = [after - before for before, after in pairwise(passed)]
    for move in moves[1:]:
        torch.testing.assert_close(move, moves[0])
    assert 0.05 < moves[0].std() < 0.2
