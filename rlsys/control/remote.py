"""The ports of the control loop over Ray actors. Object references stand for payloads."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from rlsys.actors.rollout import RolloutStats
from rlsys.control.ports import FinishedGroup, FleetStats, Payload, Update, WorkerLost
from rlsys.errors import RlsysError
from rlsys.records import GroupScore, GroupSummary, Prompt
from rlsys.weights.sync import Ack
from rlsys.weights.transport import WeightTicket


async def call(reference: Any) -> Any:
    """The result of an actor call; a deliberate error of ours arrives as itself, a dead actor as `WorkerLost`."""
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
    if isinstance(error, ActorDiedError | ActorUnavailableError):
        return WorkerLost(str(error))
    return error


class RemoteRollout:
    """One rollout actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self.handle = handle

    async def generate(self, slot: int, attempt: int, prompt: Prompt) -> tuple[GroupSummary, Payload]:
        """See `RolloutPort`."""
        summary, group = self.handle.generate.options(num_returns=2).remote(slot, attempt, prompt)
        return await call(summary), group

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
    """All reward actors, in turn."""

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self._next = itertools.cycle(handles)

    async def score(self, payload: Payload) -> GroupScore:
        """See `RewardPort`."""
        score: GroupScore = await call(next(self._next).score.remote(payload))
        return score

    async def score_all(self, payload: Payload) -> list[GroupScore]:
        """See `RewardPort`."""
        scores: list[GroupScore] = await call(next(self._next).score_all.remote(payload))
        return scores


class RemoteReference:
    """The reference actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def score(self, payloads: Sequence[Payload]) -> Payload:
        """See `ReferencePort`."""
        return self._handle.score.remote(*payloads)


class RemoteLearner:
    """The learner actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def update(self, batch: Sequence[FinishedGroup], reference: Payload | None) -> Update:
        """See `LearnerPort`."""
        scores = [group.score for group in batch]
        step, ticket, arrays = self._handle.update.options(num_returns=3).remote(
            scores, reference, *(group.payload for group in batch)
        )
        return Update(step=await call(step), ticket=await call(ticket), arrays=arrays)

    async def publish(self) -> WeightTicket:
        """See `LearnerPort`."""
        ticket: WeightTicket = await call(self._handle.publish.remote())
        return ticket

    async def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """See `LearnerPort`."""
        await call(self._handle.save.remote(directory, extra))


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

    async def remove(self, name: str) -> None:
        """See `WeightsPort`."""
        await call(self._handle.remove.remote(name))


class RemoteRecorder:
    """The recorder actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def write(self, name: str, version: int, batch: Sequence[FinishedGroup], arrays: Payload) -> None:
        """See `RecorderPort`."""
        scores = [group.score for group in batch]
        await call(self._handle.write.remote(name, version, scores, arrays, *(group.payload for group in batch)))


async def all_ready(references: Sequence[Any]) -> None:
    """Wait until every actor answered; the first failure is raised as itself."""
    await asyncio.gather(*(call(reference) for reference in references))
