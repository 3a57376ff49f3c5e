"""A run whose workers change while it trains: scaled from another process to three and back, then one is killed."""

import json
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.running import (
    SMALL,
    Outcome,
    Running,
    python,
    responses,
    rows,
    running,
    steps,
    write_config,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BOUND = SMALL["staleness"]["max"]

ELSEWHERE = """
import json, sys, time
import ray
from rlsys.control.access import stay_on_loopback
from rlsys.control.remote import unwrap
from rlsys.control.service import NAMESPACE
from rlsys.errors import ConfigError

stay_on_loopback()
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
controller = ray.get_actor("run", namespace=NAMESPACE)

def status():
    return unwrap(controller.status.remote())

def until(condition):
    while not condition(status()):
        time.sleep(0.2)
    return status()

try:
    unwrap(controller.scale.remote(rollout=99))
except ConfigError as error:
    refused = str(error)
before = status()
unwrap(controller.scale.remote(rollout=3, reward=2))
up = until(lambda now: now.workers["rollout"].ready == 3 and now.workers["reward"].ready == 2)
until(lambda now: now.version >= up.version + 10)
unwrap(controller.scale.remote(rollout=1, reward=1))
down = until(lambda now: now.workers["rollout"].ready == 1 and now.version >= up.version + 20)
told = {name: {"version": s.version, "ready": s.workers["rollout"].ready, "serving": s.serving, "ledger": s.ledger}
        for name, s in {"before": before, "up": up, "down": down}.items()}
print(json.dumps({**told, "refused": refused}))
"""


@dataclass
class Story:
    """What became of the run, what the other process was told, and the newest version when a worker was killed."""

    outcome: Outcome
    run: Path
    told: dict[str, Any]
    killed_at: int

    @property
    def events(self) -> list[tuple[str, str]]:
        return [(row["kind"], row["message"]) for row in rows(self.run / "events.jsonl")]

    def said(self, kind: str) -> list[str]:
        return [message for found, message in self.events if found == kind]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("scaling")
    write_config(home, learner={"steps": 100_000}, checkpoint={"every": 0}, eval={"every": 0})
    token, run = secrets.token_hex(32), home / "runs" / "run"
    with running(home, "train", "run.yaml", "--json", RAY_AUTH_TOKEN=token) as command:
        command.until(lambda: newest(run) > 5)
        access = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
        elsewhere = python(home, "-c", ELSEWHERE, address_of(command), **access)
        assert elsewhere.code == 0, elsewhere.stderr
        command.until(lambda: told(run, "worker_left") >= 3)
        killed_at = newest(run)
        kill(command, "RolloutActor")
        command.until(lambda: told(run, "worker_joined") >= 4)
        last = newest(run)
        command.until(lambda: newest(run) >= last + 10)
        command.interrupt()
        outcome = command.finish()
    print(outcome.stdout, outcome.stderr)
    assert outcome.code == 0, outcome.stderr
    return Story(outcome, run, json.loads(elsewhere.stdout), killed_at)


def newest(run: Path) -> int:
    """The last learner step that was written down; only the end of the file is read, as this is asked all the time."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes()[-100_000:].splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[1:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def told(run: Path, kind: str) -> int:
    return sum(row["kind"] == kind for row in rows(run / "events.jsonl"))


def address_of(command: Running) -> str:
    """Where the run's own cluster listens."""
    (raylet,) = [p for p in command.alive() if p.name() == "raylet"]
    return next(a.removeprefix("--gcs-address=") for a in raylet.cmdline() if a.startswith("--gcs-address="))


def kill(command: Running, actor: str) -> None:
    """SIGKILL the one process of that actor."""
    (process,) = [p for p in psutil.Process(command.process.pid).children(recursive=True) if actor in named(p)]
    process.send_signal(signal.SIGKILL)


def named(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def pairs(story: Story, role: str = "rollout") -> list[tuple[float, float]]:
    """(desired, ready) by step, each as often as it changed."""
    shown = [(row[f"workers/{role}/desired"], row[f"workers/{role}/ready"]) for row in steps(story.run)]
    return [pair for before, pair in zip([None, *shown], shown, strict=False) if pair != before]


def test_the_run_grows_and_shrinks_as_another_process_asks_and_its_metrics_show_it(story: Story) -> None:
    assert (story.told["before"]["ready"], story.told["up"]["ready"], story.told["down"]["ready"]) == (1, 3, 1)
    assert "99" in story.told["refused"]
    assert "from 1 to 8" in story.told["refused"]
    assert story.said("scaled") == [
        "rollout workers 1 → 3: asked for",
        "reward workers 1 → 2: asked for",
        "rollout workers 3 → 1: asked for",
        "reward workers 2 → 1: asked for",
    ]
    shown = pairs(story)
    assert shown[:2] == [(1, 1), (3, 1)]
    assert shown.index((3, 3)) < shown.index((1, 1), 1)
    assert shown[-1:] == [(1, 1)]
    assert (2, 2) in pairs(story, "reward")


def test_the_learner_went_on_while_workers_joined(story: Story) -> None:
    waited = [
        row for row in steps(story.run) if (row["workers/rollout/desired"], row["workers/rollout/ready"]) == (3, 1)
    ]
    assert len(waited) > 5
    assert [row["step"] for row in steps(story.run)] == list(range(1, len(steps(story.run)) + 1))


def test_nothing_is_lost_and_the_bound_holds(story: Story) -> None:
    for row in steps(story.run):
        assert row["ledger/lost"] == row["staleness/violations"] == 0
        assert row["staleness/max"] <= BOUND
    closed = rows(story.run / "ledger.jsonl")
    assert {row["end"] for row in closed} == {"trained"}
    assert [row["slot"] for row in closed] == list(range(len(closed)))


def test_a_joined_worker_samples_only_with_versions_it_was_brought_to(story: Story) -> None:
    events = json.loads((story.run / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    recorded = responses(story.run)
    for worker in ("rollout-1", "rollout-2", "rollout-3"):
        served = {e["args"]["version"] for e in events if e["name"] == "pause" and names[e["pid"]] == worker}
        sampled = {version for r in recorded if r["worker"] == worker for version in r["versions"]}
        assert sampled, f"{worker} did nothing"
        assert sampled <= served
        assert min(served) > 0, "it was brought to an old version"
    joins = {e["args"]["worker"] for e in events if e["name"] == "join" and names[e["pid"]] == "controller"}
    assert joins >= {"rollout-1", "rollout-2", "rollout-3", "reward-1"}


def test_a_killed_worker_is_replaced_and_rejoins_at_the_current_version(story: Story) -> None:
    (lost,) = story.said("worker_lost")
    assert lost.startswith("rollout-0: ")
    joined = story.said("worker_joined")[-1]
    assert joined.startswith("rollout-3: serves version ")
    assert int(joined.split()[3].rstrip(",")) >= story.killed_at
    assert steps(story.run)[-1]["workers/rollout/restarts"] == 1


def test_only_the_result_is_on_stdout(story: Story) -> None:
    assert json.loads(story.outcome.stdout)["ledger"]["lost"] == 0


def test_nothing_is_left_of_anybody(story: Story) -> None:
    assert story.outcome.left == []
    assert any("RolloutActor" in name for name in story.outcome.seen), "the watcher saw no worker"
