"""Alarms: what a run shows when its numbers say that it goes wrong, with the likely cause and what to change.

A rule looks at the metrics of one learner step. An alarm is raised after `patience` steps in a row beyond the limit,
so that one noisy batch is no alarm, and cleared after as many within it; what must never happen is raised at once.
Calibration: k3 of about 1e-3 is an ordinary engine mismatch in bfloat16 and at most 1e-5 in float32;
τ_M2 = 0.04 means k3 ≈ 0.02 and an ESS of 0.96 a token.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rlsys.config.schema import RunConfig
from rlsys.observability.catalogue import PARTS

Metrics = Mapping[str, float | None]
State = Literal["raised", "cleared"]
Severity = Literal["warning", "critical"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """An alarm that was raised or cleared at learner step `step`, `value` being beyond or within `limit`."""

    name: str
    state: State
    severity: Severity
    step: int
    value: float | None
    limit: float | None
    cause: str
    advice: str

    @property
    def message(self) -> str:
        """One line for people."""
        value = "" if self.value is None else f" {self.value:.4g}"
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        if self.state == "cleared":
            return f"{self.name} cleared:{value or ' all is well'}{limit}"
        return f"{self.name}:{value}{limit}. {self.cause} {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`measure` gives the number that must not be above `limit` (below it, when `below`); None: nothing to judge."""

    name: str
    measure: Callable[[Metrics], float | None]
    limit: float
    cause: str
    advice: str
    below: bool = False
    severity: Severity = "warning"
    at_once: bool = False

    def beyond(self, value: float) -> bool:
        """Whether a value is beyond the limit; NaN is."""
        return not (value >= self.limit if self.below else value <= self.limit)


class Alarms:
    """Those that stand, and those each step changes."""

    def __init__(self, config: RunConfig) -> None:
        self._patience = config.alarms.patience
        self._stalled_s = config.alarms.stalled_s
        self._rules = rules(config)
        self._streak: dict[str, int] = {}
        self._standing: dict[str, Alarm] = {}

    @property
    def standing(self) -> tuple[Alarm, ...]:
        """Alarms raised and not yet cleared."""
        return tuple(self._standing.values())

    def after_step(self, step: int, metrics: Metrics) -> list[Alarm]:
        """What the metrics of a learner step raise and clear."""
        changed: list[Alarm | None] = []
        for rule in self._rules:
            value = rule.measure(metrics)
            if value is not None:
                changed.append(self._judge(rule, step, value, 1 if rule.at_once else self._patience))
        return [alarm for alarm in changed if alarm is not None]

    def idle(self, step: int, idle_s: Mapping[str, float]) -> list[Alarm]:
        """Roles that have work and finish none: seconds by role."""
        if self._stalled_s is None:
            return []
        changed = [self._judge(_stalled(role, self._stalled_s), step, s, 1) for role, s in idle_s.items()]
        return [alarm for alarm in changed if alarm is not None]

    def refused(self, step: int) -> list[Alarm]:
        """The learner refused a batch: loss or gradient was not finite."""
        alarm = self._judge(_NOT_FINITE, step, math.nan, 1)
        return [alarm] if alarm is not None else []

    def applied(self, step: int) -> list[Alarm]:
        """The learner applied a batch."""
        alarm = self._judge(_NOT_FINITE, step, 0.0, 1)
        return [alarm] if alarm is not None else []

    def _judge(self, rule: Rule, step: int, value: float, patience: int) -> Alarm | None:
        standing, beyond = rule.name in self._standing, rule.beyond(value)
        self._streak[rule.name] = self._streak.get(rule.name, 0) + 1 if beyond != standing else 0
        if self._streak[rule.name] < patience:
            return None
        self._streak[rule.name] = 0
        alarm = Alarm(
            name=rule.name,
            state="raised" if beyond else "cleared",
            severity=rule.severity,
            step=step,
            value=None if math.isnan(value) else value,
            limit=rule.limit,
            cause=rule.cause,
            advice=rule.advice,
        )
        if beyond:
            self._standing[rule.name] = alarm
        else:
            del self._standing[rule.name]
        return alarm


