"""The learner actor: one optimizer step a call, and the weights each step made."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import require_seen, settle
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import BatchArrays, FloatArray, GroupScore, LearnerStep, ScoredGroup
from rlsys.versions import PolicyVersion
from rlsys.weights.transport import WeightTicket

if TYPE_CHECKING:
    from rlsys.weights.buffer import WeightPacker


@ray.remote(concurrency_groups={"control": 1})
class LearnerActor:
    """Holds the learner and the buffer its parameters are published from."""

    def __init__(self, path: str, config: RunConfig, resume: Path | None) -> None:
        on_gpu = config.resources.learner_gpus > 0
        threads = config.resources.learner_threads
        settle("learner", config, on_gpu=on_gpu)
        require_seen("run_dir", config.run_dir)
        require_seen("model", path)
        import torch

        from rlsys.learning.checkpoint import load
        from rlsys.learning.learner import Learner
        from rlsys.weights.buffer import WeightPacker
        from rlsys.weights.transport import ObjectStoreTransport

        torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        self._learner = Learner.of(config, resume or path, device="cuda" if on_gpu else "cpu")
        if resume is not None:
            self._learner.load_state(load(resume).state)
        self._path, self._run, self._keep = path, config.path, config.checkpoint.keep
        self._packer = WeightPacker(
            self._learner.named_tensors(),
            dtype=config.rollout.dtype,
            vocab_size=self._learner.policy.vocab_size,
        )
        self._exact_packer = None
        if config.probe.fraction and config.rollout.dtype != config.model.dtype:
            self._exact_packer = WeightPacker(
                self._learner.named_tensors(),
                dtype=config.model.dtype,
                vocab_size=self._learner.policy.vocab_size,
            )
        self._transport = ObjectStoreTransport()
        self._spans = SpanLog()
        self._tickets: list[WeightTicket] = []

    def update(
        self,
        scores: Sequence[GroupScore],
        reference: Sequence[FloatArray] | None,
        places: Sequence[Place],
        *bundles: Bundle,
    ) -> tuple[LearnerStep, WeightTicket, BatchArrays]:
        """One optimizer step. Call with `num_returns=3`: the arrays stay in the object store."""
        batch = [ScoredGroup(group=g, score=s) for g, s in zip(select(places, bundles), scores, strict=True)]
        with self._spans.span("step", version=self._learner.version, responses=sum(len(s.rewards) for s in scores)):
            update = self._learner.update(batch, reference)
        return update.step, self.publish(), update.arrays

    def publish(self) -> WeightTicket:
        """The current version in the object store."""
        with self._spans.span("publish", version=self._learner.version, bytes=self._packer.nbytes):
            exact = None if self._exact_packer is None else self._send(self._exact_packer)
            ticket = replace(self._send(self._packer), exact=exact)
        self._tickets = [*self._tickets[-1:], ticket]  # the store keeps what somebody may still fetch
        return ticket

    def _send(self, packer: "WeightPacker") -> WeightTicket:
        start = time.perf_counter()
        manifest, buffer = packer.pack(self._learner.named_tensors(), self._learner.version)
        payload = self._transport.send(buffer)
        return WeightTicket(manifest=manifest, payload=payload, publish_s=time.perf_counter() - start)

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically, with the initial model's tokenizer; older ones are pruned."""
        from rlsys.learning.checkpoint import prune, save

        save(directory, self._learner, tokenizer_from=self._path, extra=extra)
        prune(self._run, self._keep)

    @ray.method(concurrency_group="control")
    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    @ray.method(concurrency_group="control")
    def version(self) -> PolicyVersion:
        """Batches applied so far; also tells that the actor is ready."""
        return self._learner.version
