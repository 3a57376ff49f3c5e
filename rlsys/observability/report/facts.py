"""The numbers that a run comes to: the same for the page of one run, a comparison of several, and programs.

A mean of a metric is the mean over learner steps of its value at each step. `first` and `last` rewards are means over
the first and the last tenth of the steps. With Σ over steps, the share of time that

    the learner waited      Σ throughput/learner_idle_s / Σ throughput/step_s
    the learner computed    Σ throughput/learner_s / Σ throughput/step_s
    decoding stood still    Σ weight_sync/pause_s / Σ (throughput/step_s · workers/rollout/ready)

where a step that does not say how many workers were ready counts with rollout.workers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rlsys.observability.report.document import number, percent, seconds, size
from rlsys.observability.report.record import RunRecord

Value = float | None


@dataclass(frozen=True, slots=True)
class Fact:
    """One number of a run. `show` makes it text; `group` is the table of a comparison it stands in."""

    name: str
    label: str
    group: str
    compute: Callable[[RunRecord], Value]
    show: Callable[[Value], str] = number


def tenth(run: RunRecord, name: str, *, last: bool) -> Value:
    """Mean over the first or the last tenth of the steps, at least one."""
    values = run.values(name)
    n = max(1, round(len(values) / 10))
    part = values[-n:] if last else values[:n]
    return sum(part) / len(part) if part else None


def share(run: RunRecord, part: str, whole: str = "throughput/step_s") -> Value:
    """Σ part / Σ whole over the steps; None where either is missing."""
    above, below = run.total(part), run.total(whole)
    return None if above is None or not below else above / below


def accuracy(run: RunRecord, place: str) -> Value:
    """Of the first, the last or the best evaluation."""
    values = run.values("eval/accuracy")
    if not values:
        return None
    return {"first": values[0], "last": values[-1], "best": max(values)}[place]


def best_step(run: RunRecord) -> Value:
    """The first step with the best accuracy."""
    series = run.series("eval/accuracy")
    return max(series, key=lambda point: point[1])[0] if series else None


def wall(run: RunRecord) -> Value:
    """Seconds from the first line of the metrics to the last, a pause between interruption and resumption included."""
    times = [row["time"] for row in (*run.steps, *run.evaluations) if "time" in row]
    return max(times) - min(times) if times else None


def paused(run: RunRecord) -> Value:
    """Share of the workers' time that decoding stood still for weight syncs."""
    stood, configured = run.total("weight_sync/pause_s"), run.setting("rollout.workers") or 1
    ready = dict(run.series("workers/rollout/ready"))
    there = sum(length * ready.get(step, configured) for step, length in run.series("throughput/step_s"))
    return None if stood is None or not there else stood / there


def rejected(run: RunRecord) -> Value:
    """Groups with an end other than trained."""
    return float(run.ended.total() - run.ended["trained"]) if run.ends else None


def standing(run: RunRecord) -> Value:
    """Alarms that were never cleared."""
    return float(sum(alarm.cleared is None for alarm in run.alarms)) if run.alarms or watched(run) else None


def raised(run: RunRecord) -> Value:
    """Alarms raised, cleared ones included."""
    return float(len(run.alarms)) if run.alarms or watched(run) else None


def watched(run: RunRecord) -> bool:
    """Whether the run watched for alarms at all."""
    return bool(run.series("alarms/raised"))


