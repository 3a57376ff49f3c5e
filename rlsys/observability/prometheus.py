"""Every metric on Ray's metrics endpoint, which Prometheus scrapes on each node.

`importance/ess_token/by_staleness/2` becomes `rlsys_importance_ess_token_by_staleness{run="…", by_staleness="2"}`, to
which Ray adds its own prefix `ray_`. A null metric is set to NaN, which Ray leaves out: no stale value is kept.

A gauge holds the newest step only. What adds up over steps is therefore also a counter, `…_total`, so that a mean over
any time is the rate of one counter over the rate of another. Alarms have their state and their limit as gauges, so
that alert rules judge a run by its own limits.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlsys.config.schema import RunConfig
from rlsys.observability.alarms import Alarm, watched
from rlsys.observability.catalogue import PARTS, definition

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

STEP = "rlsys_step"
STANDING = "rlsys_alarm_standing"
LIMIT = "rlsys_alarm_limit"

_RESTRICTED = re.compile(rf"(.+)/({'|'.join(PARTS)})/(.+)")


def gauge_name(key: str) -> tuple[str, dict[str, str]]:
    """Prometheus name and labels of a metric.

    >>> gauge_name("staleness/mean")
    ('rlsys_staleness_mean', {})
    >>> gauge_name("importance/k3/by_staleness/4+")
    ('rlsys_importance_k3_by_staleness', {'by_staleness': '4+'})
    """
    match = _RESTRICTED.fullmatch(key)
    name, labels = (f"{match[1]}/{match[2]}", {match[2]: match[3]}) if match else (key, {})
    return "rlsys_" + name.replace("/", "_"), labels


class Prometheus:
    """Gauges and counters of one run. The gauges vanish from the endpoint when this process ends."""

    def __init__(self, config: RunConfig) -> None:
        self._run, self._step = config.name, 0
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._last: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}
        for rule in watched(config):
            self._stands(rule.name, rule.severity, False)
            self._set(LIMIT, "limit of an alarm", {"alarm": rule.name}, rule.limit)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Set every gauge, and `rlsys_step`, which an evaluation or an audit that was late does not set back."""
        self._step = max(self._step, step)
        self._set(STEP, "newest learner step with metrics", {}, self._step)
        for key, value in metrics.items():
            name, labels = gauge_name(key)
            metric = definition(key)
            # Ray's descriptions are ASCII, so that the formulas stay in the catalogue.
            meaning = f"{metric.name} [{metric.unit}]"
            self._set(name, meaning, labels, math.nan if value is None else value)
            if metric.additive and value:
                self._add(name, meaning, value)

    def refresh(self) -> None:
        """Set every gauge to what it was: Ray drops one that is not set anew within two of its export intervals."""
        for (name, _), (value, tags) in self._last.items():
            self._gauges[name].set(value, tags=tags)

    def alarm(self, alarm: Alarm) -> None:
        """An alarm was raised or cleared."""
        self._stands(alarm.name, alarm.severity, alarm.state == "raised")

    def _stands(self, alarm: str, severity: str, stands: bool) -> None:
        self._set(STANDING, "1 while an alarm stands", {"alarm": alarm, "severity": severity}, float(stands))

    def _set(self, name: str, meaning: str, labels: Mapping[str, str], value: float) -> None:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=meaning, tag_keys=("run", *labels))
        tags = {"run": self._run, **labels}
        self._last[name, tuple(labels.values())] = value, tags
        self._gauges[name].set(value, tags=tags)

    def _add(self, name: str, meaning: str, value: float) -> None:
        from ray.util.metrics import Counter

        if name not in self._counters:
            self._counters[name] = Counter(f"{name}_total", description=meaning, tag_keys=("run",))
        self._counters[name].inc(value, tags={"run": self._run})
