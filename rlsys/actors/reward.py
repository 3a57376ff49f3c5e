"""A reward actor: scores groups, off the rollout workers' and the learner's path."""

import asyncio
from collections.abc import Sequence

import ray

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.records import GroupScore, RolloutGroup


@ray.remote
class RewardActor:
    """Holds the run's reward function; imports neither torch nor an engine."""

    def __init__(self, config: RunConfig) -> None:
        settle("other", pin=config.resources.pin_cores)
        from rlsys.rewards import resolve_reward
        from rlsys.tasks import build_task

        self._function = resolve_reward(config.reward.function, build_task(config.task, config.seed).score)
        self._config = config.reward

    async def score(self, group: RolloutGroup) -> GroupScore:
        """One reward per response. Raises `RewardError` when a reward cannot be had."""
        from rlsys.rewards import score_group

        return await asyncio.to_thread(
            score_group, self._function, group, timeout_s=self._config.timeout_s, retries=self._config.retries
        )

    async def score_all(self, groups: Sequence[RolloutGroup]) -> list[GroupScore]:
        """The same for several groups, in order."""
        return [await self.score(group) for group in groups]
