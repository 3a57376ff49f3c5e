"""Versions by broadcast: the learner and the workers that lack a version take part in it together.

A collective needs all of its members at the same time, and hangs when one is lost. So membership is a `Group` with an
epoch that is never used again: formed anew whenever those who lack the published version are not its members, and
given up by everybody after any failure. A worker that joins, or missed a version, is caught up in a group of its own;
the others go on serving. Nobody waits longer than an attempt may take.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Set
from dataclasses import dataclass
from typing import Any, Protocol, cast

from rlsys.errors import ChecksumMismatch, WeightSyncError, first_failure
from rlsys.versions import PolicyVersion
from rlsys.weights.sync import REFUSED_AGAIN_S, RETRY_BACKOFF_S, Ack, Applier, WeightSync
from rlsys.weights.transport import WeightTicket

log = logging.getLogger(__name__)

ATTEMPTS = len(RETRY_BACKOFF_S)
"""How often one version is brought to one worker before it counts as refused."""

ANSWER_S = 5.0
"""A member that does not answer a call within this time takes no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Who takes part in broadcasts: the learner, rank 0, and `workers` in the order of ranks 1, 2, …

    They meet at `address`:`port` of the learner; an operation in which a member waits longer than `timeout_s` fails.
    """

    epoch: int
    workers: tuple[str, ...]
    address: str
    port: int
    timeout_s: float

    @property
    def size(self) -> int:
        """Ranks, the learner's included.

        >>> Group(epoch=1, workers=("a", "b"), address="127.0.0.1", port=4711, timeout_s=20).size
        3
        """
        return len(self.workers) + 1

    def rank(self, worker: str) -> int:
        """A worker's rank."""
        return self.workers.index(worker) + 1


class Member(Applier, Protocol):
    """A rollout worker as the conductor sees it. `apply` takes part in the broadcast of its group."""

    async def ready(self) -> None:
        """Returns when the worker can take part."""

    async def join(self, group: Group, rank: int) -> None:
        """Returns when all members of the group have met."""

    async def leave(self, epoch: int) -> None:
        """Give the group up; whoever waits in it fails. Harmless when it is another one by now."""


class Source(Protocol):
    """The learner as the conductor sees it."""

    async def listen(self) -> tuple[str, int]:
        """Where the next group is to meet: an address that the workers reach, and a port."""

    async def join(self, group: Group) -> None:
        """Returns when all members of the group have met."""

    async def broadcast(self, version: PolicyVersion) -> None:
        """Send a version's bytes to the group. Raises when it no longer holds them, or when a member is lost."""

    async def leave(self, epoch: int) -> None:
        """As a member's."""


