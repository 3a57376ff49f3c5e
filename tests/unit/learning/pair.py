"""Two learner ranks in processes of their own, over gloo on loopback, and what tests let them do."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from rlsys.config.schema import AdvantageConfig, KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig, Sharding
from rlsys.learning import checkpoint
from rlsys.learning.learner import Learner, LearnerUpdate
from rlsys.learning.ranks import ALONE, Ranks, join, listen
from rlsys.records import BatchArrays, FloatArray, LearnerStep, ScoredGroup
from rlsys.weights.buffer import WeightPacker

HOST = "127.0.0.1"

Options = dict[str, Any]
Batch = tuple[list[ScoredGroup], list[FloatArray] | None]


def learner_on(path: Path, options: Options, ranks: Ranks = ALONE) -> Learner:
    """A learner on the model in `path`; `options` by section, as in `make_learner`."""
    return Learner(
        path,
        model=ModelConfig(**options.get("model", {})),
        learner=LearnerConfig(
            **{"steps": 20, "warmup_steps": 0, "row_tokens": 32, "grad_clip": 1e9, **options.get("learner", {})}
        ),
        objective=ObjectiveConfig(**options.get("objective", {})),
        advantage=AdvantageConfig(**options.get("advantage", {})),
        kl=KLConfig(**options.get("kl", {})),
        temperature=1.0,
        staleness_max=8,
        max_new_tokens=8,
        ranks=ranks,
    )


@dataclass
class Trained:
    """What a rank can tell after some batches; tensors are whole, and the first rank's."""

    steps: list[LearnerStep]
    arrays: list[BatchArrays]
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    held: int
    """Numbers of parameters and optimizer state in this process."""


def train(
    ranks: Ranks, path: Path, options: Options, batches: list[Batch], *, resume: bool = False, save: Path | None = None
) -> Trained:
    """Train on the batches; from the checkpoint `path`, or into the checkpoint `save`."""
    learner = learner_on(path, options, ranks)
    if resume:
        learner.load_state(checkpoint.load(path))
    updates: list[LearnerUpdate] = [learner.update(*batch) for batch in batches]
    if save is not None:
        checkpoint.save(save, learner, tokenizer_from=path, extra={"by": ranks.size})
    return Trained(
        steps=[update.step for update in updates],
        arrays=[update.arrays for update in updates],
        parameters={name: tensor.clone() for name, tensor in learner.named_tensors()},
        optimizer={name: tensor.clone() for name, tensor in learner.state().tensors.items()},
        held=sum(
            getattr(tensor, "_local_tensor", tensor).numel()
            for tensor in [*learner.policy.model.parameters(), *learner._optimizer.state().values()]
        ),
    )


def refuse(ranks: Ranks, path: Path, options: Options, good: Batch, bad: Batch) -> tuple[LearnerStep, bool, int]:
    """A good batch, then a bad one: what came of the bad, whether it changed no bit here, and the version."""
    learner = learner_on(path, options, ranks)
    learner.update(*good)

    def held() -> list[torch.Tensor]:
        tensors = [*learner.policy.model.parameters(), *learner._optimizer.state().values()]
        return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]

    before = held()
    step = learner.update(*bad).step
    same = all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
    return step, same, learner.version


def publish(ranks: Ranks, path: Path, options: Options, batches: list[Batch], dtype: str) -> list[str]:
    """Checksums of the versions that the batches make, as packed by the first rank."""
    learner = learner_on(path, options, ranks)
    packer = WeightPacker(learner.policy.named_tensors(), dtype=dtype, vocab_size=learner.policy.vocab_size)
    found = []
    for batch in batches:
        learner.update(*batch)
        tensors = list(learner.named_tensors())
        if tensors:
            found.append(packer.pack(tensors, learner.version)[0].checksum)
    return found


def desert(ranks: Ranks, path: Path, batch: Batch, how: str) -> str:
    """An update in which the second rank "dies" or "hangs"; what the first one says of it."""
    learner = learner_on(path, {}, ranks)
    if ranks.rank == 1:
        if how == "dies":
            os._exit(1)
        time.sleep(1e6)
    try:
        learner.update(*batch)
    except RuntimeError as error:
        return str(error)
    return "nothing"


class Pair:
    """Call a function of this module on both ranks: `pair(train, sharding, ...)` returns what each returned."""

    def __init__(self, connections: list[Connection], processes: list[BaseProcess]) -> None:
        self._connections, self.processes = connections, processes

    def start(self, work: Callable[..., Any], sharding: Sharding, *args: Any, **options: Any) -> None:
        for connection in self._connections:
            connection.send((work, sharding, args, options))

    def result(self, rank: int) -> Any:
        failed, value = self._connections[rank].recv()
        assert not failed, f"rank {rank}:\n{value}"
        return value

    def __call__(self, work: Callable[..., Any], sharding: Sharding, *args: Any, **options: Any) -> list[Any]:
        self.start(work, sharding, *args, **options)
        return [self.result(rank) for rank in range(len(self._connections))]


@contextmanager
def pair(timeout_s: float = 120.0) -> Iterator[Pair]:
    """Two ranks that wait for work; killed at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports PyTorch once; the processes are as fresh as spawned ones
    ends = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_serve, args=(rank, there, timeout_s), daemon=True)
        for rank, (_, there) in enumerate(ends)
    ]
    try:
        for process in processes:
            process.start()
        for _, there in ends:
            there.close()
        meeting, _ = [here.recv() for here, _ in ends]  # both are up: waiting for one another starts now
        for here, _ in ends:
            here.send(meeting)
        yield Pair([here for here, _ in ends], list(processes))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(rank: int, connection: Connection, timeout_s: float) -> None:
    torch.set_num_threads(1)
    listener = listen(HOST) if rank == 0 else None
    connection.send(listener and f"{HOST}:{listener.getsockname()[1]}")
    meeting = connection.recv()
    join(rank, 2, meeting=meeting, host=HOST, timeout_s=timeout_s, listener=listener)
    while True:
        try:
            work, sharding, args, options = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, work(Ranks(rank, 2, sharding), *args, **options)))
        except Exception:
            connection.send((True, traceback.format_exc()))
