"""The catalogue as a Grafana dashboard over Prometheus: what a panel shows is a list of metric names.

python -m rlsys.observability.grafana > deploy/grafana/rlsys.json

Names, units and meanings come from the catalogue. A run's gauges live in one process and vanish with it, so that every
expression aggregates `by (run)`, and a mean over time is one counter's rate over another's.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

from rlsys.observability.catalogue import CATALOGUE, PARTS
from rlsys.observability.prometheus import LIMIT, STANDING, STEP, gauge_name

UNITS = {"fraction": "percentunit", "s": "s", "bytes": "bytes"}
"""The catalogue's units that Grafana has a format for; another one labels the axis."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = '{run=~"$run"}'
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


@dataclass(frozen=True, slots=True)
class Curve:
    """An expression, and the name of each of its series with labels as `{{label}}`."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Curves that share a unit."""

    title: str
    unit: str
    meaning: str
    curves: tuple[Curve, ...]
    stacked: bool = False
    type: str = "timeseries"


def panel(title: str, *keys: str, limit: str | None = None, stacked: bool = False) -> Panel:
    """Newest values of metrics, a key ending in `/by_staleness` or `/by_sign` being all parts of one.

    `limit`: also that alarm's limit. Raises KeyError for a metric nobody defined, ValueError for two units.
    """
    metrics = [CATALOGUE[_whole(key)] for key in keys]
    units = {metric.unit for metric in metrics}
    if len(units) > 1:
        raise ValueError(f"{title}: one axis for {', '.join(sorted(units))}")
    curves = [_newest(key) for key in keys]
    if limit is not None:
        labels = f'{{run=~"$run", alarm="{limit}"}}'
        curves.append(Curve(f"max by (run) (ray_{LIMIT}{labels})", f"{{{{run}}}} limit of {limit}"))
    meaning = "\n\n".join(f"`{metric.name}`: {metric.meaning}" for metric in dict.fromkeys(metrics))
    return Panel(title=title, unit=units.pop(), meaning=meaning, curves=tuple(curves), stacked=stacked)


def shares(title: str, *keys: str, of: str, meaning: str) -> Panel:
    """What part additive metrics are of another, over time."""
    total = _per_second(of)
    curves = tuple(Curve(f"{_per_second(key)} / {total}", f"{{{{run}}}} {_short(key)}") for key in keys)
    return Panel(title=title, unit="fraction", meaning=meaning, curves=curves)


def _whole(key: str) -> str:
    return key.rsplit("/", 1)[0] if key.endswith(tuple(PARTS)) else key


def _short(key: str) -> str:
    """A metric's name within its area: a panel's title says which that is."""
    return _whole(key).split("/", 1)[1]


def _newest(key: str) -> Curve:
    whole = _whole(key)
    if key == whole:
        return Curve(f"max by (run) (ray_{gauge_name(key)[0]}{RUN})", f"{{{{run}}}} {_short(key)}")
    label = key.removeprefix(whole).strip("/")
    name, _ = gauge_name(f"{key}/{PARTS[label][0]}")
    return Curve(f"max by (run, {label}) (ray_{name}{RUN})", f"{{{{run}}}} {_short(key)} {{{{{label}}}}}")


