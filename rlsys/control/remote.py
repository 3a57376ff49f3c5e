"""The ports of the control loop over Ray actors. Object references stand for payloads."""

import asyncio
import itertools
import secrets
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors.bundle import Place
from rlsys.actors.rollout import Request, RolloutStats
from rlsys.control.ports import FinishedGroup, FleetStats, MakerLost, Payload, PayloadLost, WorkerLost
from rlsys.errors import RlsysError
from rlsys.observability.spans import Span
from rlsys.records import GroupScore, GroupSummary, Prompt
from rlsys.scheduling.signal import Signal
from rlsys.versions import PolicyVersion
from rlsys.weights.sync import Ack
from rlsys.weights.transport import WeightTicket


async def call(reference: Any) -> Any:
    """The result of an actor call; a deliberate error of ours arrives as itself.

    A dead actor arrives as `WorkerLost`; a call that was handed what a dead node held, as `PayloadLost`, and one that
    was to get what a dead actor had not made yet, as `MakerLost`.
    """
    try:
        return await reference
    except Exception as error:
        raise _translate(error) from error


def unwrap(reference: Any) -> Any:
    """`call` for code that has no event loop."""
    try:
        return ray.get(reference)
    except Exception as error:
        raise _translate(error) from error


def _translate(error: Exception) -> Exception:
    if isinstance(error, RayTaskError) and isinstance(error.cause, RlsysError):
        return error.cause
    lost = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(lost, ActorDiedError | ActorUnavailableError):
        if isinstance(error, RayTaskError):  # the actor that was called lives, and says so of its input
            return MakerLost(
                f"the process that made this call's input died; --resume goes on from the last checkpoint: {lost}"
            )
        return WorkerLost(str(lost))
    return PayloadLost(str(lost)) if isinstance(lost, ObjectLostError) else error


def this_node() -> NodeAffinitySchedulingStrategy:
    """Places an actor on this process's node: what keeps a run's books stays where the run's directory was made."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Part(NamedTuple):
    """One group of a bundle that a rollout actor made: the loop's payload."""

    bundle: ray.ObjectRef
    place: int


def places_in(parts: Sequence[Part]) -> tuple[list[Place], list[ray.ObjectRef]]:
    """Where each part is in the bundles that hold them, every bundle once.

    >>> places_in([Part("a", 1), Part("b", 0), Part("a", 0)])
    ([(0, 1), (1, 0), (0, 0)], ['a', 'b'])
    """
    order: dict[ray.ObjectRef, int] = {}
    places = [(order.setdefault(part.bundle, len(order)), part.place) for part in parts]
    return places, list(order)


class RemoteWorker:
    """An actor of a role that grows and shrinks."""

    def __init__(self, handle: ActorHandle) -> None:
        self.handle = handle

    async def loaded(self) -> None:
        """See `WorkerPort`."""
        await call(self.handle.__ray_ready__.remote())

    async def lost(self) -> None:
        """See `WorkerPort`."""
        lifetime = self.handle.lifetime.remote()
        try:
            await call(lifetime)
        finally:
            ray.cancel(lifetime)  # where nobody waits any more
        raise WorkerLost("it ended by itself")

    async def spans(self) -> list[Span]:
        """See `WorkerPort`."""
        spans: list[Span] = await call(self.handle.spans.remote())
        return spans

    def kill(self) -> None:
        """See `WorkerPort`."""
        ray.kill(self.handle)


