"""Ages of tokens, and the bound on them, which a simulated adversary cannot break but can reach."""

import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlsys.algo.staleness import (
    response_staleness,
    staleness_bound,
    staleness_bucket,
    token_staleness,
)
from rlsys.config import parse_config
from rlsys.errors import ConfigError


def test_staleness_splits_where_the_response_finished() -> None:
    age = token_staleness(torch.tensor([3, 3, 5]), finished_version=5, learner_version=9)
    assert age.total.tolist() == [6, 6, 4]
    assert age.in_flight.tolist() == [2, 2, 0]
    assert age.in_queue.tolist() == [4, 4, 4]


def test_tokens_from_the_future_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token 1 was sampled by version 6, .* finished under 5, .* version 9"):
        token_staleness(torch.tensor([3, 6]), finished_version=5, learner_version=9)
    with pytest.raises(ValueError, match=r"token 0 was sampled by version 3, .* finished under 5, .* version 4"):
        token_staleness(torch.tensor([3]), finished_version=torch.tensor([5]), learner_version=4)


def test_a_response_is_as_old_as_its_oldest_trained_token() -> None:
    staleness = torch.tensor([9, 1, 2, 7, 0])
    mask = torch.tensor([False, True, True, False, True])
    assert response_staleness(staleness, mask, torch.tensor([0, 0, 0, 1, 2]), 3).tolist() == [2, -1, 0]
    assert staleness_bucket(torch.tensor([0, 3, 4, 17])).tolist() == [0, 3, 4, 4]


@pytest.mark.parametrize(
    ("slots", "window", "groups", "lag", "bound"),
    [(8, 1, 8, 0, 0), (9, 1, 8, 0, 1), (16, 1, 8, 1, 2), (16, 2, 8, 0, 2)],
)
def test_bound_equals_the_hand_computed(slots: int, window: int, groups: int, lag: int, bound: int) -> None:
    assert staleness_bound(slots, window, groups, lag) == bound


@given(st.integers(0, 6), st.integers(1, 12), st.integers(1, 8), st.integers(0, 3))
def test_a_run_has_the_most_slots_that_stay_within_the_bound(bound, window, groups, lag) -> None:
    assume(lag <= bound)
    staleness = {"max": bound, "window": window, "serving_lag": lag}
    try:
        config = parse_config(
            {"task": {"name": "arithmetic"}, "staleness": staleness, "rollout": {"prompts_per_step": groups}}
        )
    except ConfigError:
        assert staleness_bound(groups, window, groups, lag) > bound
        return
    assert staleness_bound(config.slots, window, groups, lag) <= bound
    assert staleness_bound(config.slots + 1, window, groups, lag) > bound


def simulate(slots: int, window: int, groups: int, steps: int, choose) -> int:
    """Oldest age trained when `choose` picks any admitted group less than `window` after the oldest waiting."""
    admitted = dict.fromkeys(range(slots), 0)  # group -> learner version at admission
    oldest, following = 0, slots
    for version in range(steps):
        for _ in range(groups):
            first = min(admitted)
            group = choose([number for number in admitted if number < first + window])
            oldest = max(oldest, version - admitted.pop(group))
        for _ in range(groups):
            admitted[following] = version + 1
            following += 1
    return oldest


@given(st.integers(1, 4), st.integers(0, 12), st.integers(1, 6), st.randoms(use_true_random=False))
def test_no_order_of_completion_trains_a_group_older_than_the_bound(groups, extra, window, chance) -> None:
    slots = groups + extra
    bound = staleness_bound(slots, window, groups, serving_lag=0)
    assert simulate(slots, window, groups, 12, chance.choice) <= bound
    assert simulate(slots, window, groups, 12, max) <= bound


def test_the_bound_is_tight() -> None:
    assert simulate(8, 1, 4, 20, min) == staleness_bound(8, 1, 4, 0) == 1
    worst = max(simulate(10, 3, 4, 60, random.Random(seed).choice) for seed in range(20))
    assert worst == staleness_bound(10, 3, 4, 0) == 2
