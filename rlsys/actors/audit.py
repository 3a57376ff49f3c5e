"""The audit actor: the gradient of a trained batch against fresh on-policy ones, at the weights it was trained from."""

from collections.abc import Sequence
from functools import partial

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import GroupScore, ScoredGroup
from rlsys.weights.transport import WeightTicket


@ray.remote(concurrency_groups={"control": 1})
class AuditActor:
    """A second policy, on the CPU, that takes a published version's weights for each audit.

    Weights are published in `rollout.dtype`. Where `model.dtype` is wider, the audited policy is the one that is
    served: π_V rounded, and log π_V with it.
    """

    def __init__(self, path: str, config: RunConfig) -> None:
        settle("other", config)
        import torch

        from rlsys.learning.audit import GradientAudit
        from rlsys.rewards import resolve_reward, score_group
        from rlsys.tasks import build_task
        from rlsys.weights.transport import ObjectStoreTransport

        torch.set_num_threads(1)
        self._audit = GradientAudit(config, path)
        self._reward = partial(
            score_group,
            resolve_reward(config.reward.function, build_task(config.task, config.seed).score),
            timeout_s=config.reward.timeout_s,
            retries=config.reward.retries,
        )
        self._transport = ObjectStoreTransport()
        self._spans = SpanLog()
        self._seed = config.seed

    def audit(
        self, ticket: WeightTicket, scores: Sequence[GroupScore], places: Sequence[Place], *bundles: Bundle
    ) -> dict[str, float | None]:
        """`audit/*` of groups of the batch that was trained at the ticket's version."""
        from rlsys.weights.buffer import unpack

        ticket = ticket.stored or ticket
        manifest = ticket.manifest
        unpack(manifest, self._transport.receive(ticket.payload), self._audit.policy.named_tensors())
        batch = [ScoredGroup(group=g, score=s) for g, s in zip(select(places, bundles), scores, strict=True)]
        with self._spans.span("audit", version=manifest.version):
            return self._audit.measure(batch, self._reward, version=manifest.version, seed=self._seed).metrics()

    @ray.method(concurrency_group="control")
    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    @ray.method(concurrency_group="control")
    def ready(self) -> bool:
        """The model is loaded."""
        return True
