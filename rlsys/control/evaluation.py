"""Greedy accuracy on held-out prompts, through the rollout workers that also sample for training."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlsys.control.ports import Payload, RewardPort, RolloutPort, WorkerLost
from rlsys.errors import EngineError, RewardError
from rlsys.records import Prompt
from rlsys.versions import PolicyVersion

T = TypeVar("T")

CHUNK = 64
"""Prompts in one call to a worker."""

REWARD_WORKERS_TRIED = 3
"""Reward workers that may die over one payload before it counts as unscorable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean reward of one greedy response per held-out prompt, and the versions that produced them."""

    accuracy: float
    prompts: int
    response_tokens: float
    oldest_version: PolicyVersion
    newest_version: PolicyVersion

    def metrics(self) -> dict[str, float | None]:
        """By catalogue name."""
        return {
            "eval/accuracy": self.accuracy,
            "eval/prompts": float(self.prompts),
            "eval/response_tokens": self.response_tokens,
            "eval/oldest_version": float(self.oldest_version),
            "eval/newest_version": float(self.newest_version),
        }


async def evaluate(prompts: Sequence[Prompt], workers: Sequence[RolloutPort], rewards: RewardPort) -> Evaluation:
    """One greedy response to every prompt, spread over the workers; another one takes the part of one that died.

    Raises `RewardError`, and what the last worker raised when none is left. Nothing runs on after it returned.
    """

    async def part(number: int) -> list[tuple[float, int, PolicyVersion, PolicyVersion]]:
        chunk, first = prompts[number * CHUNK : (number + 1) * CHUNK], number % max(1, len(workers))
        lost: WorkerLost | EngineError = WorkerLost("there is no rollout worker")
        for worker in (*workers[first:], *workers[:first]):
            try:
                summaries, payload = await worker.greedy(chunk)
            except (WorkerLost, EngineError) as error:
                lost = error
                continue
            scores = await scored(rewards.score_all, payload)
            return [
                (float(score.rewards[0]), s.tokens, s.oldest_version, s.newest_version)
                for s, score in zip(summaries, scores, strict=True)
            ]
        raise lost

    parts = await asyncio.gather(*map(part, range(-(-len(prompts) // CHUNK))), return_exceptions=True)
    rows = []
    for result in parts:
        if isinstance(result, BaseException):
            raise result
        rows += result
    return Evaluation(
        accuracy=sum(r[0] for r in rows) / len(rows),
        prompts=len(rows),
        response_tokens=sum(r[1] for r in rows) / len(rows),
        oldest_version=min(r[2] for r in rows),
        newest_version=max(r[3] for r in rows),
    )


async def scored(score: Callable[[Payload], Awaitable[T]], payload: Payload) -> T:
    """The rewards of a payload; where a reward worker died, the next one is asked. Raises `RewardError`."""
    lost: WorkerLost | None = None
    for _ in range(REWARD_WORKERS_TRIED):
        try:
            return await score(payload)
        except WorkerLost as error:
            lost = error
    raise RewardError(f"{REWARD_WORKERS_TRIED} reward workers died over it; the last one: {lost}") from lost
