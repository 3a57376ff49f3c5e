"""The enumeration: every response once, with its probability."""

import pytest
import torch

from rlsys.errors import ConfigError
from rlsys.lab.tree import (
    by_position,
    make_tree,
    random_policy,
    random_rewards,
    sample,
    seeded,
)

SHAPES = [(2, 1, False), (3, 4, False), (3, 4, True), (6, 3, True), (2, 6, False)]


def spelled(tree) -> list[tuple[int, ...]]:
    """The responses as tuples of tokens, in order."""
    return [tuple(part.tolist()) for part in tree.token_ids.split(tree.lengths.tolist())]


@pytest.mark.parametrize(("vocabulary", "horizon", "ends"), SHAPES)
def test_probabilities_of_all_responses_sum_to_one(vocabulary: int, horizon: int, ends: bool) -> None:
    tree = make_tree(vocabulary, horizon, ends=ends)
    probability = tree.probabilities(random_policy(tree, seeded(1), 2.0))
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-14)
    assert (probability > 0).all()


@pytest.mark.parametrize(("vocabulary", "horizon", "ends"), SHAPES)
def test_every_response_is_there_once(vocabulary: int, horizon: int, ends: bool) -> None:
    tree = make_tree(vocabulary, horizon, ends=ends)
    responses = spelled(tree)
    assert len(set(responses)) == len(responses)
    if not ends:
        assert len(responses) == vocabulary**horizon
    else:  # ended after t tokens: t − 1 others first; or cut at the horizon
        ended = sum((vocabulary - 1) ** (t - 1) for t in range(1, horizon + 1))
        assert len(responses) == ended + (vocabulary - 1) ** horizon
        assert all(0 not in y[:-1] for y in responses)


def test_a_small_tree_by_hand() -> None:
    tree = make_tree(2, 2, ends=True)
    assert spelled(tree) == [(0,), (1, 0), (1, 1)]
    assert tree.prefix_ids.tolist() == [0, 0, 1, 0, 1]
    assert tree.depths.tolist() == [0, 1]
    policy = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    torch.testing.assert_close(tree.probabilities(policy), torch.tensor([0.25, 0.375, 0.375], dtype=torch.float64))


def test_tokens_with_the_same_prefix_share_a_row_and_others_do_not() -> None:
    tree = make_tree(3, 4, ends=True)
    rows: dict[tuple[int, ...], int] = {}
    for response, prefixes in zip(spelled(tree), tree.prefix_ids.split(tree.lengths.tolist()), strict=True):
        for t, row in enumerate(prefixes.tolist()):
            assert rows.setdefault(response[:t], row) == row
            assert tree.depths[row] == t
    assert len(set(rows.values())) == len(rows) == tree.prefixes


def test_the_first_rows_of_a_tree_are_those_of_a_shorter_one() -> None:
    """Claim 2 reads the policy of shorter responses off a longer one."""
    long, short = make_tree(3, 5), make_tree(3, 3)
    policy = random_policy(long, seeded(2))
    for response, probability in zip(spelled(short), short.probabilities(policy[: short.prefixes]), strict=True):
        continued = [i for i, y in enumerate(spelled(long)) if y[:3] == response]
        torch.testing.assert_close(long.probabilities(policy)[continued].sum(), probability)


def test_a_batch_holds_the_tokens_of_its_responses_in_order() -> None:
    tree = make_tree(3, 3, ends=True)
    drawn = torch.tensor([5, 0, 5])
    positions, index = tree.tokens_of(drawn)
    expected = [token for response in drawn.tolist() for token in spelled(tree)[response]]
    assert tree.token_ids[positions].tolist() == expected
    assert torch.bincount(index).tolist() == tree.lengths[drawn].tolist()


def test_samples_come_as_often_as_they_are_likely_and_repeat_with_the_seed() -> None:
    tree = make_tree(3, 2)
    policy = random_policy(tree, seeded(3))
    drawn = sample(tree, policy, 40_000, seeded(4))
    frequency = torch.bincount(drawn, minlength=tree.responses) / 40_000
    assert (frequency - tree.probabilities(policy)).abs().max() < 0.012
    assert torch.equal(drawn, sample(tree, policy, 40_000, seeded(4)))
    assert not torch.equal(drawn, sample(tree, policy, 40_000, seeded(4, 0)))


def test_a_policy_by_position_ignores_the_prefix() -> None:
    tree = make_tree(3, 3)
    policy = by_position(tree, torch.arange(9.0, dtype=torch.float64).view(3, 3))
    assert policy[tree.depths == 1].unique(dim=0).tolist() == [[3.0, 4.0, 5.0]]


def test_rewards_pass_the_asked_share_of_responses() -> None:
    tree = make_tree(4, 4)
    rewards = random_rewards(tree, seeded(5), 0.25)
    assert rewards.sum() == 64
    assert set(rewards.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("vocabulary", "horizon"), [(7, 2), (1, 2), (4, 7), (4, 0)])
def test_what_cannot_be_enumerated_is_refused(vocabulary: int, horizon: int) -> None:
    with pytest.raises(ConfigError, match="cannot be enumerated"):
        make_tree(vocabulary, horizon)
