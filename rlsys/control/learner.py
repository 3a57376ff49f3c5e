"""The learner's port over its actors, one for each rank."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from rlsys.control.ports import FinishedGroup, MakerLost, Payload, Update, WorkerLost
from rlsys.control.remote import call, places_in
from rlsys.errors import ClusterError, RlsysError
from rlsys.weights.transport import WeightTicket

GRACE_S = 10.0
"""When a rank has failed, how long the others are heard: who lost touch reports sooner than who was lost."""


class RemoteLearner:
    """All ranks get every call with the same arguments, since they work together; the first one's answer counts.

    A rank that dies or fails is a failure of the learner, whatever the others are waiting for: ClusterError or its
    own error, within `GRACE_S`.
    """

    def __init__(self, ranks: Sequence[ActorHandle]) -> None:
        self._ranks = ranks

    async def load(self) -> None:
        """Let the ranks find each other and load the policy. To be called once, first."""
        meeting = self._ranks[0].meet.remote() if len(self._ranks) > 1 else None
        await self._first([rank.load.remote(meeting) for rank in self._ranks])

    async def update(self, batch: Sequence[FinishedGroup], reference: Payload | None) -> Update:
        """See `LearnerPort`."""
        places, bundles = places_in([group.payload for group in batch])
        scores = [group.score for group in batch]
        answers = [
            rank.update.options(num_returns=3).remote(scores, reference, places, *bundles) for rank in self._ranks
        ]
        step = await self._first([step for step, _, _ in answers])
        _, ticket, arrays = answers[0]
        return Update(step=step, ticket=await call(ticket), arrays=arrays)

    async def publish(self) -> WeightTicket:
        """See `LearnerPort`."""
        ticket: WeightTicket = await self._first([rank.publish.remote() for rank in self._ranks])
        return ticket

    async def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """See `LearnerPort`."""
        await self._first([rank.save.remote(directory, extra) for rank in self._ranks])

    async def _first(self, answers: Sequence[Awaitable[Any]]) -> Any:
        """The first rank's answer, once all have answered."""
        asked = [asyncio.ensure_future(call(answer)) for answer in answers]
        try:
            _, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_S)
        finally:
            silent = [one.cancel() for one in asked]
        failed = {rank: error for rank, one in enumerate(asked) if not silent[rank] and (error := one.exception())}
        if not failed:
            return asked[0].result()
        rank = min(failed, key=lambda rank: _weight(failed[rank]))
        if isinstance(failed[rank], WorkerLost):
            raise ClusterError(
                f"learner rank {rank} of {len(asked)} died; --resume continues from the last checkpoint. {failed[rank]}"
            ) from failed[rank]
        raise failed[rank]


def _weight(error: BaseException) -> int:
    """Which of several failures is the cause: an error of ours, then a death, then what follows from either."""
    if isinstance(error, MakerLost):  # of another rank perhaps, which says more
        return 2
    return 0 if isinstance(error, RlsysError) else 1 if isinstance(error, WorkerLost) else 3
