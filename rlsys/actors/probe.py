"""The probe actor: splits the log-ratio of a share of each batch, off the learner's path."""

from collections.abc import Sequence

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import BatchArrays
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket

LATE = 16
"""Versions that may be published before a batch is probed: the history of a run may lag behind its learner."""


@ray.remote(concurrency_groups={"control": 1})
class ProbeActor:
    """Holds as many versions' weights as `staleness.max` lets tokens be old."""

    def __init__(self, path: str, config: RunConfig) -> None:
        on_gpu = config.resources.reference_gpus > 0
        settle("other", config, on_gpu=on_gpu)
        import torch

        from rlsys.learning.probe import Probe
        from rlsys.weights.transport import ObjectStoreTransport

        torch.set_num_threads(1)
        self._spans = SpanLog()
        self._transport = ObjectStoreTransport()
        self._probe = Probe(
            path,
            dtype=config.model.dtype,
            temperature=config.rollout.temperature,
            fraction=config.probe.fraction,
            oldest=config.staleness.max,
            ahead=LATE,
            seed=config.seed,
            row_tokens=config.learner.row_tokens,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            device="cuda" if on_gpu else "cpu",
        )

    def keep(self, ticket: WeightTicket) -> None:
        """Hold a version: views of the bytes in the object store, in the learner's own precision."""
        import torch

        exact = ticket.exact or ticket.stored or ticket
        buffer = torch.frombuffer(self._transport.receive(exact.payload), dtype=torch.uint8)
        self._probe.keep(exact.manifest.version, {slot.name: slot.view(buffer) for slot in exact.manifest.layout})

    def split(
        self, version: PolicyVersion, arrays: BatchArrays, places: Sequence[Place], *bundles: Bundle
    ) -> dict[str, float | None]:
        """`split/…` of the batch trained at `version`."""
        with self._spans.span("probe", version=version):
            return self._probe.metrics(version, select(places, bundles), arrays)

    @ray.method(concurrency_group="control")
    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    @ray.method(concurrency_group="control")
    def ready(self) -> bool:
        """The model is loaded."""
        return True