FACTS = (
    Fact("steps", "learner steps", "outcome", lambda r: float(r.steps[-1]["step"]) if r.steps else None),
    Fact("accuracy_first", "held-out accuracy, first", "outcome", lambda r: accuracy(r, "first")),
    Fact("accuracy_last", "held-out accuracy, last", "outcome", lambda r: accuracy(r, "last")),
    Fact("accuracy_best", "held-out accuracy, best", "outcome", lambda r: accuracy(r, "best")),
    Fact("accuracy_best_step", "step of the best accuracy", "outcome", best_step),
    Fact("reward_first", "reward, first tenth of the steps", "outcome", lambda r: tenth(r, "reward/mean", last=False)),
    Fact("reward_last", "reward, last tenth of the steps", "outcome", lambda r: tenth(r, "reward/mean", last=True)),
    Fact("wall_s", "wall time, first to last record", "outcome", wall, seconds),
    Fact("train_s", "wall time of the learner steps", "outcome", lambda r: r.total("throughput/step_s"), seconds),
    Fact("staleness_mean", "staleness, mean", "staleness", lambda r: r.mean("staleness/mean")),
    Fact(
        "staleness_p95", "staleness, 95th percentile, mean over steps", "staleness", lambda r: r.mean("staleness/p95")
    ),
    Fact("staleness_max", "staleness, oldest trained token", "staleness", lambda r: r.largest("staleness/max")),
    Fact("staleness_bound", "staleness, bound", "staleness", lambda r: r.last("staleness/bound")),
    Fact("staleness_violations", "tokens beyond the bound", "staleness", lambda r: r.total("staleness/violations")),
    Fact("staleness_in_flight", "of the mean, in flight", "staleness", lambda r: r.mean("staleness/in_flight/mean")),
    Fact("staleness_in_queue", "of the mean, in the queue", "staleness", lambda r: r.mean("staleness/in_queue/mean")),
    Fact("ess_token", "ESS over tokens", "importance", lambda r: r.mean("importance/ess_token")),
    Fact("ess_sequence", "ESS over responses", "importance", lambda r: r.mean("importance/ess_sequence")),
    Fact("k3", "k3 to what sampled, nats a token", "importance", lambda r: r.mean("importance/k3")),
    Fact("clip_fraction", "tokens clipped", "importance", lambda r: r.mean("importance/clip_fraction"), percent),
    Fact("masked_fraction", "tokens masked", "importance", lambda r: r.mean("importance/masked_fraction"), percent),
    Fact("linearization_gap", "linearization gap", "importance", lambda r: r.mean("importance/linearization_gap")),
    Fact("split_drift_k3", "split: drift, k3", "importance", lambda r: r.mean("split/drift/k3")),
    Fact("split_lag_k3", "split: lag, k3", "importance", lambda r: r.mean("split/lag/k3")),
    Fact("split_engine_k3", "split: engine mismatch, k3", "importance", lambda r: r.mean("split/engine/k3")),
    Fact("audit_cosine", "audit: cosine to a fresh gradient", "importance", lambda r: r.mean("audit/cosine")),
    Fact("kl_reference", "KL to the reference (k3), last step", "importance", lambda r: r.last("kl/reference_k3")),
    Fact("entropy", "entropy of the policy, last step", "importance", lambda r: r.last("policy/entropy")),
    Fact("generated", "generated tokens/s", "system", lambda r: r.mean("throughput/generated_tokens_per_s")),
    Fact("trained", "trained tokens/s", "system", lambda r: r.mean("throughput/trained_tokens_per_s")),
    Fact("learner_busy", "learner computed", "system", lambda r: share(r, "throughput/learner_s"), percent),
    Fact("learner_idle", "learner waited", "system", lambda r: share(r, "throughput/learner_idle_s"), percent),
    Fact("rollout_idle", "rollout idle", "system", lambda r: r.mean("throughput/rollout_idle_fraction"), percent),
    Fact("paused", "decoding stood still for syncs", "system", paused, percent),
    Fact("apply_s", "weight sync, sent to acknowledged", "system", lambda r: r.mean("weight_sync/apply_s"), seconds),
    Fact("bytes", "size of a version", "system", lambda r: r.last("weight_sync/bytes"), size),
    Fact("groups_trained", "groups trained", "system", lambda r: float(r.ended["trained"]) if r.ends else None),
    Fact("groups_rejected", "groups rejected or failed", "system", rejected),
    Fact("groups_lost", "groups lost", "system", lambda r: r.largest("ledger/lost")),
    Fact("alarms", "alarms raised", "system", raised),
    Fact("alarms_standing", "alarms that stand", "system", standing),
)

BY_NAME = {fact.name: fact for fact in FACTS}


def facts(run: RunRecord) -> dict[str, Value]:
    """All of them by name."""
    return {fact.name: fact.compute(run) for fact in FACTS}


def shown(run: RunRecord, name: str) -> str:
    """One of them as text."""
    fact = BY_NAME[name]
    return fact.show(fact.compute(run))
