"""What every actor process does before it imports anything heavy: take its cores, one thread each."""

import logging
import os
from pathlib import Path
from typing import Literal

Role = Literal["learner", "rollout", "other"]


def settle(role: Role, *, index: int = 0, threads: int = 1, pin: bool) -> list[int]:
    """Bind this process to its cores and its numeric libraries to `threads`; returns the cores.

    With pinning, the learner owns the last `threads` cores of its node; the others share the rest, rollout
    workers one core each in turn. One thread a process is what makes two of them share a small machine well.
    Must run before torch is imported.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cores = assign_cores(sorted(os.sched_getaffinity(0)), role, index=index, threads=threads)
    if pin:
        for thread in Path("/proc/self/task").iterdir():
            _bind(int(thread.name), cores)
    return cores


def assign_cores(cores: list[int], role: Role, *, index: int, threads: int) -> list[int]:
    """The cores of one process.

    >>> assign_cores([0, 1, 2, 3], "learner", index=0, threads=1)
    [3]
    >>> assign_cores([0, 1, 2, 3], "rollout", index=4, threads=1)
    [1]
    """
    if len(cores) <= threads:
        return cores
    shared, own = cores[:-threads], cores[-threads:]
    if role == "learner":
        return own
    return [shared[index % len(shared)]] if role == "rollout" else cores


def _bind(thread: int, cores: list[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        logging.getLogger(__name__).debug("thread %d ended before it was bound", thread)