class RemoteRollout(RemoteWorker):
    """One rollout actor. Requests made at one moment travel together, and so do groups that finish together."""

    def __init__(self, handle: ActorHandle) -> None:
        super().__init__(handle)
        self._client = secrets.token_hex(8)
        self._keys = itertools.count()
        self._unsent: list[Request] = []
        self._waiting: dict[int, asyncio.Future[tuple[GroupSummary, Payload]]] = {}
        self._collecting = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, slot: int, attempt: int, prompt: Prompt) -> tuple[GroupSummary, Payload]:
        """See `RolloutPort`."""
        request = Request(key=next(self._keys), slot=slot, attempt=attempt, prompt=prompt)
        loop = asyncio.get_running_loop()
        future = self._waiting[request.key] = loop.create_future()
        if not self._unsent:
            loop.call_soon(self._submit)
        self._unsent.append(request)
        return await future

    def _submit(self) -> None:
        requests, self._unsent = self._unsent, []
        self._start(self._send(requests))
        if not self._collecting:
            self._collecting = True
            self._start(self._collect())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, requests: Sequence[Request]) -> None:
        try:
            await call(self.handle.submit.remote(self._client, requests))
        except Exception as error:
            self._fail([request.key for request in requests], error)

    async def _collect(self) -> None:
        try:
            while self._waiting:
                outcomes, bundle = self.handle.collect.options(num_returns=2).remote(self._client)
                place = itertools.count()
                for key, outcome in await call(outcomes):
                    if not isinstance(outcome, GroupSummary):
                        self._fail([key], outcome)
                        continue
                    part = Part(bundle, next(place))
                    future = self._waiting.pop(key, None)
                    if future is not None and not future.done():  # its caller may have left
                        future.set_result((outcome, part))
        except Exception as error:
            self._fail(list(self._waiting), error)
        finally:
            self._collecting = False

    def _fail(self, keys: Sequence[int], error: BaseException) -> None:
        for key in keys:
            future = self._waiting.pop(key, None)
            if future is not None and not future.done():
                future.set_exception(error)

    async def greedy(self, prompts: Sequence[Prompt]) -> tuple[list[GroupSummary], Payload]:
        """See `RolloutPort`."""
        summaries, groups = self.handle.greedy.options(num_returns=2).remote(prompts)
        return await call(summaries), groups

    async def stats(self) -> FleetStats:
        """See `RolloutPort`."""
        stats: RolloutStats = await call(self.handle.stats.remote())
        return FleetStats(
            generated_tokens=stats.generated_tokens, busy_s=stats.busy_s, paused_s=stats.paused_s, workers=1
        )


class RemoteRewards:
    """All reward actors, in turn. Groups handed over at one moment travel together."""

    def __init__(self, handles: Mapping[str, ActorHandle]) -> None:
        self._workers = {name: RemoteWorker(handle) for name, handle in handles.items()}
        self._turns = deque(self._workers)
        self._under_way: Counter[str] = Counter()
        self._changed = Signal()
        self._unsent: list[tuple[Part, asyncio.Future[GroupScore]]] = []
        self._sent: set[asyncio.Task[None]] = set()
        self._on_lost: Callable[[str, WorkerLost], None] = lambda name, error: self.remove(name)

    @property
    def workers(self) -> Mapping[str, RemoteWorker]:
        """See `RewardPort`."""
        return self._workers

    def add(self, name: str, worker: RemoteWorker) -> None:
        """See `RewardPort`."""
        self._workers[name] = worker
        self._turns.append(name)
        self._changed.notify()

    def remove(self, name: str) -> None:
        """See `RewardPort`."""
        if self._workers.pop(name, None) is not None:
            self._turns.remove(name)

    async def idle(self, name: str) -> None:
        """See `RewardPort`."""
        await self._changed.until(lambda: not self._under_way[name])

    def report_lost(self, to: Callable[[str, WorkerLost], None]) -> None:
        """See `RewardPort`."""
        self._on_lost = to

    async def score(self, payload: Part) -> GroupScore:
        """See `RewardPort`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[GroupScore] = loop.create_future()
        if not self._unsent:
            loop.call_soon(self._send)
        self._unsent.append((payload, future))
        return await future

    def _send(self) -> None:
        task = asyncio.create_task(self._score(self._unsent))
        self._unsent = []
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)

    async def _score(self, asked: Sequence[tuple[Part, asyncio.Future[GroupScore]]]) -> None:
        places, bundles = places_in([part for part, _ in asked])
        try:
            scores = await self._ask(lambda worker: worker.score.remote(places, *bundles))
        except Exception as error:
            scores = [error] * len(asked)
        for (_, future), score in zip(asked, scores, strict=True):
            if future.done():  # its caller left
                continue
            if isinstance(score, Exception):
                future.set_exception(score)
            else:
                future.set_result(score)

    async def score_all(self, payload: Payload) -> list[GroupScore]:
        """See `RewardPort`."""
        scores: list[GroupScore] = await self._ask(lambda worker: worker.score_all.remote(payload))
        return scores

    async def _ask(self, what: Callable[[ActorHandle], Any]) -> Any:
        """Call the worker whose turn it is."""
        await self._changed.until(lambda: bool(self._turns))
        name = self._turns[0]
        self._turns.rotate(-1)
        self._under_way[name] += 1
        try:
            return await call(what(self._workers[name].handle))
        except WorkerLost as error:
            self._on_lost(name, error)
            raise
        finally:
            self._under_way[name] -= 1
            self._changed.notify()


class RemoteReference:
    """The reference actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def score(self, payloads: Sequence[Part]) -> Payload:
        """See `ReferencePort`."""
        places, bundles = places_in(payloads)
        return self._handle.score.remote(places, *bundles)


