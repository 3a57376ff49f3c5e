"""The learner actor, one for each rank: one optimizer step a call, and the weights each step made."""

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import require_seen, settle
from rlsys.actors.publishing import Publisher, precisions
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import BatchArrays, FloatArray, GroupScore, LearnerStep, ScoredGroup
from rlsys.versions import PolicyVersion
from rlsys.weights.collective import Group
from rlsys.weights.transport import WeightTicket


@ray.remote(concurrency_groups={"control": 1, "weights": 4})
class LearnerActor:
    """Holds the learner, or one rank of it; the first rank publishes its parameters.

    Every rank gets every call of the learner's port, and the first one's answers count: what the others know is the
    same. Broadcasts run beside training: they may wait for a worker.
    """

    def __init__(self, path: str, config: RunConfig, resume: Path | None, rank: int = 0) -> None:
        self._on_gpu = config.resources.learner_gpus > 0
        settle("learner", config, index=rank, on_gpu=self._on_gpu)
        require_seen("run_dir", config.run_dir)
        require_seen("model", path)
        self._path, self._config, self._resume, self._rank = path, config, resume, rank
        self._host = ray.util.get_node_ip_address()
        self._listener: socket.socket | None = None
        self._spans = SpanLog()

    def meet(self) -> str:
        """Where the ranks find each other, address:port: the first rank's node, a free port."""
        from rlsys.learning.ranks import listen

        self._listener = listen(self._host)
        return f"{self._host}:{self._listener.getsockname()[1]}"

    def load(self, meeting: str | None) -> None:
        """Find the other ranks, if there are any, and load the policy."""
        import torch

        from rlsys.learning.checkpoint import load
        from rlsys.learning.learner import Learner
        from rlsys.learning.ranks import ALONE, join

        config, ranks, device = self._config, ALONE, "cuda" if self._on_gpu else "cpu"
        torch.set_num_threads(config.resources.learner_threads)
        torch.manual_seed(config.seed)
        if meeting is not None:
            ranks = join(
                self._rank,
                config.learner.ranks,
                meeting=meeting,
                host=self._host,
                timeout_s=config.learner.rank_timeout_s,
                listener=self._listener,
                sharding=config.learner.sharding,
                device=device,
            )
        self._learner = Learner.of(config, self._resume or self._path, device=device, ranks=ranks)
        if self._resume is not None:
            self._learner.load_state(load(self._resume))
        if self._rank == 0:
            policy, gathered = self._learner.policy, self._learner.named_tensors
            self._publisher = Publisher(
                config, policy.named_tensors(), gathered, vocab_size=policy.vocab_size, address=self._host
            )

    def update(
        self,
        scores: Sequence[GroupScore],
        reference: Sequence[FloatArray] | None,
        places: Sequence[Place],
        *bundles: Bundle,
    ) -> tuple[LearnerStep, WeightTicket | None, BatchArrays | None]:
        """One optimizer step. Call with `num_returns=3`: the arrays stay in the object store."""
        batch = [ScoredGroup(group=g, score=s) for g, s in zip(select(places, bundles), scores, strict=True)]
        with self._spans.span("step", version=self._learner.version, responses=sum(len(s.rewards) for s in scores)):
            update = self._learner.update(batch, reference)
        return update.step, self.publish(), update.arrays if self._rank == 0 else None

    def publish(self) -> WeightTicket | None:
        """The current version, ready to be taken by the workers; the other ranks only help to gather it."""
        if self._rank > 0:
            for _ in precisions(self._config):
                deque(self._learner.named_tensors(), maxlen=0)
            return None
        with self._spans.span("publish", version=self._learner.version, bytes=self._publisher.nbytes):
            return self._publisher.publish(self._learner.version)

    def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically, with the initial model's tokenizer; older ones are pruned."""
        from rlsys.learning.checkpoint import prune, save

        save(directory, self._learner, tokenizer_from=self._path, extra=extra)
        if self._rank == 0:
            prune(self._config.path, self._config.checkpoint.keep)

    @ray.method(concurrency_group="control")
    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()

    # What `weights.collective` asks of the learner's first rank.

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
