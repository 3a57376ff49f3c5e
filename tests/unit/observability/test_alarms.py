"""An alarm is raised when it should be, once, says what to do, and goes when its cause has gone."""

from pathlib import Path

import pytest

from rlsys.observability.alarms import Alarm, Alarms
from rlsys.observability.catalogue import definition
from tests.fakes import make_config

HEALTHY = {
    "staleness/violations": 0.0,
    "ledger/lost": 0.0,
    "split/engine/k3": 1e-8,
    "importance/ess_sequence/by_staleness/0": 0.99,
    "importance/ess_sequence/by_staleness/4+": 0.9,
    "importance/ess_sequence/by_staleness/2": None,
    "importance/k3": 1e-3,
    "advantage/zero_variance_fraction": 0.5,
    "weight_sync/serving_lag_max": 1.0,
}

BAD = {
    "staleness_violation": {"staleness/violations": 1.0},
    "groups_lost": {"ledger/lost": 2.0},
    "engine_mismatch": {"split/engine/k3": 2e-5},
    "ess_low": {"importance/ess_sequence/by_staleness/4+": 0.29},
    "divergence_high": {"importance/k3": 0.021},
    "no_signal": {"advantage/zero_variance_fraction": 0.95},
    "sync_not_acknowledged": {"weight_sync/serving_lag_max": 9.0},
}


def alarms(*overrides: str) -> Alarms:
    return Alarms(make_config(Path("/nowhere"), *overrides))


def seen(changed: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.name, alarm.state) for alarm in changed]


def test_a_healthy_run_raises_nothing() -> None:
    a = alarms()
    assert [a.after_step(step, HEALTHY) for step in range(10)] == [[]] * 10
    assert a.standing == ()


@pytest.mark.parametrize("name", BAD)
def test_every_alarm_names_its_value_its_limit_a_cause_and_what_to_change(name: str) -> None:
    a = alarms("alarms.patience=1")
    (alarm,) = a.after_step(7, {**HEALTHY, **BAD[name]})
    assert (alarm.name, alarm.state, alarm.step) == (name, "raised", 7)
    assert alarm.value == next(iter(BAD[name].values()))
    assert f"{alarm.value:.4g}" in alarm.message
    assert f"limit {alarm.limit:g}" in alarm.message
    assert alarm.cause in alarm.message
    assert alarm.advice in alarm.message
    assert a.standing == (alarm,)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("staleness_violation", "groups_lost")])
def test_a_limit_must_be_passed_patience_steps_in_a_row_and_kept_as_long(name: str) -> None:
    a, bad = alarms("alarms.patience=3"), {**HEALTHY, **BAD[name]}
    steps = [bad, bad, HEALTHY, bad, bad, bad, bad, HEALTHY, HEALTHY, bad, HEALTHY, HEALTHY, HEALTHY]
    changes = {step: seen(changed) for step, row in enumerate(steps) if (changed := a.after_step(step, row))}
    assert changes == {5: [(name, "raised")], 12: [(name, "cleared")]}
    assert a.standing == ()


@pytest.mark.parametrize("name", ["staleness_violation", "groups_lost"])
def test_what_must_never_happen_is_raised_at_once(name: str) -> None:
    assert seen(alarms("alarms.patience=9").after_step(1, {**HEALTHY, **BAD[name]})) == [(name, "raised")]


def test_a_metric_that_is_null_is_no_news() -> None:
    a = alarms("alarms.patience=2")
    low, unknown = {**HEALTHY, "importance/k3": 1.0}, {**HEALTHY, "importance/k3": None}
    assert [seen(a.after_step(i, row)) for i, row in enumerate([low, unknown, low])] == [
        [],
        [],
        [("divergence_high", "raised")],
    ]


def test_a_limit_of_null_is_no_alarm() -> None:
    off = alarms("alarms.patience=1", "alarms.k3_max=null", "alarms.ess_sequence_min=null", "alarms.stalled_s=null")
    assert off.after_step(1, {**HEALTHY, **BAD["ess_low"], **BAD["divergence_high"]}) == []
    assert off.idle(1, {"learner": 1e9}) == []


def test_the_engine_may_differ_more_in_bfloat16() -> None:
    rounded = {**HEALTHY, "split/engine/k3": 1e-3}
    assert seen(alarms("alarms.patience=1").after_step(1, rounded)) == [("engine_mismatch", "raised")]
    assert alarms("alarms.patience=1", "rollout.dtype=bfloat16").after_step(1, rounded) == []
    assert alarms("alarms.patience=1", "alarms.engine_k3_max=0.01").after_step(1, rounded) == []


def test_a_stalled_role_is_named_and_cleared_when_it_goes_on() -> None:
    a = alarms("alarms.stalled_s=60")
    assert a.idle(3, {"rollout": 59.0, "learner": 0.0}) == []
    (alarm,) = a.idle(3, {"rollout": 61.0, "learner": 0.0})
    assert (alarm.name, alarm.severity) == ("stalled_rollout", "critical")
    assert a.idle(3, {"rollout": 62.0}) == []
    assert seen(a.idle(4, {"rollout": 0.0})) == [("stalled_rollout", "cleared")]


def test_a_refused_batch_is_an_alarm_until_one_is_applied() -> None:
    a = alarms()
    assert a.applied(1) == []
    assert seen(a.refused(1)) == [("not_finite", "raised")]
    assert a.refused(1) == []
    assert seen(a.applied(2)) == [("not_finite", "cleared")]


def test_the_metrics_that_alarms_judge_exist() -> None:
    for name in HEALTHY:
        definition(name)
