"""The weight-sync service: hands every published version to every rollout worker."""

import ray
from ray.actor import ActorHandle

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.weights.sync import Ack, WeightSync
from rlsys.weights.transport import WeightTicket


class RemoteApplier:
    """A rollout actor as `weights.sync` sees it."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def apply(self, ticket: WeightTicket) -> float:
        """Ask the actor to serve the ticket's version; returns seconds of paused decoding."""
        pause: float = await self._handle.apply.remote(ticket)
        return pause


@ray.remote
class WeightSyncActor:
    """Metadata only: the bytes go from the learner's object store to the workers'."""

    def __init__(self, config: RunConfig) -> None:
        settle("other", config)
        self._timeout_s = config.weights.timeout_s
        self._sync: WeightSync | None = None

    async def publish(self, ticket: WeightTicket) -> None:
        """See `WeightSync.publish`."""
        await self._service().publish(ticket)

    async def add(self, name: str, handle: ActorHandle) -> None:
        """A worker joins."""
        await self._service().add(name, RemoteApplier(handle))

    async def remove(self, name: str) -> None:
        """A worker left."""
        await self._service().remove(name)

    async def acks(self, cursor: int) -> list[Ack]:
        """Acknowledgements after the first `cursor`; waits for one."""
        return await self._service().acks(cursor)

    def _service(self) -> WeightSync:
        if self._sync is None:  # made inside the actor's event loop
            self._sync = WeightSync(timeout_s=self._timeout_s)
        return self._sync
