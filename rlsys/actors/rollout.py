"""A rollout worker: one engine, serving prompts while weight versions change under it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.records import GroupSummary, Prompt, Rollout, RolloutGroup
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counters since the worker started; seconds and tokens."""

    generated_tokens: int
    busy_s: float
    paused_s: float
    pending: int
    serving_version: PolicyVersion


@ray.remote(concurrency_groups={"control": 8})
class RolloutActor:
    """Samples groups of responses. Weight and health calls have a concurrency group of their own."""

    def __init__(self, name: str, index: int, path: str, config: RunConfig, version: PolicyVersion) -> None:
        settle("rollout", index=index, pin=config.resources.pin_cores and config.resources.rollout_gpus == 0)
        from rlsys.engines.driver import EngineDriver
        from rlsys.engines.vllm_engine import VllmEngine
        from rlsys.weights.transport import ObjectStoreTransport

        engine = VllmEngine(path, config.model, config.rollout, seed=config.seed + index, version=version)
        self._driver = EngineDriver(engine)
        self._transport = ObjectStoreTransport()
        self._name = name
        self._rollout = config.rollout

    async def generate(self, slot: int, attempt: int, prompt: Prompt) -> tuple[GroupSummary, RolloutGroup]:
        """Sample one group. Call with `num_returns=2`: the summary travels, the group stays."""
        return await self._sample(slot, attempt, prompt, self._rollout.samples_per_prompt, self._rollout.temperature)

    async def greedy(self, prompts: Sequence[Prompt]) -> tuple[list[GroupSummary], list[RolloutGroup]]:
        """One greedy response to each prompt. Call with `num_returns=2`."""
        results = await asyncio.gather(*(self._sample(-1, 0, prompt, 1, 0.0) for prompt in prompts))
        return [summary for summary, _ in results], [group for _, group in results]

    async def _sample(
        self, slot: int, attempt: int, prompt: Prompt, samples: int, temperature: float
    ) -> tuple[GroupSummary, RolloutGroup]:
        from rlsys.engines.protocol import Sampling

        started = time.time()
        sampling = Sampling(max_new_tokens=self._rollout.max_new_tokens, temperature=temperature)
        responses = await self._driver.generate(prompt.token_ids, samples, sampling)
        rollouts = tuple(
            Rollout(
                sample=i,
                response_ids=r.response_ids,
                behavior_logprobs=r.logprobs,
                loss_mask=np.ones(len(r.response_ids), dtype=np.bool_),
                version_spans=r.version_spans,
                finish_reason=r.finish_reason,
                text=r.text,
            )
            for i, r in enumerate(responses)
        )
        group = RolloutGroup(
            slot=slot,
            attempt=attempt,
            worker=self._name,
            prompt=prompt,
            rollouts=rollouts,
            started_at=started,
            finished_at=time.time(),
        )
        return group.summary(), group

    @ray.method(concurrency_group="control")
    async def apply(self, ticket: WeightTicket) -> float:
        """Fetch, verify and serve a version; returns seconds of paused decoding.

        Fetching and verifying happen beside decoding; only the swap stops it.
        """
        from rlsys.weights.buffer import verify

        buffer = await asyncio.to_thread(self._transport.receive, ticket.payload)
        await asyncio.to_thread(verify, ticket.manifest, buffer)
        report = await self._driver.apply(ticket.manifest, buffer)
        return report.pause_s

    @ray.method(concurrency_group="control")
    async def stats(self) -> RolloutStats:
        """Counters and the version served now."""
        driver = self._driver
        return RolloutStats(
            generated_tokens=driver.generated_tokens,
            busy_s=driver.busy_s,
            paused_s=driver.paused_s,
            pending=driver.pending,
            serving_version=driver.serving_version,
        )
