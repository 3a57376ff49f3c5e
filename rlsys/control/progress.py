"""Where a run stands, and the rates between two of its steps."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlsys.control.evaluation import Evaluation
from rlsys.control.ports import FleetStats, RolloutPort, Update, WorkerLost
from rlsys.observability.alarms import Alarm
from rlsys.observability.spans import SpanLog
from rlsys.records import LearnerStep
from rlsys.scheduling.crew import Crew, WorkerCounts
from rlsys.scheduling.ledger import Ledger
from rlsys.versions import PolicyVersion
from rlsys.weights.sync import Ack


class Activity:
    """Which roles have work, and since when they have finished none.

    >>> activity = Activity()
    >>> with activity.of("reward"):
    ...     sorted(activity.idle_s())
    ['reward']
    >>> activity.idle_s()
    {'reward': 0.0}
    """

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    @contextmanager
    def of(self, role: str) -> Iterator[None]:
        """A piece of work for a role; its end counts, however it ends."""
        if not self._under_way[role]:
            self._since[role] = time.monotonic()
        self._under_way[role] += 1
        try:
            yield
        finally:
            self._under_way[role] -= 1
            self._since[role] = time.monotonic()

    def idle_s(self) -> dict[str, float]:
        """Seconds since each role finished something; 0 while it has nothing to do."""
        now = time.monotonic()
        return {role: now - since if self._under_way[role] else 0.0 for role, since in self._since.items()}


@dataclass(slots=True)
class Progress:
    """What `status` shows while the loop runs."""

    version: PolicyVersion = 0
    published_version: PolicyVersion = -1
    metrics: dict[str, float | None] = field(default_factory=dict)
    acks: dict[str, Ack] = field(default_factory=dict)
    evaluations: dict[PolicyVersion, Evaluation] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()
    window: float = 0.0
    spans: SpanLog = field(default_factory=SpanLog)
    activity: Activity = field(default_factory=Activity)
    crews: Mapping[str, Crew] = field(default_factory=dict)

    @property
    def workers(self) -> dict[str, WorkerCounts]:
        """Desired and actual workers by role."""
        return {role: crew.counts for role, crew in self.crews.items()}


STATS_TIMEOUT_S = 5.0
"""A worker that does not answer within this time is left out of a step's rates."""

_NOTHING = FleetStats(generated_tokens=0, busy_s=0.0, paused_s=0.0, workers=0)


class StepClock:
    """Rates between two learner steps, from its making on; `fleet`: the workers' counters at that time."""

    def __init__(self, fleet: Mapping[str, FleetStats]) -> None:
        self._step_end = self._fleet_end = self._wait_start = time.perf_counter()
        self._idle = 0.0
        self._fleet = dict(fleet)

    def waiting(self) -> None:
        """The learner asks for a batch."""
        self._wait_start = time.perf_counter()

    def learning(self) -> None:
        """It got one."""
        self._idle = time.perf_counter() - self._wait_start

    def step(self, step: LearnerStep) -> dict[str, float | None]:
        """Since the previous learner step: its length, the learner's wait for a batch, trained tokens per second."""
        now = time.perf_counter()
        elapsed, self._step_end = now - self._step_end, now
        return {
            "throughput/step_s": elapsed,
            "throughput/learner_idle_s": self._idle,
            "throughput/learner_s": step.seconds,
            "throughput/trained_tokens_per_s": step.trained_tokens / elapsed,
        }

    def fleet(self, stats: Mapping[str, FleetStats]) -> dict[str, float | None]:
        """Since the previous call: generated tokens per second, share of time not decoding, seconds paused.

        `stats` by worker; what one did since it last answered counts when it answers again.
        """
        now = time.perf_counter()
        elapsed, self._fleet_end = now - self._fleet_end, now
        before = {name: self._fleet.get(name, _NOTHING) for name in stats}
        self._fleet |= stats
        busy = sum(s.busy_s - before[name].busy_s for name, s in stats.items()) / (elapsed * max(1, len(stats)))
        tokens = sum(s.generated_tokens - before[name].generated_tokens for name, s in stats.items())
        return {
            "throughput/generated_tokens_per_s": tokens / elapsed,
            "throughput/rollout_idle_fraction": min(1.0, max(0.0, 1 - busy)),
            "weight_sync/pause_s": sum(s.paused_s - before[name].paused_s for name, s in stats.items()),
        }


async def ask_fleet(workers: Mapping[str, RolloutPort]) -> dict[str, FleetStats]:
    """Counters by rollout worker; one that is gone or does not answer is left out."""

    async def ask(port: RolloutPort) -> FleetStats | None:
        try:
            return await asyncio.wait_for(port.stats(), STATS_TIMEOUT_S)
        except (WorkerLost, TimeoutError):
            return None

    names, ports = list(workers), list(workers.values())
    answers = await asyncio.gather(*map(ask, ports))
    return {name: stats for name, stats in zip(names, answers, strict=True) if stats is not None}


def sync_metrics(update: Update, progress: Progress) -> dict[str, float | None]:
    """How the newest versions travelled: from the learner's ticket and every worker's latest acknowledgement."""
    acks = list(progress.acks.values())
    return {
        "weight_sync/publish_s": update.ticket.publish_s,
        "weight_sync/bytes": float(update.ticket.manifest.nbytes),
        "weight_sync/apply_s": max((a.apply_s for a in acks), default=None),
        "weight_sync/acked": float(sum(a.version >= progress.published_version for a in acks)),
    }


def ledger_metrics(ledger: Ledger) -> dict[str, float | None]:
    """Groups by state, and ended ones by outcome."""
    counts = ledger.counts()
    rejected = sum(count for name, count in counts.items() if name.startswith(("rejected", "failed")))
    names = ("waiting", "in_flight", "finished", "learning", "trained", "lost", "admitted")
    return {**{f"ledger/{name}": float(counts[name]) for name in names}, "ledger/rejected": float(rejected)}


def worker_metrics(progress: Progress) -> dict[str, float | None]:
    """Workers by role: how many there should be, how many work, how many were started again."""
    return {
        f"workers/{role}/{name}": float(getattr(counts, name))
        for role, counts in progress.workers.items()
        for name in ("desired", "ready", "restarts")
    }
