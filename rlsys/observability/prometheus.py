"""Every metric as a gauge of Ray's metrics endpoint, which Prometheus scrapes on each node.

`importance/ess_token/by_staleness/2` becomes `rlsys_importance_ess_token_by_staleness{run="…", by_staleness="2"}`, to
which Ray adds its own prefix `ray_`. A null metric is set to NaN, which Ray leaves out: no stale value is kept.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlsys.observability.catalogue import PARTS, definition

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

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
    """Gauges of one run. They vanish from the endpoint when this process ends."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Set every gauge, and `rlsys_step`."""
        self._set("rlsys_step", "newest learner step with metrics", {}, step)
        for key, value in metrics.items():
            name, labels = gauge_name(key)
            metric = definition(key)
            # Ray's descriptions are ASCII, so that the formulas stay in the catalogue.
            self._set(name, f"{metric.name} [{metric.unit}]", labels, math.nan if value is None else value)

    def _set(self, name: str, meaning: str, labels: Mapping[str, str], value: float) -> None:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=meaning, tag_keys=("run", *labels))
        self._gauges[name].set(value, tags={"run": self._run, **labels})
