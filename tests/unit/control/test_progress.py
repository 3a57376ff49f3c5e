"""Rates between two steps, computed by hand."""

import contextlib

import pytest

from rlsys.control.ports import FleetStats
from rlsys.control.progress import Activity, StepClock, ledger_metrics
from rlsys.records import LearnerStep
from rlsys.scheduling.ledger import End, Ledger
from tests.fakes import make_prompt


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    for source in ("perf_counter", "monotonic"):
        monkeypatch.setattr(f"rlsys.control.progress.time.{source}", lambda: time[0])
    return time


def stats(tokens: int, busy_s: float = 0.0, paused_s: float = 0.0) -> FleetStats:
    return FleetStats(generated_tokens=tokens, busy_s=busy_s, paused_s=paused_s, workers=1)


def test_a_step_is_measured_from_the_end_of_the_one_before(clock: list[float]) -> None:
    watch = StepClock({})
    step = LearnerStep(version=1, applied=True, metrics={}, trained_tokens=600, seconds=1.5)
    watch.waiting()
    clock[0] = 102.5
    watch.learning()
    clock[0] = 104.0
    assert watch.step(step) == {
        "throughput/step_s": 4.0,
        "throughput/learner_idle_s": 2.5,
        "throughput/learner_s": 1.5,
        "throughput/trained_tokens_per_s": 150.0,
    }
    clock[0] = 106.0
    assert watch.step(step)["throughput/step_s"] == 2.0


def test_the_fleet_counts_from_the_making_of_the_clock(clock: list[float]) -> None:
    watch = StepClock({"a": stats(1000, 50.0, 1.0)})
    clock[0] = 110.0
    assert watch.fleet({"a": stats(1500, 56.0, 1.5), "b": stats(300, 2.0)}) == {
        "throughput/generated_tokens_per_s": 80.0,  # (500 + 300) / 10 s
        "throughput/rollout_idle_fraction": pytest.approx(0.6),  # busy 6 s and 2 s of 20
        "weight_sync/pause_s": 0.5,
    }


def test_a_worker_that_is_silent_for_a_step_is_counted_when_it_answers_again(clock: list[float]) -> None:
    watch = StepClock({"a": stats(0), "b": stats(0)})
    clock[0] = 110.0
    assert watch.fleet({"a": stats(100)})["throughput/generated_tokens_per_s"] == 10.0
    clock[0] = 120.0
    assert watch.fleet({"a": stats(200), "b": stats(400)})["throughput/generated_tokens_per_s"] == 50.0
    clock[0] = 130.0
    assert watch.fleet({})["throughput/generated_tokens_per_s"] == 0.0


def test_a_role_is_idle_since_it_last_finished_something_and_only_while_it_has_work(clock: list[float]) -> None:
    activity = Activity()
    with activity.of("rollout"):
        clock[0] = 105.0
        assert activity.idle_s() == {"rollout": 5.0}
        with contextlib.suppress(ValueError), activity.of("rollout"):
            clock[0] = 107.0
            raise ValueError
        clock[0] = 110.0
        assert activity.idle_s() == {"rollout": 3.0}, "a failure is an end, too"
    clock[0] = 200.0
    assert activity.idle_s() == {"rollout": 0.0}
    with activity.of("rollout"):
        clock[0] = 201.0
        assert activity.idle_s() == {"rollout": 1.0}, "what lay idle for want of work is not stalled"


def test_every_end_but_training_counts_as_rejected() -> None:
    ledger = Ledger(capacity=10)
    for index, end in enumerate(end for end in End if end is not End.TRAINED):
        ledger.end(ledger.admit(make_prompt(index), 0).id, end, 0)
    ledger.admit(make_prompt(9), 0)
    shown = ledger_metrics(ledger)
    assert shown["ledger/rejected"] == len(End) - 1
    assert (shown["ledger/admitted"], shown["ledger/waiting"], shown["ledger/lost"]) == (len(End), 1, 0)
