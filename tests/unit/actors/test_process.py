"""One core a process, as far as there are cores."""

import subprocess
import sys

import pytest

from rlsys.actors.process import Role, assign_cores


@pytest.mark.parametrize(
    ("cores", "role", "index", "threads", "expected"),
    [
        # one core: all share it
        ([0], "learner", 0, 1, [0]),
        ([0], "rollout", 3, 1, [0]),
        # two: the learner has the last one, every rollout worker the other
        ([0, 1], "learner", 0, 1, [1]),
        ([0, 1], "rollout", 0, 1, [0]),
        ([0, 1], "rollout", 1, 1, [0]),
        ([0, 1], "other", 0, 1, [0, 1]),
        # more: rollout workers in turn over all but the learner's, whatever the cores are called
        ([2, 5, 7, 9], "learner", 0, 1, [9]),
        ([2, 5, 7, 9], "rollout", 0, 1, [2]),
        ([2, 5, 7, 9], "rollout", 2, 1, [7]),
        ([2, 5, 7, 9], "rollout", 3, 1, [2]),
        ([2, 5, 7, 9], "other", 0, 1, [2, 5, 7, 9]),
        # a learner with several threads owns as many cores
        ([0, 1, 2, 3], "learner", 0, 3, [1, 2, 3]),
        ([0, 1], "learner", 0, 2, [0, 1]),
        ([0, 1], "learner", 0, 8, [0, 1]),
    ],
)
def test_cores_are_assigned_by_role(
    cores: list[int], role: Role, index: int, threads: int, expected: list[int]
) -> None:
    assert assign_cores(cores, role, index=index, threads=threads) == expected


@pytest.mark.parametrize("count", range(2, 9))
def test_no_rollout_worker_gets_the_core_of_the_learner(count: int) -> None:
    cores = list(range(count))
    learner = assign_cores(cores, "learner", index=0, threads=1)
    workers = [assign_cores(cores, "rollout", index=i, threads=1) for i in range(count - 1)]
    assert sorted(core for worker in workers for core in worker) == [c for c in cores if c not in learner]


SETTLE = """
import os, threading
from rlsys.actors.process import settle
waiting = threading.Event()
thread = threading.Thread(target=waiting.wait)
thread.start()
cores = settle("learner", threads=1, pin={pin})
bound = [sorted(os.sched_getaffinity(number)) for number in (0, thread.native_id)]
print(cores, *bound, os.environ["OMP_NUM_THREADS"])
waiting.set()
"""


@pytest.mark.parametrize("pin", [True, False])
def test_pinning_binds_threads_that_run_already(pin: bool) -> None:
    import os

    here = sorted(os.sched_getaffinity(0))
    shown = subprocess.run([sys.executable, "-c", SETTLE.format(pin=pin)], capture_output=True, text=True, check=True)
    bound = here[-1:] if pin else here
    assert shown.stdout == f"{here[-1:]} {bound} {bound} 1\n"
