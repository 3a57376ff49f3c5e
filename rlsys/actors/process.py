"""What every actor process does before it imports anything heavy: take its cores, one thread each."""

import logging
import os
import socket
from pathlib import Path
from typing import Literal

from rlsys.config.schema import RunConfig
from rlsys.errors import ClusterError

Role = Literal["learner", "rollout", "other"]

NICE = {"rollout": 0, "learner": 5, "other": 10}
"""Where cores are shared, a rollout's results travel before the learner steps, and the others take what is left."""


def settle(role: Role, config: RunConfig, *, index: int = 0, on_gpu: bool = False) -> list[int]:
    """Bind this process to its cores and its numeric libraries to as many threads; returns the cores it found.

    `index` is that of the rollout worker or the learner rank.
    One thread a process is what makes two of them share a small machine well. Without pinning
    (`resources.pin_cores`, or on a GPU) it only counts its threads. Must run before torch is imported.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    threads = config.resources.learner_threads if role == "learner" else 1
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = sorted(os.sched_getaffinity(0))
    cores = cores_of(found, role, config, index=index)
    if config.resources.pin_cores and not on_gpu:
        os.nice(NICE[role])
        for thread in threads_of_process():
            _bind(thread, cores)
    return found


def leave_core_to(thread: int, found: list[int], config: RunConfig) -> None:
    """Move a rollout worker's other threads off its core, to where the other roles are: only `thread` decodes.

    What arrives and leaves with requests is a tenth of a decode step. `found`: what `settle` returned.
    """
    if config.resources.pin_cores:
        cores = cores_of(found, "other", config)
        for other in threads_of_process():
            if other != thread:
                _bind(other, cores)


def cores_of(found: list[int], role: Role, config: RunConfig, *, index: int = 0) -> list[int]:
    """Those of the cores `found` that a run's process works on. See `assign_cores`."""
    return assign_cores(
        found,
        role,
        index=index,
        learner=config.resources.learner_threads,
        ranks=config.learner.ranks,
        rollouts=_reserved(config),
    )


def threads_of_process() -> list[int]:
    """Ids of this process's threads, as the operating system knows them."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def require_seen(field: str, path: Path | str) -> None:
    """Raise ClusterError unless this node sees a directory that the command saw. Hub names are not looked for."""
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ClusterError(
            f"{field}: node {socket.gethostname()} does not see {path}; it must be on storage that all nodes share"
        )


def assign_cores(
    cores: list[int], role: Role, *, index: int = 0, learner: int = 1, ranks: int = 1, rollouts: int = 1
) -> list[int]:
    """The cores of one process, where the learner's `ranks` own the last ones, `learner` each, and `rollouts` one each.

    The others keep off the workers' cores: a decode step that is interrupted delays hundreds of responses.

    >>> assign_cores([0, 1, 2, 3], "learner")
    [3]
    >>> assign_cores([0, 1, 2, 3], "learner", index=1, ranks=2)
    [3]
    >>> assign_cores([0, 1, 2, 3], "rollout", index=4, rollouts=5)
    [1]
    >>> assign_cores([0, 1, 2, 3], "other", rollouts=2)
    [2, 3]
    """
    if len(cores) <= learner * ranks:
        return cores
    shared, own = cores[: -learner * ranks], cores[-learner * ranks :]
    if role == "learner":
        return own[index * learner : (index + 1) * learner]
    return [shared[index % len(shared)]] if role == "rollout" else shared[rollouts:] + own


def _reserved(config: RunConfig) -> int:
    """Rollout workers whose cores are kept free: those of the start, or all that may join where that is said."""
    return config.scaling.rollout_max or config.rollout.workers


def _bind(thread: int, cores: list[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        logging.getLogger(__name__).debug("thread %d ended before it was bound", thread)
