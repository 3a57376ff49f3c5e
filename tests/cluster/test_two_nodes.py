"""A run over two machines: the learner on one, the rollout workers on the other, a wire between them.

The machines are network namespaces, everything in them is real: Ray nodes that ask for a token, vLLM engines, and
every byte of every version on the wire.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.cluster.namespaces import Cluster, Node, lacking, two_nodes, write_token
from tests.integration.running import Outcome, Running, environment, program, responses, rows, steps

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS = 30
TRAIN = [
    *("-m", "rlsys.cli", "train", str(ROOT / "configs" / "quickstart.yaml"), "--json"),
    *("run_dir=runs", f"model.warmstart.cache_dir={ROOT / '.cache' / 'warmstart'}"),
    *("rollout.workers=2", "resources.roles=true", "eval.every=0", "checkpoint.every=0"),
    *("kl.coef=0.0", "kl.reference=false", "probe.fraction=0.0"),  # two cores have enough to do
]


@dataclass
class Story:
    """A run and the wire it used; `actors` are those that were seen on each node."""

    home: Path
    outcome: Outcome
    sent: int
    """Bytes from the learner's node to the far one, from the start of the command to its end."""
    received: int
    actors: dict[str, set[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.home / "runs" / "quickstart"

    @property
    def versions(self) -> int:
        return STEPS + 1


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    """Where namespaces cannot be made the tests skip, which continuous integration counts as a failure."""
    if why := lacking():
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes(environment()) as cluster:
        cluster.start(far=2)
        yield cluster


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    home, before = tmp_path_factory.mktemp("two-nodes"), (cluster.near.sent, cluster.far.sent)
    with train(cluster, home, f"learner.steps={STEPS}") as command:
        command.until(lambda: len(steps(home / "runs" / "quickstart")) > 0)
        actors = {node.address: actors_on(node) for node in (cluster.near, cluster.far)}
        outcome = command.finish()
    print(outcome.stdout, outcome.stderr)
    assert outcome.code == 0
    return Story(home, outcome, cluster.near.sent - before[0], cluster.far.sent - before[1], actors)


def train(cluster: Cluster, home: Path, *overrides: str) -> contextlib.AbstractContextManager[Running]:
    """`rlsys train` on the near node."""
    command = (sys.executable, *TRAIN, f"resources.address={cluster.address}", *overrides)
    return program(home, *cluster.near.inside(*command), **cluster.environment)


def actors_on(node: Node) -> set[str]:
    """Class names of the run's actors there, which Ray shows in the names of their processes."""
    found = set()
    for pid in node.pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(re.findall(r"ray::(\w+Actor)", " ".join(psutil.Process(pid).cmdline())))
    return found


def test_the_rollout_workers_are_on_one_node_and_all_else_on_the_other(cluster: Cluster, story: Story) -> None:
    near, far = (story.actors[node.address] for node in (cluster.near, cluster.far))
    assert far == {"RolloutActor"}
    assert {"ControllerActor", "LearnerActor", "RewardActor", "RecorderActor", "WeightSyncActor"} == near


def test_the_run_learns(story: Story) -> None:
    accuracy = {int(version): value for version, value in json.loads(story.outcome.stdout)["accuracy"].items()}
    assert accuracy[STEPS] > accuracy[0] + 0.2
    assert [row["step"] for row in steps(story.run)] == list(range(1, STEPS + 1))


def test_the_bound_holds_and_nothing_is_lost_over_the_wire(story: Story) -> None:
    for row in steps(story.run):
        assert row["staleness/violations"] == row["ledger/lost"] == 0
        assert row["staleness/max"] <= row["staleness/bound"]
    assert {row["end"] for row in rows(story.run / "ledger.jsonl")} == {"trained"}
    assert {r["worker"] for r in responses(story.run)} == {"rollout-0", "rollout-1"}


def test_every_version_crosses_the_wire_whole(story: Story) -> None:
    """A worker verifies a version's checksum before it serves it, and refuses what is not as it was sent."""
    kinds = {row["kind"] for row in rows(story.run / "events.jsonl")}
    assert not kinds & {"sync_failed", "worker_lost", "evaluation_failed"}
    served = {worker: versions_served(story.run, worker) for worker in ("rollout-0", "rollout-1")}
    for versions in served.values():
        assert all(older < newer for older, newer in pairwise(versions))
        assert versions[-1] == STEPS
    assert set().union(*served.values()) == set(range(story.versions))
    assert steps(story.run)[-1]["weight_sync/acked"] >= 1


def test_the_far_engines_serve_exactly_what_the_near_learner_has(story: Story) -> None:
    newest = [r for r in responses(story.run) if set(r["versions"]) == {r["step"] - 1}]
    assert len(newest) > 100
    for r in newest:
        np.testing.assert_allclose(r["policy_logprobs"], r["behavior_logprobs"], rtol=0, atol=1e-3)


def test_a_version_crosses_the_wire_once_for_all_workers_of_a_node(story: Story, record_property: Any) -> None:
    """Two workers, yet every version is sent once; the rest is prompts, requests and what TCP adds."""
    size = steps(story.run)[0]["weight_sync/bytes"]
    each = story.sent / story.versions
    record_property("version_bytes", size)
    record_property("sent_bytes_per_version", each)
    record_property("received_bytes_per_version", story.received / story.versions)
    print(f"{size:.0f} bytes a version, {each:.0f} sent for each ({each / size:.3f}), {story.received} came back")
    assert 1 <= each / size < 1.3


def versions_served(run: Path, worker: str) -> list[int]:
    """Every version that a worker switched to, in order."""
    events = json.loads((run / "trace.json").read_text())
    (pid,) = (e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == worker)
    return [e["args"]["version"] for e in events if e["name"] == "pause" and e["pid"] == pid]


def test_a_node_with_another_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        cluster.join(1, write_token(tmp_path / "token"))
    assert "InvalidAuthToken" in refused.value.output


def test_a_command_with_another_token_is_told_so(cluster: Cluster, tmp_path: Path) -> None:
    command = cluster.far.inside(sys.executable, *TRAIN, f"resources.address={cluster.address}")
    with program(tmp_path, *command, **{**cluster.environment, **write_token(tmp_path / "token")}) as run:
        outcome = run.finish()
    assert outcome.code == 1
    (said,) = (line for line in outcome.stderr.splitlines() if line.startswith("ClusterError: "))
    assert cluster.address in said
    assert "RAY_AUTH_TOKEN" in said
    assert outcome.left == []


KILLED = """
import os, signal, subprocess
from tests.cluster.namespaces import two_nodes

with two_nodes(os.environ) as cluster:
    for node in (cluster.near, cluster.far):
        subprocess.Popen(node.inside("sleep", "1000"))
        print(node.namespace, flush=True)
    while not (cluster.near.pids and cluster.far.pids):
        pass
    print(cluster.near.scratch.parent, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_nodes_are_cleared_away_even_when_who_made_them_is_killed() -> None:
    """Who clears away holds the pipe until it has ended."""
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    near, far, scratch = killed.stdout.split()
    assert not any(path.exists() for path in (Path("/run/netns", near), Path("/run/netns", far), Path(scratch)))


def test_a_run_goes_on_without_a_node_that_is_cut_off(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"

    def lost() -> list[dict[str, Any]]:
        return [row for row in rows(run / "events.jsonl") if row["kind"] == "worker_lost"]

    with two_nodes(environment()) as cluster:
        cluster.start(near=1, far=1)
        with train(cluster, tmp_path, "learner.steps=100000") as command:
            command.until(lambda: len(steps(run)) >= 3)
            assert all("RolloutActor" in actors_on(node) for node in (cluster.near, cluster.far))
            cluster.far.unplug()
            command.until(lambda: len(lost()) > 0)
            before = len(steps(run))
            command.until(lambda: len(steps(run)) >= before + 5)
            command.interrupt()
            outcome = command.finish()
    print(*(row["kind"] + ": " + row["message"] for row in rows(run / "events.jsonl")), sep="\n")
    assert outcome.code == 0, outcome.stderr
    assert len(lost()) == 1
    for row in steps(run):
        assert row["staleness/violations"] == row["ledger/lost"] == 0
    assert {row["end"] for row in rows(run / "ledger.jsonl")} == {"trained"}
