"""Greedy accuracy on held-out prompts, through the rollout workers that also sample for training."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from rlsys.control.ports import RewardPort, RolloutPort
from rlsys.records import Prompt
from rlsys.versions import PolicyVersion

CHUNK = 64
"""Prompts in one call to a worker."""


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
    """One greedy response to every prompt, spread over the workers."""

    async def chunk(
        worker: RolloutPort, part: tuple[Prompt, ...]
    ) -> list[tuple[float, int, PolicyVersion, PolicyVersion]]:
        summaries, payload = await worker.greedy(part)
        scores = await rewards.score_all(payload)
        return [
            (float(score.rewards[0]), s.tokens, s.oldest_version, s.newest_version)
            for s, score in zip(summaries, scores, strict=True)
        ]

    chunks = (tuple(prompts[i : i + CHUNK]) for i in range(0, len(prompts), CHUNK))
    parts = zip(cycle(workers), chunks, strict=False)
    rows = [row for rows in await asyncio.gather(*(chunk(*part) for part in parts)) for row in rows]
    return Evaluation(
        accuracy=sum(r[0] for r in rows) / len(rows),
        prompts=len(rows),
        response_tokens=sum(r[1] for r in rows) / len(rows),
        oldest_version=min(r[2] for r in rows),
        newest_version=max(r[3] for r in rows),
    )
