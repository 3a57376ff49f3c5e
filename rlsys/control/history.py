"""What a run writes down of every learner step, beside the learn loop, so that learning never waits for it.

learn ──► queue ──► [fleet's counters, probe, audit] ──► metrics ──► alarms ──► parquet
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.config.schema import RunConfig
from rlsys.control.auditing import Auditor
from rlsys.control.ports import FinishedGroup, Parts, Payload, PayloadLost, ProbePort, Update, WorkerLost
from rlsys.control.progress import Progress, StepClock, ask_fleet, ledger_metrics, sync_metrics, worker_metrics
from rlsys.observability.alarms import Alarm, Alarms
from rlsys.scheduling.ledger import Ledger, Slot
from rlsys.scheduling.routing import Router
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket

AHEAD = 8
"""Steps that may wait to be written down; then the learner waits, so that batches do not fill the memory."""


@dataclass(slots=True)
class Batch:
    """P scored groups on their way to the learner, with the reference already scoring them."""

    slots: list[Slot]
    groups: list[FinishedGroup]
    reference: Payload | None


class Tally:
    """Length and reward of what was trained and of what was rejected: does the bound select the data?"""

    def __init__(self) -> None:
        self._groups = self._tokens = self._responses = 0
        self._reward = 0.0

    def add(self, groups: Sequence[FinishedGroup]) -> None:
        """Count groups that ended."""
        for group in groups:
            self._groups += 1
            self._tokens += group.summary.tokens
            self._responses += len(group.score.rewards)
            self._reward += float(group.score.rewards.sum())

    def metrics(self, what: str) -> dict[str, float | None]:
        """Mean length and reward by catalogue name, since the start; None before the first response."""
        n = self._responses
        return {
            f"staleness/{what}_length": self._tokens / n if n else None,
            f"staleness/{what}_reward": self._reward / n if n else None,
        }

    def counts(self) -> dict[str, float | None]:
        """Groups and tokens."""
        return {
            "staleness/rejected_groups": float(self._groups),
            "staleness/rejected_tokens": float(self._tokens),
        }


class History:
    """Consumes finished steps, produces rows, alarms and parquet files.

    What a node took along before it was written down is an event; the step it belongs to is trained all the same.
    """

    def __init__(self, config: RunConfig, parts: Parts, ledger: Ledger, router: Router, progress: Progress) -> None:
        self._config, self._parts = config, parts
        self._ledger, self._router, self._progress = ledger, router, progress
        self._queue: asyncio.Queue[tuple[Batch, Update, dict[str, float | None]]] = asyncio.Queue(AHEAD)
        self._trained, self._rejected = Tally(), Tally()
        self._auditor = Auditor(config.audit, parts.audit, parts.journal) if parts.audit is not None else None
        self._audits: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[dict[str, float | None]] | None = None
        self.clock = StepClock({})
        self.alarms = Alarms(config)

    async def start(self) -> None:
        """Rates count from here."""
        self.clock = StepClock(await ask_fleet(self._parts.rollouts))

    async def add(self, batch: Batch, update: Update) -> dict[str, float | None]:
        """A learner step is over; returns how long what took. Waits only when too many are still to be written."""
        (self._trained if update.step.applied else self._rejected).add(batch.groups)
        timing = self.clock.step(update.step)
        await self._queue.put((batch, update, timing))
        return timing

    def published(self, ticket: WeightTicket) -> None:
        """A version exists, before any batch is trained from it."""
        if self._parts.probe is not None:
            self._parts.probe.keep(ticket)
        if self._auditor is not None:
            self._auditor.published(ticket)

    async def written(self) -> None:
        """Wait until everything is."""
        await self._queue.join()
        await asyncio.gather(*self._audits)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                batch, update, timing = await self._queue.get()
                if update.step.applied:
                    await self._applied(batch, update, timing)
                else:
                    await self._refused(batch, update)
                self._queue.task_done()
        finally:
            for task in (self._probing, *self._audits):
                if task is not None:
                    task.cancel()

    def announce(self, alarms: Sequence[Alarm]) -> None:
        """Put alarms where people look."""
        for alarm in alarms:
            self._parts.journal.alarm(alarm)
        self._progress.alarms = self.alarms.standing

    async def _applied(self, batch: Batch, update: Update, timing: Mapping[str, float | None]) -> None:
        version = update.step.version
        metrics = {
            **update.step.metrics,
            **timing,
            **self.clock.fleet(await ask_fleet(self._parts.rollouts)),
            **sync_metrics(update, self._progress),
            **ledger_metrics(self._ledger),
            **worker_metrics(self._progress),
            **self._rejected.counts(),
            **self._rejected.metrics("rejected"),
            **self._trained.metrics("trained"),
            **await self._probed(batch, update, timing["throughput/step_s"] or 0.0),
            "weight_sync/serving_lag_max": float(self._router.serving_lag_max(self._progress.version)),
            "staleness/bound": float(self._config.staleness.max),
            "staleness/window": self._progress.window,
        }
        self.announce([*self.alarms.applied(version), *self.alarms.after_step(version, metrics)])
        metrics["alarms/raised"] = float(len(self.alarms.standing))
        self._progress.metrics = metrics
        self._parts.journal.step(version, metrics)
        if self._auditor is not None:
            for audit in [audit for audit in self._audits if audit.done()]:
                self._audits.remove(audit)
                audit.result()  # nobody waited for it; what it failed of has to be known
            self._audits.add(asyncio.create_task(self._audit(self._auditor, version, batch.groups)))
        every = self._config.records.rollouts_every
        if every and version % every == 0:
            await self._write(f"step-{version:06d}", batch, update)

    async def _refused(self, batch: Batch, update: Update) -> None:
        version = update.step.version
        self.announce(self.alarms.refused(version))
        await self._write(f"refused-{version:06d}-{batch.slots[0].id:06d}", batch, update)

    async def _write(self, name: str, batch: Batch, update: Update) -> None:
        if self._parts.recorder is None:
            return
        try:
            await self._parts.recorder.write(name, update.step.version, batch.groups, update.arrays)
        except PayloadLost as error:
            self._parts.journal.event("records_lost", f"{name}: {error}")

    async def _probed(self, batch: Batch, update: Update, step_s: float) -> dict[str, float | None]:
        """The split of the log-ratio; left out where waiting for it would soon hold up the learner."""
        if self._parts.probe is None or (self._probing is not None and not self._probing.done()):
            return {}
        if self._probing is not None:
            self._probing.result()  # nobody waited for it; what it failed of has to be known
        self._probing = asyncio.create_task(self._split(self._parts.probe, batch, update))
        spare_s = max(0, AHEAD // 2 - self._queue.qsize()) * step_s
        await asyncio.wait({self._probing}, timeout=spare_s)
        return self._probing.result() if self._probing.done() else {}

    async def _split(self, probe: ProbePort, batch: Batch, update: Update) -> dict[str, float | None]:
        version = update.step.version - 1
        try:
            return await probe.split(version, batch.groups, update.arrays)
        except PayloadLost as error:
            self._parts.journal.event("split_lost", f"version {version}: {error}")
            return {}
        except WorkerLost as error:
            self._parts.journal.event("probe_lost", f"no more splits of the log-ratio: {error}")
            self._parts.probe = None
            return {}

    async def _audit(self, auditor: Auditor, version: PolicyVersion, groups: Sequence[FinishedGroup]) -> None:
        """A row of its own, as an evaluation's: it takes longer than a step, and nothing waits for it."""
        metrics = await auditor.metrics(version, groups)
        if metrics:
            self._parts.journal.step(version, metrics)
