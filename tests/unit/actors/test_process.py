"""One core a process, as far as there are cores."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsys.actors.process import Role, assign_cores, require_seen
from rlsys.errors import ClusterError


@pytest.mark.parametrize(
    ("cores", "role", "index", "learner", "expected"),
    [
        # one core: all share it
        ([0], "learner", 0, 1, [0]),
        ([0], "rollout", 3, 1, [0]),
        # two: the learner has the last one, every rollout worker the other
        ([0, 1], "learner", 0, 1, [1]),
        ([0, 1], "rollout", 0, 1, [0]),
        ([0, 1], "rollout", 1, 1, [0]),
        ([0, 1], "other", 0, 1, [1]),
        # more: rollout workers in turn over all but the learner's, whatever the cores are called
        ([2, 5, 7, 9], "learner", 0, 1, [9]),
        ([2, 5, 7, 9], "rollout", 0, 1, [2]),
        ([2, 5, 7, 9], "rollout", 2, 1, [7]),
        ([2, 5, 7, 9], "rollout", 3, 1, [2]),
        ([2, 5, 7, 9], "other", 0, 1, [7, 9]),
        # a learner with several threads owns as many cores
        ([0, 1, 2, 3], "learner", 0, 3, [1, 2, 3]),
        ([0, 1, 2, 3], "rollout", 1, 3, [0]),
        ([0, 1, 2, 3], "other", 0, 2, [2, 3]),
        ([0, 1], "learner", 0, 2, [0, 1]),
        ([0, 1], "learner", 0, 8, [0, 1]),
    ],
)
def test_cores_are_assigned_by_role(
    cores: list[int], role: Role, index: int, learner: int, expected: list[int]
) -> None:
    """There are two rollout workers."""
    assert assign_cores(cores, role, index=index, learner=learner, rollouts=2) == expected


@pytest.mark.parametrize(
    ("cores", "learner", "expected"),
    [
        ([0, 1, 2], 1, ([1], [2], [0], [1, 2])),
        ([0, 1, 2, 3, 4, 5], 2, ([2, 3], [4, 5], [0], [1, 2, 3, 4, 5])),
        # too few: all share them
        ([0, 1], 1, ([0, 1], [0, 1], [0, 1], [0, 1])),
    ],
)
def test_each_learner_rank_has_cores_of_its_own(
    cores: list[int], learner: int, expected: tuple[list[int], ...]
) -> None:
    """Two ranks, one rollout worker, and the others."""
    processes: list[tuple[Role, int]] = [("learner", 0), ("learner", 1), ("rollout", 0), ("other", 0)]
    found = [assign_cores(cores, role, index=index, learner=learner, ranks=2) for role, index in processes]
    assert found == list(expected)


@pytest.mark.parametrize("count", range(2, 9))
def test_no_rollout_worker_gets_the_core_of_the_learner(count: int) -> None:
    cores = list(range(count))
    learner = assign_cores(cores, "learner")
    workers = [assign_cores(cores, "rollout", index=i) for i in range(count - 1)]
    assert sorted(core for worker in workers for core in worker) == [c for c in cores if c not in learner]


IN_PROCESSES = """
import os, sys, threading
from rlsys import RunConfig
from rlsys.actors.process import leave_core_to, settle

def start():
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait, daemon=True)
    thread.start()
    return thread.native_id

def cores(number=0):
    return sorted(os.sched_getaffinity(number))

def settled(role, pin):
    config = RunConfig.model_validate({"task": {"name": "arithmetic"}, "resources": {"pin_cores": pin}})
    thread = start()
    found = settle(role, config)
    return found, cores(), cores(thread), os.environ["OMP_NUM_THREADS"], os.nice(0)

def left():
    config = RunConfig.model_validate({"task": {"name": "arithmetic"}})
    found = settle("rollout", config)
    thread = start()
    leave_core_to(thread, found, config)
    return cores(thread), cores()

for work in sys.argv[1:]:  # each in a process of its own, for it changes the process
    if os.fork() == 0:
        print(eval(work), flush=True)
        os._exit(0)
    os.wait()
"""


def in_processes(*works: str) -> list[Any]:
    """What each expression gives in a fresh process."""
    command = [sys.executable, "-c", IN_PROCESSES, *works]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return [ast.literal_eval(line) for line in shown.stdout.splitlines()]


def test_pinning_binds_threads_that_run_already_and_lets_the_others_yield() -> None:
    cases = [(role, pin, yields) for role, yields in (("learner", 5), ("other", 10)) for pin in (True, False)]
    found = in_processes(*(f"settled({role!r}, {pin})" for role, pin, _ in cases))
    here = sorted(os.sched_getaffinity(0))
    for result, (_, pin, yields) in zip(found, cases, strict=True):
        bound, nice = (here[-1:], yields) if pin else (here, 0)
        assert result == (here, bound, bound, "1", min(19, os.nice(0) + nice))  # 19 is the end of the scale


def test_a_rollout_workers_core_is_left_to_the_thread_that_decodes() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert in_processes("left()") == [(cores[:1], cores[1:] or cores)]


def test_a_directory_that_only_another_node_has_is_missed_by_name(tmp_path: Path) -> None:
    require_seen("model", tmp_path)
    require_seen("model", "organisation/model")
    with pytest.raises(ClusterError, match=r"model: node .+ does not see .*/elsewhere; it must be on storage that all"):
        require_seen("model", tmp_path / "elsewhere")
