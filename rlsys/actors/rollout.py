"""A rollout worker: one engine, serving prompts while weight versions change under it."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from rlsys.actors.bundle import Bundle
from rlsys.actors.outbox import Outbox
from rlsys.actors.process import leave_core_to, require_seen, settle
from rlsys.config.schema import RunConfig
from rlsys.engines.protocol import Sampled, Sampling
from rlsys.observability.spans import Span
from rlsys.records import GroupSummary, Prompt, Rollout, RolloutGroup
from rlsys.versions import PolicyVersion
from rlsys.weights.collective import Group
from rlsys.weights.transport import WeightTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One group that a client wants; `key` is the client's own name for it."""

    key: int
    slot: int
    attempt: int
    prompt: Prompt


GATHER_S = 0.06
"""Seconds in which finished groups gather before they leave: a call costs the decoding thread a millisecond."""

Outcome = tuple[int, GroupSummary | BaseException]
"""A request's key, and what became of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStats:
    """Counters since the worker started; seconds and tokens."""

    generated_tokens: int
    busy_s: float
    paused_s: float
    serving_version: PolicyVersion


@ray.remote(concurrency_groups={"control": 8})
class RolloutActor:
    """Samples groups of responses. Weight and health calls have a concurrency group of their own."""

    def __init__(self, name: str, number: int, seat: int, path: str, config: RunConfig, version: PolicyVersion) -> None:
        on_gpu = config.resources.rollout_gpus > 0
        cores = settle("rollout", config, index=seat, on_gpu=on_gpu)
        require_seen("model", path)
        from rlsys.engines.driver import EngineDriver
        from rlsys.engines.vllm_engine import VllmEngine
        from rlsys.weights.transport import ObjectStoreTransport

        seed = int(np.random.SeedSequence((config.seed, number, version)).generate_state(1)[0])  # not the first run's
        engine = VllmEngine(path, config.model, config.rollout, seed=seed, version=version)
        self._driver = EngineDriver(engine)
        if not on_gpu:
            leave_core_to(self._driver.thread, cores, config)
        transport = config.weights.transport
        self._transport: Any = (
            ObjectStoreTransport() if transport == "object_store" else engine.backend_receiver(transport)
        )
        self._name = name
        self._rollout = config.rollout
        self._sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=config.rollout.temperature)
        self._outboxes: defaultdict[str, Outbox[tuple[Outcome, RolloutGroup | None]]] = defaultdict(Outbox)

    async def submit(self, client: str, requests: Sequence[Request]) -> None:
        """Start sampling groups; `collect` hands them out."""
        outbox, rollout = self._outboxes[client], self._rollout
        for request in requests:
            started = time.time()
            future = self._driver.start(request.prompt.token_ids, rollout.samples_per_prompt, self._sampling)
            future.add_done_callback(partial(self._deliver, outbox, request, started))

    async def collect(self, client: str) -> tuple[list[Outcome], Bundle]:
        """What became of all requests of a client that ended since its last call; waits for one.

        Call with `num_returns=2`: the outcomes travel, the bundle stays. It holds the groups of those that succeeded.
        """
        await asyncio.sleep(GATHER_S)
        ended = await self._outboxes[client].take()
        return [outcome for outcome, _ in ended], [group for _, group in ended if group is not None]

    async def greedy(self, prompts: Sequence[Prompt]) -> tuple[list[GroupSummary], list[RolloutGroup]]:
        """One greedy response to each prompt. Call with `num_returns=2`."""
        started, sampling = time.time(), replace(self._sampling, temperature=0.0)
        responses = await asyncio.gather(*(self._driver.generate(p.token_ids, 1, sampling) for p in prompts))
        groups = [
            self._group(Request(key=i, slot=-1, attempt=0, prompt=prompt), started, responses[i])
            for i, prompt in enumerate(prompts)
        ]
        return [group.summary() for group in groups], groups

    def _deliver(
        self,
        outbox: Outbox[tuple[Outcome, RolloutGroup | None]],
        request: Request,
        started: float,
        future: Future[list[Sampled]],
    ) -> None:
        """In the engine's thread, so that a group costs the event loop nothing."""
        try:
            group = self._group(request, started, future.result())
        except BaseException as error:  # its client raises it
            outbox.put(((request.key, error), None))
        else:
            outbox.put(((request.key, group.summary()), group))

    def _group(self, request: Request, started: float, responses: Sequence[Sampled]) -> RolloutGroup:
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
        return RolloutGroup(
            slot=request.slot,
            attempt=request.attempt,
            worker=self._name,
            prompt=request.prompt,
            rollouts=rollouts,
            started_at=started,
            finished_at=time.time(),
        )

    @ray.method(concurrency_group="control")
    async def apply(self, ticket: WeightTicket) -> float:
        """Fetch, verify and serve a version; returns seconds of paused decoding.

        Fetching and verifying happen beside decoding; only the swap stops it.
        """
        from rlsys.weights.buffer import verify

        start, version = time.time(), ticket.manifest.version
        buffer = await asyncio.to_thread(self._transport.receive, ticket.payload)
        await asyncio.to_thread(verify, ticket.manifest, buffer)
        self._driver.spans.add("fetch", start, time.time(), track=1, version=version)
        report = await self._driver.apply(ticket.manifest, buffer)
        return report.pause_s

    # What `weights.collective` asks of a worker.

    @ray.method(concurrency_group="control")
    async def ready(self) -> None:
        """Answers."""

    @ray.method(concurrency_group="control")
    async def join(self, group: Group, rank: int) -> None:
        """Returns when the group has met."""
        await asyncio.to_thread(self._transport.join, group, rank)

    @ray.method(concurrency_group="control")
    async def leave(self, epoch: int) -> None:
        """Give a group up."""
        await asyncio.to_thread(self._transport.leave, epoch)

    @ray.method(concurrency_group="control")
    async def spans(self) -> list[Span]:
        """What it did since the last call: decoding and pauses on track 0, weights arriving on track 1."""
        return self._driver.spans.take()

    @ray.method(concurrency_group="control")
    async def lifetime(self) -> None:
        """Never returns: who waits for it learns at once that this process is dead, or that its engine has stopped."""
        await self._driver.ended()

    @ray.method(concurrency_group="control")
    async def stats(self) -> RolloutStats:
        """Counters and the version served now."""
        driver = self._driver
        return RolloutStats(
            generated_tokens=driver.generated_tokens,
            busy_s=driver.busy_s,
            paused_s=driver.paused_s,
            serving_version=driver.serving_version,
        )
