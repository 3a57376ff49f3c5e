"""The learner actor: one optimizer step a call, and the weights each step made."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.actors.publishing import Publisher
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import BatchArrays, FloatArray, GroupScore, LearnerStep, ScoredGroup
from rlsys.versions import PolicyVersion
from rlsys.weights.collective import Group
from rlsys.weights.transport import WeightTicket


@ray.remote(concurrency_groups={"control": 1, "weights": 4})
class LearnerActor:
    """Holds the learner and publishes its parameters. Broadcasts run beside training: they may wait for a worker."""

    def __init__(self, path: str, config: RunConfig, resume: Path | None) -> None:
        on_gpu = config.resources.learner_gpus > 0
        threads = config.resources.learner_threads
        settle("learner", config, on_gpu=on_gpu)
        import torch

        from rlsys.learning.checkpoint import load
        from rlsys.learning.learner import Learner

        torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        self._learner = Learner.of(config, resume or path, device="cuda" if on_gpu else "cpu")
        if resume is not None:
            self._learner.load_state(load(resume).state)
        self._path, self._run, self._keep = path, config.path, config.checkpoint.keep
        self._publisher = Publisher(
            config, self._learner.named_tensors, self._learner.policy.vocab_size, ray.util.get_node_ip_address()
        )
        self._spans = SpanLog()

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
        """The current version, ready to be taken by the workers."""
        with self._spans.span("publish", version=self._learner.version, bytes=self._publisher.nbytes):
            return self._publisher.publish(self._learner.version)

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

    # What `weights.collective` asks of the learner.

    @ray.method(concurrency_group="weights")
    def listen(self) -> tuple[str, int]:
        """Where the next group of workers is to meet."""
        return self._publisher.listen()

    @ray.method(concurrency_group="weights")
    def join(self, group: Group) -> None:
        """Returns when the group has met."""
        self._publisher.join(group)

    @ray.method(concurrency_group="weights")
    def broadcast(self, version: PolicyVersion) -> None:
        """Send a version to the group."""
        start = time.time()
        self._publisher.broadcast(version)
        self._spans.add("broadcast", start, time.time(), track=1, version=version)

    @ray.method(concurrency_group="weights")
    def leave(self, epoch: int) -> None:
        """Give a group up."""
        self._publisher.leave(epoch)