class RemoteWeights:
    """The weight-sync actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def publish(self, ticket: WeightTicket) -> None:
        """See `WeightsPort`."""
        await call(self._handle.publish.remote(ticket))

    async def acks(self, cursor: int) -> list[Ack]:
        """See `WeightsPort`."""
        acks: list[Ack] = await call(self._handle.acks.remote(cursor))
        return acks

    async def add(self, name: str, worker: RemoteRollout) -> None:
        """See `WeightsPort`."""
        await call(self._handle.add.remote(name, worker.handle))

    async def remove(self, name: str) -> None:
        """See `WeightsPort`."""
        await call(self._handle.remove.remote(name))


class RemoteProbe:
    """The probe actor. Its calls run in the order they are made."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle
        self._kept: list[ray.ObjectRef] = []

    def keep(self, ticket: WeightTicket) -> None:
        """See `ProbePort`."""
        self._kept.append(self._handle.keep.remote(ticket))

    async def split(
        self, version: PolicyVersion, batch: Sequence[FinishedGroup], arrays: Payload
    ) -> dict[str, float | None]:
        """See `ProbePort`."""
        kept, self._kept = self._kept, []
        places, bundles = places_in([group.payload for group in batch])
        split = self._handle.split.remote(version, arrays, places, *bundles)
        await all_ready(kept)
        metrics: dict[str, float | None] = await call(split)
        return metrics


class RemoteRole:
    """Any actor that notes what it does."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def spans(self) -> list[Span]:
        """See `RolePort`."""
        spans: list[Span] = await call(self._handle.spans.remote())
        return spans


class RemoteRecorder:
    """The recorder actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def write(self, name: str, version: int, batch: Sequence[FinishedGroup], arrays: Payload) -> None:
        """See `RecorderPort`."""
        places, bundles = places_in([group.payload for group in batch])
        scores = [group.score for group in batch]
        await call(self._handle.write.remote(name, version, scores, arrays, places, *bundles))


class RemoteAudit:
    """The audit actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def audit(self, batch: Sequence[FinishedGroup], ticket: WeightTicket) -> Mapping[str, float | None]:
        """See `AuditPort`."""
        places, bundles = places_in([group.payload for group in batch])
        scores = [group.score for group in batch]
        metrics: dict[str, float | None] = await call(self._handle.audit.remote(ticket, scores, places, *bundles))
        return metrics


async def all_ready(references: Sequence[Any]) -> None:
    """Wait until every actor answered; the first failure is raised as itself."""
    await asyncio.gather(*(call(reference) for reference in references))
