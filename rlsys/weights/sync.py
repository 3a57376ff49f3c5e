"""Keeps every rollout worker on the newest version, and knows what each one serves.

One sender per worker, each waiting for a version newer than its worker's: a slow worker skips versions
and never holds up another. A version counts as published when a worker *acknowledged* it.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from rlsys.errors import WeightSyncError
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket

log = logging.getLogger(__name__)

RETRY_BACKOFF_S = (0.1, 0.5, 2.0)
"""Waits before the second, third, … attempt to bring one version to one worker."""

REFUSED_AGAIN_S = 10.0
"""A refused version is tried again after this time, unless a newer one replaces it: there may never be one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A worker serves `version`; it took `apply_s` from sending, with decoding paused for `pause_s`.

    `error` says why the version could not be served instead; the worker stays on its old one, or its engine stopped.
    """

    worker: str
    version: PolicyVersion
    apply_s: float
    pause_s: float
    error: str | None = None


class Applier(Protocol):
    """A rollout worker as the weight-sync service sees it."""

    async def apply(self, ticket: WeightTicket) -> float:
        """Fetch, verify and serve a version; returns seconds of paused decoding. Raises on any failure."""


class WeightSync:
    """Sends versions to workers and collects their acknowledgements. For one event loop."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ticket: WeightTicket | None = None
        self._workers: dict[str, Applier] = {}
        self._senders: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._acks: list[Ack] = []
        self._serving: dict[str, PolicyVersion] = {}
        self._refused: dict[str, str] = {}  # worker -> why it did not take the published version

    async def publish(self, ticket: WeightTicket) -> None:
        """Send a version to all workers; returns when one of them serves it, or when no worker is there.

        Raises `WeightSyncError` when all refused it or none served it in time; they then serve their old versions.
        """
        version = ticket.manifest.version
        async with self._changed:
            if self._ticket is not None and version < self._ticket.manifest.version:
                raise WeightSyncError(f"version {version} is older than the published {self._ticket.manifest.version}")
            self._ticket, self._refused = ticket, {}
            self._changed.notify_all()
            within = ""
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._changed.wait_for(
                        lambda: self._served(version) or self._workers.keys() <= self._refused.keys()
                    )
            except TimeoutError:
                within = f" within {self._timeout_s:g} s"
            if self._workers and not self._served(version):
                why = "".join(f"; {name}: {error}" for name, error in self._refused.items())
                raise WeightSyncError(f"no worker served version {version}{within}{why}")

    async def add(self, name: str, worker: Applier) -> None:
        """A worker joins, perhaps after an earlier one of that name; it is brought to the current version first."""
        self._drop(name)
        self._workers[name] = worker
        self._joined(name)
        await self._notify()

    async def remove(self, name: str) -> None:
        """A worker left."""
        self._drop(name)
        await self._notify()

    async def acks(self, cursor: int) -> list[Ack]:
        """Acknowledgements after the first `cursor` ones; waits for at least one."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._acks) > cursor)
            return self._acks[cursor:]

    def _drop(self, name: str) -> None:
        if self._workers.pop(name, None) is not None:
            self._left(name)
        self._serving.pop(name, None)
        self._refused.pop(name, None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _joined(self, name: str) -> None:
        self._senders[name] = asyncio.create_task(self._send(name, self._workers[name]), name=f"weights to {name}")

    def _left(self, name: str) -> None:
        self._senders.pop(name).cancel()

    async def _record(self, ack: Ack, ticket: WeightTicket) -> None:
        async with self._changed:
            self._acks.append(ack)
            if ack.error is None:
                self._serving[ack.worker] = ack.version
            elif ticket is self._ticket:
                self._refused[ack.worker] = ack.error
            self._changed.notify_all()

    async def _send(self, name: str, worker: Applier) -> None:
        served: PolicyVersion | None = None
        while True:
            ticket = await self._newer_than(served)
            ack = await self._deliver(name, worker, ticket)
            await self._record(ack, ticket)
            if ack.error is None:
                served = ack.version
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(REFUSED_AGAIN_S):
                        await self._newer_than(ack.version)

    async def _newer_than(self, version: PolicyVersion | None) -> WeightTicket:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._ticket is not None and (version is None or self._ticket.manifest.version > version)
            )
            assert self._ticket is not None
            return self._ticket

    async def _deliver(self, name: str, worker: Applier, ticket: WeightTicket) -> Ack:
        version, start, error = ticket.manifest.version, time.perf_counter(), ""
        for wait in (*RETRY_BACKOFF_S, None):
            try:
                pause = await worker.apply(ticket)
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
                log.warning("worker %s did not take version %d: %s", name, version, error)
                if wait is None or (self._ticket is not None and self._ticket.manifest.version > version):
                    break
                await asyncio.sleep(wait)
            else:
                return Ack(worker=name, version=version, apply_s=time.perf_counter() - start, pause_s=pause)
        return Ack(worker=name, version=version, apply_s=time.perf_counter() - start, pause_s=0.0, error=error)

    def _served(self, version: PolicyVersion) -> bool:
        return max(self._serving.values(), default=-1) >= version