def _per_second(key: str) -> str:
    if not CATALOGUE[key].additive:
        raise ValueError(f"{key} has no counter: it does not add up over steps")
    return f"sum by (run) (rate(ray_{gauge_name(key)[0]}_total{RUN}[$__rate_interval]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        panel("Reward", "reward/mean", "eval/accuracy"),
        Panel(
            title="Learner step",
            unit="steps",
            meaning="newest learner step with metrics",
            curves=(Curve(f"max by (run) (ray_{STEP}{RUN})", "{{run}}"),),
        ),
        Panel(
            title="Alarms",
            unit="",
            meaning="1 while an alarm stands; `events.jsonl` has its cause and what to change",
            curves=(Curve(f"max by (run, alarm) (ray_{STANDING}{RUN})", "{{run}} {{alarm}}"),),
            type="state-timeline",
        ),
        panel("Distance to the reference", "kl/reference_k3"),
        panel("Entropy", "policy/entropy"),
        panel("Groups without a signal", "advantage/zero_variance_fraction", limit="no_signal"),
    ),
    "Staleness": (
        panel(
            "Age of trained tokens",
            "staleness/mean",
            "staleness/p95",
            "staleness/max",
            "staleness/window",
            "staleness/bound",
        ),
        panel("Where the age is gained", "staleness/in_flight/mean", "staleness/in_queue/mean", stacked=True),
        panel("Tokens beyond the bound", "staleness/violations"),
        panel("Age of the weights that sample", "weight_sync/serving_lag_max", limit="sync_not_acknowledged"),
        panel("Rejected groups", "staleness/rejected_groups"),
        panel("Length of what is trained", "staleness/trained_length", "policy/response_tokens"),
    ),
    "Importance": (
        panel("ESS of responses, by staleness", "importance/ess_sequence/by_staleness", limit="ess_low"),
        panel("ESS of tokens, by staleness", "importance/ess_token/by_staleness"),
        panel("ESS after truncation at the cap", "importance/ess_sequence_truncated", "importance/ess_token_truncated"),
        panel("Divergence from what sampled", "importance/k1", "importance/k3", limit="divergence_high"),
        panel("k3 by staleness", "importance/k3/by_staleness"),
        panel(
            "Where it comes from, k3",
            "split/drift/k3",
            "split/lag/k3",
            "split/engine/k3",
            "split/engine_later_spans/k3",
            limit="engine_mismatch",
        ),
        panel("χ² of the weights", "importance/chi2_token", "importance/chi2_sequence"),
        panel("Mean weight", "importance/mean_weight_token", "importance/mean_weight_sequence"),
        panel(
            "Tails of the log-ratio",
            "importance/log_ratio_p01",
            "importance/log_ratio_p50",
            "importance/log_ratio_p99",
            "importance/log_ratio_abs_max",
        ),
        panel("Clipped tokens, by sign of the advantage", "importance/clip_fraction/by_sign"),
        panel(
            "Tokens the correction touches",
            "importance/outside_fraction",
            "importance/masked_fraction",
            "importance/truncated_fraction",
            "importance/clamped_fraction",
        ),
        panel("Gap between the two views", "importance/linearization_gap"),
    ),
    "Fleet": (
        panel("Rollout workers", "workers/rollout/desired", "workers/rollout/ready", "weight_sync/acked"),
        panel("Reward workers", "workers/reward/desired", "workers/reward/ready"),
        panel("Started again", "workers/rollout/restarts", "workers/reward/restarts"),
        panel("Open groups", "ledger/waiting", "ledger/in_flight", "ledger/finished", "ledger/learning", stacked=True),
        panel("Ended groups", "ledger/trained", "ledger/rejected", "ledger/lost"),
        panel("Publishing a version", "weight_sync/publish_s", "weight_sync/apply_s"),
        panel("Size of a version", "weight_sync/bytes"),
    ),
    "Throughput": (
        panel("Tokens", "throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s"),
        panel("Seconds of a step", "throughput/step_s", "throughput/learner_s", "throughput/learner_idle_s"),
        shares(
            "The learner's time",
            "throughput/learner_s",
            "throughput/learner_idle_s",
            of="throughput/step_s",
            meaning="share of the wall time that the learner updates, and that it waits for a batch",
        ),
        panel("Rollout workers without work", "throughput/rollout_idle_fraction"),
        shares(
            "Decoding paused for weights",
            "weight_sync/pause_s",
            of="throughput/step_s",
            meaning="seconds all workers together stood still for syncs, by second of wall time",
        ),
        panel("Learner's forward pass spent on real tokens", "policy/packing_fill"),
    ),
}


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model: one row a subject, three panels beside each other, a choice of data source and runs."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, y, COLUMNS, 1),
            }
        )
        y += 1
        for i, one in enumerate(row):
            x = i * WIDTH % COLUMNS
            place = _at(x, y + i * WIDTH // COLUMNS * HEIGHT, WIDTH, HEIGHT)
            panels.append({"id": len(panels) + 1, **_drawn(one), "gridPos": place})
        y += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
    return {
        "uid": "rlsys",
        "title": "rlsys",
        "description": "Written by `python -m rlsys.observability.grafana` from the metric catalogue.",
        "tags": ["rlsys"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_choice_of_source(), _choice_of_runs()]},
        "annotations": {"list": [_alerts()]},
        "panels": panels,
    }


def _at(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _drawn(one: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if one.type == "timeseries":
        stacking = {"mode": "normal" if one.stacked else "none", "group": "A"}
        label = "" if one.unit in UNITS else one.unit
        custom = {
            "showPoints": "never",
            "fillOpacity": 30 if one.stacked else 0,
            "stacking": stacking,
            "axisLabel": label,
        }
    return {
        "type": one.type,
        "title": one.title,
        "description": one.meaning,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": UNITS.get(one.unit, "short"), "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": curve.expression, "legendFormat": curve.legend}
            for i, curve in enumerate(one.curves)
        ],
    }


def _choice_of_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _choice_of_runs() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": f"label_values(ray_{STEP}, run)", "refId": "runs"},
        "refresh": 2,  # whenever the time range changes
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Rlsys.+", alertstate="firing", run=~"$run"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{run}}",
    }


def text() -> str:
    """The dashboard as it is kept."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