def rules(config: RunConfig) -> list[Rule]:
    """The rules of a run, those without a limit left out."""
    limits, staleness = config.alarms, config.staleness
    exact = config.model.dtype == config.rollout.dtype == "float32"
    engine = limits.engine_k3_max if limits.engine_k3_max is not None else (1e-5 if exact else 3e-3)
    found = [
        Rule(
            name="staleness_violation",
            measure=_metric("staleness/violations"),
            limit=0,
            severity="critical",
            at_once=True,
            cause="A token older than the promised bound was trained, which the ledger and the router rule out.",
            advice="This is a defect of rlsys: keep the run's directory and report it.",
        ),
        Rule(
            name="groups_lost",
            measure=_metric("ledger/lost"),
            limit=0,
            severity="critical",
            at_once=True,
            cause="A prompt left the ledger without a named end.",
            advice="This is a defect of rlsys: keep the run's directory and report it.",
        ),
        Rule(
            name="engine_mismatch",
            measure=_metric("split/engine/k3"),
            limit=engine,
            cause="The engine's log-probabilities differ from the learner's under the same weights.",
            advice="Look for different precision (rollout.dtype, model.dtype), a sampling option that the learner does "
            "not apply, or weights that did not arrive; objective.correction.name=tis bounds what it does.",
        ),
    ]
    if limits.ess_sequence_min is not None:
        found.append(
            Rule(
                name="ess_low",
                measure=_lowest([f"importance/ess_sequence/by_staleness/{part}" for part in PARTS["by_staleness"]]),
                limit=limits.ess_sequence_min,
                below=True,
                cause="The policy has moved far from what sampled the data: a few responses outweigh all others.",
                advice=f"Lower staleness.max={staleness.max} or learner.lr, or let staleness.controller=ess do it.",
            )
        )
    if limits.k3_max is not None:
        found.append(
            Rule(
                name="divergence_high",
                measure=_metric("importance/k3"),
                limit=limits.k3_max,
                cause="A step changes the policy faster than clipping or the correction can account for.",
                advice="Lower learner.lr or staleness.max, or choose a correction (objective.correction.name=tis or m2)"
                "; the split says whether it is drift, lag or the engine.",
            )
        )
    if limits.zero_variance_max is not None:
        found.append(
            Rule(
                name="no_signal",
                measure=_metric("advantage/zero_variance_fraction"),
                limit=limits.zero_variance_max,
                cause="In nearly all groups every response got the same reward, so that they teach nothing.",
                advice="Take harder or easier prompts, more rollout.samples_per_prompt, or stop: the task is solved.",
            )
        )
    if limits.ack_lag_max is not None:
        found.append(
            Rule(
                name="sync_not_acknowledged",
                measure=_metric("weight_sync/serving_lag_max"),
                limit=limits.ack_lag_max,
                cause="A rollout worker still serves an old version: it does not take the new ones.",
                advice="See `sync_failed` in events.jsonl; the worker gets no prompts until it serves a newer version.",
            )
        )
    return found


def watched(config: RunConfig) -> list[Rule]:
    """Every rule that can raise an alarm in a run: those that judge steps, a refused batch, roles that stall."""
    stalled_s = config.alarms.stalled_s
    stalled = [] if stalled_s is None else [_stalled(role, stalled_s) for role in ("rollout", "reward", "learner")]
    return [*rules(config), _NOT_FINITE, *stalled]


_NOT_FINITE = Rule(
    name="not_finite",
    measure=lambda metrics: None,
    limit=0,
    severity="critical",
    cause="Loss or gradient of a batch was NaN or infinite; the batch was refused and the policy kept.",
    advice="Look at rollouts/refused-*.parquet; lower learner.lr, or truncate the weights (objective.correction).",
)


def _stalled(role: str, limit: float) -> Rule:
    return Rule(
        name=f"stalled_{role}",
        measure=lambda metrics: None,
        limit=limit,
        severity="critical",
        cause=f"The {role} role has work and has finished none for that many seconds.",
        advice="Look at its process: is it alive, starved of CPU or memory, or waiting for something outside?",
    )


def _metric(name: str) -> Callable[[Metrics], float | None]:
    return lambda metrics: metrics.get(name)


def _lowest(names: Iterable[str]) -> Callable[[Metrics], float | None]:
    def measure(metrics: Metrics) -> float | None:
        return min((value for name in names if (value := metrics.get(name)) is not None), default=None)

    names = tuple(names)
    return measure
