"""Ray's own autoscaler follows a run's demand: a rollout worker without a place brings a node, one let go frees it.

The autoscaler is the real one; its nodes are raylets on this machine (Ray's fake node provider).
"""

import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.running import module, python, rows, running, steps, write_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

NODE = {"CPU": 1, "rollout": 1, "object_store_memory": 100 << 20}

FOLLOW = """
import json, sys, time
import ray
from rlsys.control.remote import unwrap
from rlsys.control.service import NAMESPACE

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
controller = ray.get_actor("run", namespace=NAMESPACE)

def nodes():
    return sum(node["Alive"] and "rollout" in node["Resources"] for node in ray.nodes())

def until(condition):
    start = time.time()
    while not condition(unwrap(controller.status.remote())):
        time.sleep(0.5)
    return {"nodes": nodes(), "seconds": time.time() - start}

told = {"first": until(lambda now: now.version > 2)}
unwrap(controller.scale.remote(rollout=2))
told["up"] = until(lambda now: now.workers["rollout"].ready == 2)
until(lambda now: now.metrics["workers/rollout/ready"] == 2)  # a step was written down with both
unwrap(controller.scale.remote(rollout=1))
told["left"] = until(lambda now: now.workers["rollout"].ready == 1)
told["down"] = until(lambda now: nodes() == 1)
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Story:
    run: Path
    told: dict[str, Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home, scratch = tmp_path_factory.mktemp("autoscaler"), Path(tempfile.mkdtemp(prefix="rlsys-"))
    address, client = f"{own_address()}:{free_port()}", free_port()
    write_config(
        home,
        rollout={"workers": 1},
        learner={"steps": 100_000},
        checkpoint={"every": 0},
        eval={"every": 0},
        resources={"address": address, "roles": True},
    )
    (home / "autoscaler.yaml").write_text(yaml.safe_dump(autoscaler(address)))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_worker_niceness": "0"}
    head = [
        *("ray.scripts.scripts", "start", "--head", "--block", f"--port={address.split(':')[1]}"),
        *(f"--autoscaling-config={home / 'autoscaler.yaml'}", f"--temp-dir={scratch}", "--num-cpus=2"),
        *('--resources={"learner": 1, "reward": 2}', f"--object-store-memory={1 << 28}", "--disable-usage-stats"),
        *(f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0", "--include-dashboard=false"),
    ]
    try:
        with module(home, *head, **token, **fake) as cluster:
            cluster.until(lambda: listens(address))
            with running(home, "train", "run.yaml", "--json", **token) as command:
                command.until(lambda: len(steps(home / "runs" / "run")) > 0)
                follow = python(home, "-c", FOLLOW, address, **token)
                assert follow.code == 0, follow.stderr
                command.interrupt()
                outcome = command.finish()
                assert outcome.code == 0, outcome.stderr
            yield Story(home / "runs" / "run", json.loads(follow.stdout))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def autoscaler(address: str) -> dict[str, Any]:
    """A head without room for rollout workers, and nodes with room for one each."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "rlsys-test",
        "max_workers": 3,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        # What a file for real machines would say; the monitor reads it all.
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "rollout": {"resources": NODE, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
    }


def own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def listens(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_a_run_brings_its_first_node_itself(story: Story) -> None:
    assert story.told["first"]["nodes"] == 1


def test_scaling_up_brings_a_node_and_scaling_down_releases_it(story: Story) -> None:
    assert (story.told["up"]["nodes"], story.told["down"]["nodes"]) == (2, 1)
    kinds = [row["kind"] for row in rows(story.run / "events.jsonl")]
    assert kinds.count("worker_joined") == kinds.count("worker_left") == 1
    assert "worker_lost" not in kinds


def test_the_run_trained_on_meanwhile_and_lost_nothing(story: Story) -> None:
    shown = {(row["workers/rollout/desired"], row["workers/rollout/ready"]) for row in steps(story.run)}
    assert {(1, 1), (2, 1), (2, 2)} <= shown
    for row in steps(story.run):
        assert row["ledger/lost"] == row["staleness/violations"] == 0
    assert {row["end"] for row in rows(story.run / "ledger.jsonl")} == {"trained"}
