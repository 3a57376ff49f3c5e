"""A reward actor: scores groups, off the rollout workers' and the learner's path."""

import asyncio
from collections.abc import Sequence
from typing import cast

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.errors import RewardError
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import GroupScore, RolloutGroup


@ray.remote
class RewardActor:
    """Holds the run's reward function; imports neither torch nor an engine."""

    def __init__(self, config: RunConfig) -> None:
        settle("other", config)
        from rlsys.rewards import resolve_reward
        from rlsys.tasks import build_task

        self._function = resolve_reward(config.reward.function, build_task(config.task, config.seed).score)
        self._config = config.reward
        self._spans = SpanLog()

    async def score(self, places: Sequence[Place], *bundles: Bundle) -> list[GroupScore | RewardError]:
        """One reward per response of every group; of a group whose rewards cannot be had, why."""
        with self._spans.span("score", groups=len(places)):
            scores = await asyncio.gather(*map(self._score, select(places, bundles)), return_exceptions=True)
        for score in scores:
            if isinstance(score, BaseException) and not isinstance(score, RewardError):
                raise score
        return cast("list[GroupScore | RewardError]", scores)

    async def score_all(self, groups: Sequence[RolloutGroup]) -> list[GroupScore]:
        """The same for all groups of one bundle. Raises `RewardError`."""
        return [await self._score(group) for group in groups]

    async def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    async def lifetime(self) -> None:
        """Never returns: who waits for it learns at once that this process is dead."""
        await asyncio.Event().wait()

    async def _score(self, group: RolloutGroup) -> GroupScore:
        from rlsys.rewards import score_group

        return await asyncio.to_thread(
            score_group, self._function, group, timeout_s=self._config.timeout_s, retries=self._config.retries
        )
