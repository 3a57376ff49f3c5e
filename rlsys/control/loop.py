"""The algorithm: four small loops over one ledger.

      admit ──► ledger ──► roll out ──► assemble ──► learn ──► publish
        ▲      (slots)    (fleet, rewards) (batches)  (step)       │
        └──────────── a slot is freed by the commit ◄──────────────┤
                      workers serve the new version mid-generation ┘

A single controller owns admission, routing, batch order and publication; every other part is a callee
behind a port. The loops share a ledger and a router and wake each other through one `Signal`; beside them
a `Reconciler` lets workers come and go.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from rlsys.config.schema import RunConfig
from rlsys.control.evaluation import evaluate, scored
from rlsys.control.history import Batch, History
from rlsys.control.ports import FinishedGroup, Parts, PayloadLost, RolloutPort, WorkerLost
from rlsys.control.progress import Progress
from rlsys.control.reconcile import Reconciler
from rlsys.control.watch import collect_spans, watch
from rlsys.errors import ClusterError, EngineError, PromptRefused, RewardError, StalenessViolation, first_failure
from rlsys.records import Prompt
from rlsys.scheduling.ledger import End, Ledger, Slot
from rlsys.scheduling.routing import Router, Worker, groups_per_worker
from rlsys.scheduling.signal import Signal
from rlsys.scheduling.window import AimdWindow
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket

log = logging.getLogger(__name__)

MAX_FAILED_IN_A_ROW = 16
"""Groups that may fail one after another before the run stops: a broken reward is not a hard prompt."""

MAX_ATTEMPTS = 5
"""Workers that one prompt may cost before it is given up: it could be the one that kills them."""


class TrainingLoop:
    """Runs a configured number of learner steps. One instance, one run of `run()`."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        *,
        ledger: Ledger,
        eval_prompts: Sequence[Prompt],
        version: PolicyVersion = 0,
        reopened: Sequence[Prompt] = (),
        window: float | None = None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.ledger = ledger
        capacity = groups_per_worker(config.rollout.max_concurrent_sequences, config.rollout.samples_per_prompt)
        self.router = Router(max_lag=config.staleness.lag, capacity=capacity)
        self.progress = Progress(version=version, window=float(config.staleness.max))
        self.history = History(config, parts, ledger, self.router, self.progress)
        self._eval_prompts = eval_prompts
        self._reopened = list(reopened)
        self._finished: dict[int, FinishedGroup] = {}
        self._batch: Batch | None = None
        self._signal = Signal()
        self._stopping = False
        self._failed_in_a_row = 0
        self._saved_version: PolicyVersion | None = None
        self._publication: asyncio.Task[None] | None = None
        self._evaluating = asyncio.Lock()
        self._tasks: asyncio.TaskGroup | None = None
        self._spawned: set[asyncio.Task[None]] = set()
        self.workers = Reconciler(
            config,
            parts,
            ledger=ledger,
            router=self.router,
            progress=self.progress,
            signal=self._signal,
            spawn=self._spawn,
        )
        staleness = config.staleness
        self._window = AimdWindow(
            target=staleness.ess.target,
            increase=staleness.ess.increase,
            decrease=staleness.ess.decrease,
            widest=float(staleness.max - staleness.lag),
            start=window,
        )
        self._fit_window(None)

    @property
    def version(self) -> PolicyVersion:
        """Learner version: optimizer steps applied."""
        return self.progress.version

    def stop(self) -> None:
        """Finish the step that is running, then return from `run`."""
        self._stopping = True
        self._signal.notify()

    async def run(self) -> None:
        """Until `learner.steps` steps are done or `stop()` is called. The first failure ends all loops."""
        for name in self.parts.rollouts:
            self.router.add(name)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._spawn(self._watch_weights(), "watch weights")
                self._spawn(self.workers.run(), "reconcile")
                await self._publish(await self.parts.learner.publish())
                await self._settle_publication()
                await self._evaluate()
                await self.history.start()
                for loop in (self._admit, self._roll_out, self._assemble, self.history.run):
                    self._spawn(loop(), loop.__name__)
                if self.parts.roles:
                    self._spawn(watch(self.parts, self.progress, self.history), "watch")
                try:
                    await self._learn()
                except Exception:  # what was learned, or refused, before is still written down
                    await self.history.written()
                    raise
                await self._settle_publication()
                await self.history.written()
                if self.version > 0:
                    await self._evaluate()
                await collect_spans(self.parts, self.progress)
                for task in self._spawned:
                    task.cancel()
        except* Exception as failures:
            failure = first_failure(failures)
            if isinstance(failure, WorkerLost | PayloadLost):
                failure = ClusterError(f"a part of the run died; --resume goes on from its last checkpoint: {failure}")
            raise failure from None

    # -- the four loops ---------------------------------------------------------------------------------------------

    async def _admit(self) -> None:
        """Consumes prompts, produces waiting slots; waits for room in the ledger; a commit or an end unblocks it."""
        while True:
            await self._signal.until(lambda: self.ledger.has_room)
            prompt = self._reopened.pop(0) if self._reopened else next(self.parts.prompts)
            self.ledger.admit(prompt, self.version)
            self._signal.notify()

    async def _roll_out(self) -> None:
        """Consumes waiting slots, produces finished ones; waits for a slot and a fresh worker with room.

        An admission, a returned slot, an acknowledgement or a finished group unblocks it.
        """
        while True:
            await self._signal.until(lambda: None not in (self.ledger.next_waiting(), self.router.choose(self.version)))
            slot, worker = self.ledger.next_waiting(), self.router.choose(self.version)
            assert slot is not None
            assert worker is not None
            attempt = self.ledger.start(slot.id, worker.name)
            worker.in_flight += 1
            self._spawn(self._serve(slot, attempt, worker, self.parts.rollouts[worker.name]), f"slot {slot.id}")

    async def _assemble(self) -> None:
        """Consumes finished slots in admission order, produces batches with their reference scores under way.

        Waits for P finished slots (and the backlog) within the window, and for the learner to take the previous batch.
        """
        groups = self.config.rollout.prompts_per_step
        backlog = self.config.staleness.backlog * groups
        while True:
            await self._signal.until(
                lambda: (
                    self._batch is None
                    and self.ledger.batch_ready(groups, min(backlog, self.ledger.admitting - groups))
                )
            )
            slots = self.ledger.take_batch(groups)
            finished = [self._finished.pop(slot.id) for slot in slots]
            reference = self.parts.reference.score([g.payload for g in finished]) if self.parts.reference else None
            self._batch = Batch(slots, finished, reference)
            self._signal.notify()

    async def _learn(self) -> None:
        """Consumes batches, produces versions; waits for a batch; its commit frees the batch's slots.

        A batch that the learner refused makes no version and is not published: its slots are rejected. One that a
        node took along before the learner had it is sampled again.
        """
        while batch := await self._next_batch():
            self._check_staleness(batch)
            try:
                with self.progress.activity.of("learner"):
                    update = await self.parts.learner.update(batch.groups, batch.reference)
            except PayloadLost as error:
                self._sample_again(batch, error)
                continue
            if update.step.applied:
                self.progress.version = update.step.version
                await self._publish(update.ticket)
                self.ledger.commit((slot.id for slot in batch.slots), self.version)
                self._fit_window(update.step.metrics.get("importance/ess_sequence"))
            else:
                self._reject(batch)
            self._signal.notify()
            timing = await self.history.add(batch, update)
            if update.step.applied:
                self.workers.after_step(timing)
                self._evaluate_if_due()
                await self._checkpoint_if_due()

    async def _next_batch(self) -> Batch | None:
        """The assembled batch; None when all steps are done or the run is to stop: then its slots stay open."""
        if self.version >= self.config.learner.steps:
            return None
        self.history.clock.waiting()
        await self._signal.until(lambda: self._stopping or self._batch is not None)
        self.history.clock.learning()
        if self._stopping:
            return None
        batch, self._batch = self._batch, None
        self._signal.notify()
        return batch

    # -- what they are made of --------------------------------------------------------------------------------------

    async def _serve(self, slot: Slot, attempt: int, worker: Worker, port: RolloutPort) -> None:
        """One attempt at one slot: sample, score, hand over. A dead worker's slot waits again."""
        try:
            try:
                with self.progress.activity.of("rollout"):
                    summary, payload = await port.generate(slot.id, attempt, slot.prompt)
            finally:
                worker.in_flight -= 1
                self._signal.notify()
            with self.progress.activity.of("reward"):
                score = await scored(self.parts.rewards.score, payload)
        except PayloadLost:
            self.ledger.retry(slot.id, attempt)
        except PromptRefused as error:
            self._fail(slot, attempt, End.FAILED_ROLLOUT, error)
        except RewardError as error:
            self._fail(slot, attempt, End.FAILED_REWARD, error)
        except (WorkerLost, EngineError) as error:
            if attempt < MAX_ATTEMPTS or self.workers.dismissed(worker.name):
                self.ledger.retry(slot.id, attempt)
            else:
                self._fail(
                    slot, attempt, End.FAILED_ROLLOUT, EngineError(f"{attempt} workers were lost on it: {error}")
                )
            self.workers.lost(worker.name, error)
        else:
            self._failed_in_a_row = 0
            if self.ledger.finish(slot.id, attempt):
                self._finished[slot.id] = FinishedGroup(summary=summary, score=score, payload=payload)
        self._signal.notify()

    def _fail(self, slot: Slot, attempt: int, end: End, error: RewardError | EngineError) -> None:
        if not self.ledger.fail(slot.id, attempt, end, self.version):
            return
        self.parts.journal.event(end, f"slot {slot.id}, prompt {slot.prompt.epoch}/{slot.prompt.index}: {error}")
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise type(error)(f"{self._failed_in_a_row} groups in a row failed; the last one: {error}") from error

    def _reject(self, batch: Batch) -> None:
        for slot in batch.slots:
            self.ledger.end(slot.id, End.REJECTED_NONFINITE, self.version)
        self.parts.journal.event(
            End.REJECTED_NONFINITE,
            f"loss or gradient of the batch of slots {batch.slots[0].id}..{batch.slots[-1].id} is not finite; "
            f"the policy stays at version {self.version}",
        )

    def _sample_again(self, batch: Batch, error: PayloadLost) -> None:
        self.ledger.restart(slot.id for slot in batch.slots)
        self.parts.journal.event("batch_lost", f"slots {batch.slots[0].id}..{batch.slots[-1].id}: {error}")
        self._signal.notify()

    def _check_staleness(self, batch: Batch) -> None:
        """The bound on metadata; the learner checks it again on every token."""
        bound = self.config.staleness.max
        for group in batch.groups:
            age = self.version - group.summary.oldest_version
            if age > bound:
                raise StalenessViolation(
                    f"slot {group.summary.slot} holds a token {age} versions old; staleness.max={bound}"
                )

    async def _publish(self, ticket: WeightTicket) -> None:
        """Send a version out once the previous one is served; generation goes on meanwhile."""
        await self._settle_publication()
        self.history.published(ticket)
        self._publication = self._spawn(self.parts.weights.publish(ticket), "publish")

    async def _settle_publication(self) -> None:
        if self._publication is not None:
            await self._publication

    async def _watch_weights(self) -> None:
        """Consumes acknowledgements; tells the router which version each worker serves."""
        cursor = 0
        while True:
            for ack in await self.parts.weights.acks(cursor):
                cursor += 1
                if not self.workers.expects(ack.worker):
                    continue
                if ack.error is None:
                    self.workers.serves(ack.worker)
                    self.router.acknowledge(ack.worker, ack.version)
                    self.progress.published_version = max(self.progress.published_version, ack.version)
                    self.progress.acks[ack.worker] = ack
                else:
                    self.parts.journal.event("sync_failed", f"{ack.worker}, version {ack.version}: {ack.error}")
            self._signal.notify()

    def _fit_window(self, ess: float | None) -> None:
        """`staleness.controller: ess`: admit as much age as the effective sample size of the last step allows."""
        staleness, groups = self.config.staleness, self.config.rollout.prompts_per_step
        if staleness.controller == "ess":
            size = self._window.after(ess)
            self.ledger.admit_up_to(self._window.slots(groups, staleness.window))
            self.progress.window = size + staleness.lag

    async def _evaluate(self) -> None:
        """Greedy accuracy on the held-out prompts, through the rollout workers; once per version, one at a time.

        One that fails is an event: it does not concern training, which notices for itself what is broken.
        """
        version = self.version
        async with self._evaluating:
            if version in self.progress.evaluations or not self._eval_prompts:
                return
            try:
                with self.progress.spans.span("evaluate", version=version):
                    result = await evaluate(self._eval_prompts, list(self.parts.rollouts.values()), self.parts.rewards)
            except (RewardError, EngineError, WorkerLost, PayloadLost) as error:
                self.parts.journal.event("evaluation_failed", f"version {version}: {error}")
                return
            self.progress.evaluations[version] = result
            self.parts.journal.step(version, result.metrics())

    def _evaluate_if_due(self) -> None:
        every = self.config.eval.every
        if every and self.version % every == 0 and self.version < self.config.learner.steps:
            self._spawn(self._evaluate(), "evaluate")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(work, name=name)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    async def _checkpoint_if_due(self) -> None:
        every = self.config.checkpoint.every
        if every and self.version % every == 0 and self.version < self.config.learner.steps:
            await self.checkpoint()

    async def checkpoint(self) -> None:
        """Parameters, optimizer, the prompt cursor, every open prompt and the window, together; once per version.

        The history up to it is written first: a resumed run repeats no step, and so could not write it again.
        """
        if self._saved_version == self.version:
            return
        await self.history.written()
        extra = {
            "source": dict(self.parts.prompts.state()),
            "open": [[slot.prompt.epoch, slot.prompt.index] for slot in self.ledger.open]
            + [[prompt.epoch, prompt.index] for prompt in self._reopened],
            "next_slot": self.ledger.next_id,
            "window": self._window.size,
        }
        directory = self.config.path / "checkpoints" / f"step-{self.version:06d}"
        await self.parts.learner.save(directory, extra)
        self._saved_version = self.version
