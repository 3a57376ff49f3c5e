"""How many workers the queue policy wants, worked out by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.scheduling.scaling import Decision, Keep, ManualPolicy, Observation, QueuePolicy, Resize, ScalingPolicy


def queue(**changed: Any) -> QueuePolicy:
    return QueuePolicy(**{"least": 1, "most": 8, "wait_target": 0.1, "window": 3, "cooldown": 2, **changed})


def seen(step: int, workers: int = 2, **changed: Any) -> Observation:
    usual: dict[str, Any] = {
        "desired": workers,
        "ready": workers,
        "learner_wait": 0.05,
        "batches_ahead": 0.5,
        "rollout_idle": 0.0,
    }
    return Observation(step=step, **{**usual, **changed})


def decisions(policy: ScalingPolicy, steps: int = 20, first: int = 1, **what: Any) -> list[Decision]:
    return [policy.after_step(seen(step, **what)) for step in range(first, first + steps)]


def changes(found: list[Decision]) -> list[int]:
    return [decision.rollout for decision in found if isinstance(decision, Resize)]


def test_manual_keeps_whatever_happens() -> None:
    assert set(decisions(ManualPolicy(), learner_wait=0.9)) == {Keep()}


def test_a_wait_under_the_target_and_no_full_queue_are_left_alone() -> None:
    assert set(decisions(queue())) == {Keep()}


@pytest.mark.parametrize(
    ("workers", "wait", "wanted"),
    [(1, 0.2, 2), (2, 0.2, 3), (2, 0.5, 4), (4, 0.39, 6), (4, 0.9, 8), (2, 0.11, 3), (6, 0.99, 8)],
)
def test_it_grows_by_the_ratio_of_step_times_at_most_twofold_and_within_its_bounds(
    workers: int, wait: float, wanted: int
) -> None:
    """n' = ⌈n·0.9/(1-w)⌉."""
    first = next(one for one in decisions(queue(), workers=workers, learner_wait=wait) if one != Keep())
    assert first == Resize(wanted, f"the learner waits {wait:.0%} of the time, more than 10%")


def test_it_decides_only_on_a_whole_window_after_the_cooldown() -> None:
    """Step 1 shows the workers, 2 and 3 are too near, 4 to 6 are the window."""
    found = decisions(queue(), steps=6, learner_wait=0.5)
    assert [isinstance(one, Resize) for one in found] == [False] * 5 + [True]


def test_one_slow_step_is_no_reason() -> None:
    policy = queue()
    decisions(policy, learner_wait=0.0, batches_ahead=0.0)
    assert policy.after_step(seen(21, learner_wait=0.2, batches_ahead=0.0)) == Keep()


def test_after_a_change_it_waits_until_the_workers_are_there_and_then_the_cooldown() -> None:
    policy = queue()
    assert changes(decisions(policy, steps=6, learner_wait=0.5)) == [4]
    assert set(decisions(policy, first=7, steps=50, workers=4, ready=2, learner_wait=0.5)) == {Keep()}
    found = decisions(policy, first=57, steps=6, workers=4, learner_wait=0.5)
    assert [isinstance(one, Resize) for one in found] == [False] * 4 + [True] * 2


def test_a_person_who_scales_starts_the_cooldown_too() -> None:
    policy = queue()
    decisions(policy, steps=5, learner_wait=0.5)
    assert set(decisions(policy, first=6, steps=5, workers=3, learner_wait=0.5)) == {Keep()}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"batches_ahead": 1.5}, "finished groups wait for a straggler"),
        ({"rollout_idle": 0.6}, "the workers wait themselves, for a reward or the bound"),
        ({"workers": 8}, "there are as many as there may be"),
    ],
)
def test_it_does_not_grow_where_more_workers_would_not_help(what: dict[str, Any], why: str) -> None:
    assert changes(decisions(queue(), **{"learner_wait": 0.5, **what})) == [], why


def test_it_shrinks_by_one_when_a_batch_always_waits_and_the_rest_would_still_idle() -> None:
    """Two workers that idle 60% would be one that idles 20%; at 50% it would idle nothing."""
    full: dict[str, Any] = {"learner_wait": 0.0, "batches_ahead": 2.0}
    found = decisions(queue(), **full, rollout_idle=0.6)
    assert next(one for one in found if one != Keep()) == Resize(
        1, "a batch always waits, and the workers idle 60% of the time"
    )
    assert changes(decisions(queue(), **full, rollout_idle=0.5)) == []
    assert changes(decisions(queue(), **full, rollout_idle=None)) == []
    assert changes(decisions(queue(least=2), **full, rollout_idle=0.9)) == []
    assert changes(decisions(queue(), learner_wait=0.0, batches_ahead=0.9, rollout_idle=0.9)) == []


@given(st.floats(0.3, 20.0), st.integers(1, 8), st.integers(0, 10))
def test_a_steady_load_ends_at_one_number_of_workers_and_stays_there(load: float, workers: int, cooldown: int) -> None:
    """`load`: workers that would make batches exactly as fast as the learner consumes them. Rates are as in queueing:
    the slower side sets the pace, the other one waits.
    """
    policy = queue(most=16, cooldown=cooldown)
    history = []
    for step in range(1, 600):
        rate = workers / load
        decision = policy.after_step(
            seen(
                step,
                workers=workers,
                learner_wait=max(0.0, 1 - rate),
                batches_ahead=2.0 if rate > 1 else 0.3,
                rollout_idle=max(0.0, 1 - 1 / rate),
            )
        )
        workers = decision.rollout if isinstance(decision, Resize) else workers
        history.append(workers)
    assert len(set(history[-200:])) == 1, "it swings"
    assert workers == 16 or 1 - workers / load <= 0.1 + 1e-9, "the learner still waits"
    assert workers == 1 or (workers - 1) / load < 1 / (1 - QueuePolicy.SPARE) + 1e-9, "one of them is in excess"
