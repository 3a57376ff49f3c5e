"""The weight-sync service: hands every published version to every rollout worker."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.config.transport import COLLECTIVE
from rlsys.errors import RlsysError
from rlsys.versions import PolicyVersion
from rlsys.weights.collective import CollectiveSync, Group
from rlsys.weights.sync import Ack, WeightSync
from rlsys.weights.transport import WeightTicket


class RemoteMember:
    """An actor that takes part in weight syncs: the learner or a rollout actor, as `weights` sees them."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def apply(self, ticket: WeightTicket) -> float:
        """Ask a worker to serve the ticket's version; returns seconds of paused decoding."""
        pause: float = await answer(self._handle.apply.remote(ticket))
        return pause

    async def ready(self) -> None:
        """Returns when a worker answers."""
        await answer(self._handle.ready.remote())

    async def listen(self) -> tuple[str, int]:
        """Where the learner waits for the next group."""
        found: tuple[str, int] = await answer(self._handle.listen.remote())
        return found

    async def join(self, group: Group, *rank: int) -> None:
        """Ask the actor to join a group, a worker under its rank."""
        await answer(self._handle.join.remote(group, *rank))

    async def broadcast(self, version: PolicyVersion) -> None:
        """Ask the learner to send a version to its group."""
        await answer(self._handle.broadcast.remote(version))

    async def leave(self, epoch: int) -> None:
        """Ask the actor to give a group up."""
        await answer(self._handle.leave.remote(epoch))


async def answer(call: Any) -> Any:
    """The result of an actor call; a deliberate error of ours arrives as itself."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, RlsysError):
            raise error.cause from error
        raise


@ray.remote
class WeightSyncActor:
    """Metadata only: the bytes go from the learner to the workers."""

    def __init__(self, config: RunConfig, learner: ActorHandle) -> None:
        settle("other", config)
        self._weights, self._learner = config.weights, learner
        self._sync: WeightSync | None = None

    async def publish(self, ticket: WeightTicket) -> None:
        """See `WeightSync.publish`."""
        await self._service().publish(ticket)

    async def add(self, name: str, handle: ActorHandle) -> None:
        """A worker joins."""
        await self._service().add(name, RemoteMember(handle))

    async def remove(self, name: str) -> None:
        """A worker left."""
        await self._service().remove(name)

    async def acks(self, cursor: int) -> list[Ack]:
        """Acknowledgements after the first `cursor`; waits for one."""
        return await self._service().acks(cursor)

    def _service(self) -> WeightSync:
        if self._sync is None:  # made inside the actor's event loop
            timeout_s = self._weights.timeout_s
            if self._weights.transport in COLLECTIVE:
                self._sync = CollectiveSync(RemoteMember(self._learner), timeout_s=timeout_s)
            else:
                self._sync = WeightSync(timeout_s=timeout_s)
        return self._sync
