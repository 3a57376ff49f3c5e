"""Alert rules ask for series that runs export, cover every alarm, and each has been seen to fire."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.observability.alarms import watched
from tests.fakes import make_config
from tests.unit.observability.test_grafana import EXPORTED

DIRECTORY = Path(__file__).parents[3] / "deploy" / "prometheus"

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
BY_SERIES = {"staleness_violation": "ray_rlsys_staleness_max", "groups_lost": "ray_rlsys_ledger_lost"}
"""Alarms whose alert looks at the metric itself: their limit is no choice."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_is_exported_and_keeps_runs_apart(rule: dict[str, Any]) -> None:
    series = re.findall(r"\bray_(rlsys_\w+)", rule["expr"])
    assert series
    assert set(series) <= EXPORTED
    assert set(re.findall(r"\b(?:by|on) \((\w+)", rule["expr"])) == {"run"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"].startswith("{{ $labels.run }}: ")
    assert rule["annotations"]["description"]


def test_every_alarm_of_a_run_has_an_alert() -> None:
    named = [alarm for rule in RULES for alarm in re.findall(r'alarm=~?"([^"]+)"', rule["expr"])]
    alarms = {rule.name for rule in watched(make_config(Path("/nowhere")))}
    for alarm in alarms - BY_SERIES.keys():
        assert any(re.fullmatch(pattern, alarm) for pattern in named), alarm
    for pattern in named:
        assert any(re.fullmatch(pattern, alarm) for alarm in alarms), f"no alarm is called {pattern}"
    for alarm, series in BY_SERIES.items():
        assert alarm in alarms
        assert any(series in rule["expr"] for rule in RULES)


def test_each_alert_fires_in_a_made_case() -> None:
    cases = yaml.safe_load((DIRECTORY / "alerts.test.yaml").read_text())["tests"]
    everything = cases[0]["promql_expr_test"][0]
    fired = [re.search(r'alertname="(\w+)"', sample["labels"])[1] for sample in everything["exp_samples"]]  # type: ignore[index]
    assert fired == [rule["alert"] for rule in RULES]