class CollectiveSync(WeightSync):
    """`WeightSync` whose bytes go to all workers, `Member`s, at once: one conductor in place of a sender for each."""

    def __init__(self, learner: Source, *, timeout_s: float) -> None:
        super().__init__(timeout_s=timeout_s)
        self._learner = learner
        self._attempt_s = timeout_s / (ATTEMPTS + 1)
        self._group: Group | None = None
        self._epoch = 0
        self._applying: dict[str, asyncio.Future[float]] = {}
        self._failed: Counter[str] = Counter()  # attempts to bring the published version to a worker
        self._resting: set[str] = set()  # workers that get no attempt now
        self._alarms: set[asyncio.Task[None]] = set()  # those that end a rest
        self._conductor: asyncio.Task[None] | None = None

    async def publish(self, ticket: WeightTicket) -> None:
        """See `WeightSync.publish`."""
        self._failed.clear()
        self._wake()
        await super().publish(ticket)

    def _joined(self, name: str) -> None:
        if self._conductor is None or self._conductor.done():
            self._conductor = asyncio.create_task(self._conduct(), name="weights to all workers")

    def _left(self, name: str) -> None:
        del self._failed[name]
        self._resting.discard(name)
        if name in self._applying:
            self._applying[name].cancel()  # its group must not wait for it

    def _member(self, name: str) -> Member:
        return cast(Member, self._workers[name])

    async def _conduct(self) -> None:
        """Consumes versions and joining workers, produces acknowledgements; a version that somebody lacks wakes it.

        Ends when the last group has been given up and nobody is there; who joined meanwhile found it at work.
        """
        while self._workers or self._group is not None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._lacking() or not self._workers)
                ticket, names = self._ticket, self._lacking()
            if ticket is not None and names:
                await self._retry(ticket, await self._attempt(ticket, names))
            if not self._workers:
                await self._give_up()

    def _lacking(self) -> tuple[str, ...]:
        """Workers that are to get the published version now. Those that serve one come first: no joiner fails them."""
        if self._ticket is None:
            return ()
        version = self._ticket.manifest.version
        names = tuple(n for n in sorted(self._workers.keys() - self._resting) if self._serving.get(n, -1) < version)
        return tuple(name for name in names if name in self._serving) or names

    async def _attempt(self, ticket: WeightTicket, names: tuple[str, ...]) -> dict[str, str]:
        """Bring a version to these workers; returns why those that do not serve it now do not."""
        version, began = ticket.manifest.version, time.perf_counter()
        missed = dict[str, str]()
        try:
            async with asyncio.timeout(self._attempt_s):
                if self._group is None or self._group.workers != names:
                    names, missed = await self._who_answers(names)
                    if not names:
                        return missed
                    await self._form(names)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._learner.broadcast(version))
                    parts = {name: tasks.create_task(self._apply(name, ticket, began)) for name in names}
            return missed | {name: error for name, part in parts.items() if (error := part.result()) is not None}
        except TimeoutError:
            error = f"the broadcast took longer than {self._attempt_s:g} s"
        except ExceptionGroup as failures:
            error = _said(first_failure(failures))
        except Exception as failure:
            error = _said(failure)
        await self._give_up()
        return missed | {name: error for name in names if self._serving.get(name, -1) < version}

    async def _apply(self, name: str, ticket: WeightTicket, began: float) -> str | None:
        """One worker's part. Bytes that arrived wrong are its own affair; anything else fails the whole group."""
        applying = self._applying[name] = asyncio.ensure_future(self._workers[name].apply(ticket))
        try:
            pause = await applying
        except ChecksumMismatch as failure:
            return _said(failure)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise WeightSyncError(f"{name} left in mid-broadcast") from None
        finally:
            del self._applying[name]
        version, apply_s = ticket.manifest.version, time.perf_counter() - began
        await self._record(Ack(worker=name, version=version, apply_s=apply_s, pause_s=pause), ticket)
        return None

    async def _who_answers(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Those who can take part, and why the others cannot: a group with one who is lost would never meet."""
        answers = await asyncio.gather(
            *(_within(ANSWER_S, self._member(name).ready()) for name in names), return_exceptions=True
        )
        silent = {n: _said(answer) for n, answer in zip(names, answers, strict=True) if answer is not None}
        return tuple(name for name in names if name not in silent), silent

    async def _form(self, names: tuple[str, ...]) -> None:
        await self._give_up()
        self._epoch += 1
        address, port = await self._learner.listen()
        group = Group(epoch=self._epoch, workers=names, address=address, port=port, timeout_s=self._attempt_s)
        self._group = group
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._learner.join(group))
            for name in names:
                tasks.create_task(self._member(name).join(group, group.rank(name)))

    async def _give_up(self) -> None:
        """Everybody leaves the group, also those who wait in it."""
        group, self._group = self._group, None
        if group is None:
            return
        members: list[Source | Member] = [self._learner]
        members += [self._member(name) for name in group.workers if name in self._workers]
        answers = await asyncio.gather(
            *(_within(ANSWER_S, member.leave(group.epoch)) for member in members), return_exceptions=True
        )
        for answer in answers:
            if answer is not None:
                log.warning("group %d: a member did not leave: %s", group.epoch, _said(answer))

    async def _retry(self, ticket: WeightTicket, missed: dict[str, str]) -> None:
        """Those who missed the version wait a little; after too many attempts they have refused it, and wait longer."""
        if ticket is not self._ticket:
            return
        missed = {name: error for name, error in missed.items() if name in self._workers}
        self._failed.update(missed.keys())
        refused = {name: error for name, error in missed.items() if self._failed[name] >= ATTEMPTS}
        again = missed.keys() - refused.keys()
        if again:
            self._rest(again, RETRY_BACKOFF_S[max(self._failed[name] for name in again) - 1])
        if refused:
            self._rest(refused.keys(), REFUSED_AGAIN_S)
        version = ticket.manifest.version
        for name, error in missed.items():
            log.warning("worker %s did not take version %d: %s", name, version, error)
        for name, error in refused.items():
            await self._record(Ack(worker=name, version=version, apply_s=0.0, pause_s=0.0, error=error), ticket)

    def _rest(self, names: Set[str], seconds: float) -> None:
        async def end() -> None:
            await asyncio.sleep(seconds)
            self._resting.difference_update(names)
            await self._notify()

        self._resting |= names
        alarm = asyncio.create_task(end())
        self._alarms.add(alarm)
        alarm.add_done_callback(self._alarms.discard)

    def _wake(self) -> None:
        """End all rests."""
        self._resting.clear()
        for alarm in self._alarms:
            alarm.cancel()


async def _within(seconds: float, call: Coroutine[Any, Any, object]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await call
    except TimeoutError:
        raise WeightSyncError(f"no answer within {seconds:g} s") from None


def _said(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}"
