"""The dashboard shows what runs export, each with the catalogue's unit and meaning."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlsys.observability import grafana
from rlsys.observability.catalogue import CATALOGUE, PARTS
from rlsys.observability.prometheus import LIMIT, STANDING, STEP, gauge_name

KEPT = Path(__file__).parents[3] / "deploy" / "grafana" / "rlsys.json"

EXPORTED = {
    *(gauge_name(name)[0] for name in CATALOGUE),
    *(
        gauge_name(f"{n}/{kind}/{PARTS[kind][0]}")[0]
        for n, m in CATALOGUE.items()
        for kind in PARTS
        if getattr(m, kind)
    ),
    *(f"{gauge_name(name)[0]}_total" for name, metric in CATALOGUE.items() if metric.additive),
    *(STEP, STANDING, LIMIT),
}


def drawn() -> list[dict[str, Any]]:
    return [panel for panel in grafana.dashboard()["panels"] if panel["type"] != "row"]


def test_the_dashboard_that_is_kept_is_the_one_the_catalogue_gives() -> None:
    assert KEPT.read_text() == grafana.text(), "run rlsys.observability.grafana"


def test_every_expression_asks_for_exported_series_of_the_chosen_runs_and_keeps_runs_apart() -> None:
    expressions = [target["expr"] for panel in drawn() for target in panel["targets"]]
    assert len(expressions) > 60
    for expression in expressions:
        series = re.findall(r"ray_(rlsys_\w+)\{([^}]*)\}", expression)
        assert series, expression
        assert len(series) == len(re.findall(r"by \(run\b", expression))
        for name, labels in series:
            assert name in EXPORTED, expression
            assert 'run=~"$run"' in labels


def test_rows_are_the_subjects_and_panels_lie_beside_each_other() -> None:
    board = json.loads(grafana.text())
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Learning", "Staleness", "Importance", "Fleet", "Throughput"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(place["x"] + place["w"] <= grafana.COLUMNS for place in places)


def test_a_panel_says_what_the_catalogue_says() -> None:
    (panel,) = (p for p in drawn() if p["title"] == "Publishing a version")
    assert panel["fieldConfig"]["defaults"]["unit"] == "s"
    assert CATALOGUE["weight_sync/publish_s"].meaning in panel["description"]
    (panel,) = (p for p in drawn() if p["title"] == "Age of trained tokens")
    assert panel["fieldConfig"]["defaults"]["custom"]["axisLabel"] == "versions"
    assert [t["legendFormat"] for t in panel["targets"]][:2] == ["{{run}} mean", "{{run}} p95"]


def test_parts_of_a_metric_are_one_curve_each_and_a_limit_is_drawn() -> None:
    made = grafana.panel("ESS", "importance/ess_token/by_staleness", limit="ess_low")
    assert made.curves == (
        grafana.Curve(
            'max by (run, by_staleness) (ray_rlsys_importance_ess_token_by_staleness{run=~"$run"})',
            "{{run}} ess_token {{by_staleness}}",
        ),
        grafana.Curve('max by (run) (ray_rlsys_alarm_limit{run=~"$run", alarm="ess_low"})', "{{run}} limit of ess_low"),
    )


def test_a_mean_over_time_is_one_counters_rate_over_anothers() -> None:
    made = grafana.shares("Wait", "throughput/learner_idle_s", of="throughput/step_s", meaning="")
    (curve,) = made.curves
    assert curve.expression == (
        'sum by (run) (rate(ray_rlsys_throughput_learner_idle_s_total{run=~"$run"}[$__rate_interval])) / '
        'sum by (run) (rate(ray_rlsys_throughput_step_s_total{run=~"$run"}[$__rate_interval]))'
    )


def test_what_makes_no_panel_is_refused() -> None:
    with pytest.raises(KeyError):
        grafana.panel("x", "reward/median")
    with pytest.raises(ValueError, match=r"one axis for fraction, nats"):
        grafana.panel("x", "importance/k3", "importance/ess_token")
    with pytest.raises(ValueError, match="no counter"):
        grafana.shares("x", "policy/packing_fill", of="throughput/step_s", meaning="")
