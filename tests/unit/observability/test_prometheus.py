"""What Prometheus gets: each metric's newest value, sums where they mean something, and every alarm with its limit."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlsys.observability.alarms import Alarms
from rlsys.observability.prometheus import Prometheus
from tests.fakes import make_config

Labels = frozenset[tuple[str, str]]
Exported = dict[tuple[str, Labels], float]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    """Values by name and labels, as Ray's endpoint would show them."""
    values: Exported = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description.isascii()
            self.name, self.keys = name, set(tag_keys)

        def at(self, tags: Mapping[str, str]) -> tuple[str, Labels]:
            assert set(tags) == self.keys
            return self.name, frozenset(tags.items())

    class Gauge(Metric):
        def set(self, value: float, tags: Mapping[str, str]) -> None:
            values[self.at(tags)] = value

    class Counter(Metric):
        def inc(self, value: float, tags: Mapping[str, str]) -> None:
            assert value > 0, "Ray refuses anything else"
            values[self.at(tags)] = values.get(self.at(tags), 0.0) + value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monkeypatch.setattr("ray.util.metrics.Counter", Counter)
    return values


def of(exported: Exported, name: str, **labels: str) -> Any:
    return exported[name, frozenset({"run": "r", **labels}.items())]


def make_sink(*overrides: str) -> Prometheus:
    return Prometheus(make_config(Path("/nowhere"), "name=r", *overrides))


def test_a_gauge_holds_the_newest_value_and_a_null_metric_is_nan(exported: Exported) -> None:
    sink = make_sink()
    sink.write(1, {"staleness/mean": 1.5, "importance/k3/by_staleness/4+": 0.25})
    assert of(exported, "rlsys_staleness_mean") == 1.5
    assert of(exported, "rlsys_importance_k3_by_staleness", by_staleness="4+") == 0.25
    sink.write(2, {"staleness/mean": None})
    assert math.isnan(of(exported, "rlsys_staleness_mean"))
    assert of(exported, "rlsys_step") == 2


def test_a_late_evaluation_does_not_set_the_step_back(exported: Exported) -> None:
    sink = make_sink()
    for step, metrics in ((25, {"staleness/mean": 1.0}), (27, {"staleness/mean": 1.0}), (25, {"eval/accuracy": 0.5})):
        sink.write(step, metrics)
    assert of(exported, "rlsys_step") == 27
    assert of(exported, "rlsys_eval_accuracy") == 0.5


def test_every_gauge_is_set_again_while_a_step_takes_its_time(exported: Exported) -> None:
    sink = make_sink("alarms.ess_sequence_min=0.4")
    sink.write(1, {"staleness/mean": 1.5, "throughput/step_s": 2.0})
    before = dict(exported)
    gauges = [key for key in exported if not key[0].endswith("_total")]
    for key in gauges:
        del exported[key]
    sink.refresh()
    assert exported == before


def test_what_adds_up_over_steps_is_a_counter_too(exported: Exported) -> None:
    sink = make_sink()
    for seconds in (0.5, 0.0, None, 0.25):
        sink.write(1, {"throughput/step_s": seconds, "throughput/trained_tokens_per_s": 9.0})
    assert of(exported, "rlsys_throughput_step_s_total") == 0.75
    assert of(exported, "rlsys_throughput_step_s") == 0.25
    assert not any("tokens_per_s_total" in name for name, _ in exported)


def test_every_alarm_is_there_from_the_start_with_the_runs_own_limit(exported: Exported) -> None:
    make_sink("alarms.ess_sequence_min=0.4", "alarms.k3_max=null", "rollout.dtype=bfloat16")
    limits = {dict(labels)["alarm"]: v for (name, labels), v in exported.items() if name == "rlsys_alarm_limit"}
    assert limits["ess_low"] == 0.4
    assert limits["engine_mismatch"] == 3e-3
    assert "divergence_high" not in limits
    standing = {dict(labels)["alarm"]: v for (name, labels), v in exported.items() if name == "rlsys_alarm_standing"}
    assert standing.keys() == limits.keys()
    assert set(standing.values()) == {0.0}
    assert {"not_finite", "stalled_rollout", "stalled_reward", "stalled_learner"} < standing.keys()


def test_an_alarm_stands_until_it_is_cleared(exported: Exported) -> None:
    sink, alarms = make_sink(), Alarms(make_config(Path("/nowhere")))
    for alarm in alarms.refused(3):
        sink.alarm(alarm)
    assert of(exported, "rlsys_alarm_standing", alarm="not_finite", severity="critical") == 1
    for alarm in alarms.applied(4):
        sink.alarm(alarm)
    assert of(exported, "rlsys_alarm_standing", alarm="not_finite", severity="critical") == 0
