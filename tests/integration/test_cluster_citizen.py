"""A cluster of `rlsys up`, and everything a user does with it from the command line: one head, one run."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsys.control.access import ALONE
from rlsys.control.local_cluster import Born, LocalCluster
from tests.integration.running import PATIENCE_S, environment, running, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MINE = """
import rlsys
from helper import WORTH

with open({seen!r}, "a") as file:
    file.write(f"{{__file__}} {{rlsys.__file__}}\\n")


def score(prompt, response):
    return WORTH if response.finished and response.text == prompt.answer else 0.0
"""


@dataclass(frozen=True)
class Citizen:
    """A user in a working directory, with a state directory of their own."""

    home: Path
    state: Path

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`rlsys ARGUMENTS` to its end. Not by `running`, which ends a command's children with it."""
        return subprocess.run(
            [sys.executable, "-m", "rlsys.cli", *arguments],
            cwd=self.home,
            env={**environment(), "XDG_STATE_HOME": str(self.state), **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def told(self, *arguments: str) -> Any:
        """What a command that succeeds says as JSON."""
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str, **variables: str) -> str:
        """What a command that fails says, in one line."""
        done = self(*arguments, **variables)
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("citizen")
    (path / "mine.py").write_text(MINE.format(seen=str(path / "seen")))
    (path / "helper.py").write_text("WORTH = 0.5\n")
    write_config(
        path,
        name="run",
        reward={"function": "mine:score"},
        learner={"steps": 5000},
        eval={"every": 0, "max_prompts": 8},
        records={"rollouts_every": 0},
    )
    return path


@pytest.fixture(scope="module")
def rlsys(home: Path) -> Citizen:
    return Citizen(home, home / "state")


@pytest.fixture(scope="module")
def stranger(home: Path) -> Citizen:
    """Somebody on the same machine without the token."""
    return Citizen(home, home / "elsewhere")


@pytest.fixture(scope="module")
def cluster(rlsys: Citizen) -> Iterator[LocalCluster]:
    assert rlsys.told("up", "--cpus", "4")["started"]
    cluster = LocalCluster.load((rlsys.state / "rlsys" / "state.json").read_text())
    yield cluster
    rlsys("down", "--force")


@pytest.fixture(scope="module")
def job(rlsys: Citizen, cluster: LocalCluster, home: Path) -> dict[str, Any]:
    """The run, submitted and followed by somebody who then presses Ctrl-C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(rlsys.state))
        with running(home, "submit", "run.yaml", "--follow") as command:
            command.until(lambda: "training  step" in command.stdout)
            command.interrupt()
            outcome = command.finish()
    assert outcome.code == 130
    assert "run goes on" in outcome.stderr
    assert "rlsys stop run" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    (run,) = rlsys.told("status")
    return run["job"]


def test_everything_of_the_cluster_listens_on_loopback(cluster: LocalCluster) -> None:
    heads = [process for process in (born.find() for born in cluster.processes) if process is not None]
    listening = [
        connection.laddr
        for process in heads
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    ports = {address.port for address in listening}
    assert {int(url.rpartition(":")[2]) for url in (cluster.address, cluster.jobs)} <= ports
    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_only_the_owner_may_read_the_token(cluster: LocalCluster) -> None:
    assert cluster.token.stat().st_mode & 0o777 == 0o600
    assert cluster.token.parent.stat().st_mode & 0o777 == 0o700


def test_a_second_up_finds_the_first(rlsys: Citizen, cluster: LocalCluster) -> None:
    told = rlsys.told("up")
    assert not told["started"]
    assert told["address"] == cluster.address


@pytest.mark.parametrize("door", ["jobs", "address"])
def test_who_has_no_token_is_refused_and_told_so(stranger: Citizen, cluster: LocalCluster, door: str) -> None:
    said = stranger.refused("submit", "run.yaml", f"run_dir={stranger.home}/runs", "--address", getattr(cluster, door))
    assert "refused us: it asks for a token, and none was sent" in said
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in said


@pytest.mark.parametrize("door", ["jobs", "address"])
def test_a_wrong_token_is_explained(stranger: Citizen, cluster: LocalCluster, door: str) -> None:
    said = stranger.refused(
        *("submit", "run.yaml", f"run_dir={stranger.home}/runs", "--address", getattr(cluster, door)),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="0" * 64,
    )
    assert "refused us: the token in RAY_AUTH_TOKEN is not this cluster's" in said


def test_a_run_with_a_wrong_token_does_not_join(stranger: Citizen, cluster: LocalCluster) -> None:
    done = stranger(
        "train", "run.yaml", f"resources.address={cluster.address}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64
    )
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"resources.address={cluster.address}: cannot join the Ray cluster" in said
    assert "the token in RAY_AUTH_TOKEN is not this cluster's" in said
    assert "Traceback" not in said
    assert not (stranger.home / "runs").exists()


def test_who_was_given_the_token_is_let_in(stranger: Citizen, cluster: LocalCluster) -> None:
    given = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    done = stranger("status", "--json", **given, **{ALONE: "0"})
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout), done.stderr) == ([], "")


def test_a_port_where_nothing_listens_is_said(rlsys: Citizen, cluster: LocalCluster) -> None:
    said = rlsys.refused("submit", "run.yaml", f"run_dir={rlsys.home}/runs", "--address", "http://127.0.0.1:9")
    assert "nothing answers at http://127.0.0.1:9" in said


def test_nobody_who_was_refused_left_a_job(rlsys: Citizen, cluster: LocalCluster) -> None:
    assert rlsys.told("status") == []


def test_ctrl_c_while_following_leaves_the_run_going_on(rlsys: Citizen, job: dict[str, Any]) -> None:
    assert job["status"] == "RUNNING"
    assert job["directory"] == str(rlsys.home / "runs" / "run")
    status = rlsys.told("status", "run")["status"]
    assert status["phase"] == "training"
    assert status["version"] >= 0
    assert status["serving"].keys() == {"rollout-0"}


def test_status_shows_the_run_to_people(rlsys: Citizen, job: dict[str, Any]) -> None:
    listed, one = rlsys("status").stdout, rlsys("status", "run").stdout
    for word in ("run", "training", "/5000", "RUNNING"):
        assert word in listed
    for word in (job["submission_id"], "staleness", "bound 3", "ESS token", "serving rollout-0"):
        assert word in one


def test_logs_hold_what_the_run_prints(rlsys: Citizen, job: dict[str, Any]) -> None:
    assert "training  step" in rlsys("logs", "run").stdout
    assert "training  step" in rlsys.told("logs", job["submission_id"])["logs"]


def test_the_shipped_code_runs_and_not_what_is_installed(home: Path, job: dict[str, Any]) -> None:
    used = [line.split() for line in (home / "seen").read_text().splitlines()]
    there = [both for both in used if "runtime_resources" in both[0]]
    assert there, "the reward was never imported on the cluster"
    assert all("runtime_resources" in ours for _, ours in there)
    assert all(str(home) in mine for mine, _ in used if (mine, _) not in map(tuple, there))


def test_a_name_that_a_run_has_is_refused(rlsys: Citizen, cluster: LocalCluster, job: dict[str, Any]) -> None:
    again = rlsys.refused("submit", "run.yaml")
    assert f"name=run: a run of this name is going on as job {job['submission_id']}" in again
    joined = rlsys.refused("train", "run.yaml", f"run_dir={rlsys.home}/other", f"resources.address={cluster.address}")
    assert "name=run: a run of this name is going on in this cluster" in joined
    assert not (rlsys.home / "other").exists()


def test_a_run_that_is_not_there_is_answered_with_the_nearest_name(rlsys: Citizen, job: dict[str, Any]) -> None:
    for command in ("status", "logs", "stop"):
        assert "no run 'rum' here; did you mean 'run'?" in rlsys.refused(command, "rum")


def test_a_run_is_scaled_while_it_trains(rlsys: Citizen, job: dict[str, Any]) -> None:
    before = rlsys.told("status", "run")["status"]
    assert (before["workers"]["rollout"]["desired"], before["workers"]["rollout"]["ready"]) == (1, 1)
    assert rlsys.told("scale", "run", "--rollout", "2", "--wait")["workers"]["rollout"]["ready"] == 2
    after = rlsys.told("status", "run")["status"]
    assert set(after["serving"]) == {"rollout-0", "rollout-1"}
    assert after["version"] > before["version"], "the learner did not wait for the new worker"
    assert after["metrics"]["staleness/max"] <= 3
    assert "rollout 2/2" in rlsys("status").stdout
    assert "rollout workers: 0: must be a whole number from 1 to 8" in rlsys.refused("scale", "run", "--rollout", "0")


def test_a_cluster_on_which_a_run_trains_is_not_ended_by_the_way(rlsys: Citizen, job: dict[str, Any]) -> None:
    said = rlsys.refused("down")
    assert "down: run 'run' is training (step " in said
    assert " of 5000); `rlsys stop run` ends it with a checkpoint, `rlsys down --force` at once" in said
    assert rlsys.told("status", "run")["status"]["phase"] == "training"


def test_a_stopped_run_finishes_its_step_and_writes_a_checkpoint(rlsys: Citizen, job: dict[str, Any]) -> None:
    assert rlsys("stop", "run").returncode == 0
    followed = rlsys("logs", "run", "--follow")
    assert followed.returncode == 0, followed.stderr
    assert followed.stderr == ""
    (run,) = rlsys.told("status")
    assert run["job"]["status"] == "SUCCEEDED"
    assert run["status"] is None, "its controller has ended with it"
    trained = steps(rlsys.home / "runs" / "run")[-1]["step"]
    assert f"after {trained} learner steps" in followed.stdout
    checkpoint = rlsys.home / "runs" / "run" / "checkpoints" / f"step-{trained:06d}"
    assert (checkpoint / "model.safetensors").is_file()
    assert f"run 'run' has ended: job {job['submission_id']} is SUCCEEDED" in rlsys.refused("stop", "run")


def test_a_job_that_fails_fails_the_command_that_follows_it(rlsys: Citizen, job: dict[str, Any]) -> None:
    done = rlsys("submit", "run.yaml", "--follow")
    assert done.returncode == 1
    assert "already holds a run; continue it with --resume" in " ".join(done.stdout.split())
    assert "run: FAILED" in done.stderr


def test_a_run_is_ended_at_once_when_it_must_be(rlsys: Citizen, cluster: LocalCluster) -> None:
    submitted = rlsys.told("submit", "run.yaml", "name=other")
    assert rlsys.told("stop", "other", "--now")["submission_id"] == submitted["submission_id"]
    followed = rlsys("logs", "other", "--follow")
    assert followed.returncode == 0
    assert followed.stderr == "other: STOPPED. Job was intentionally stopped.\n"
    (other,) = (run for run in rlsys.told("status") if run["run"] == "other")
    assert other["job"]["status"] == "STOPPED"


def test_train_finds_the_cluster_and_its_token_by_the_address(
    rlsys: Citizen, cluster: LocalCluster, job: dict[str, Any]
) -> None:
    before = steps(rlsys.home / "runs" / "run")[-1]["step"]
    told = rlsys.told(
        "train", "run.yaml", "--resume", f"learner.steps={before + 2}", f"resources.address={cluster.address}"
    )
    assert told["version"] == before + 2


def test_down_leaves_no_process_no_port_and_no_file(rlsys: Citizen, cluster: LocalCluster, job: dict[str, Any]) -> None:
    head = cluster.processes[0].find()
    assert head is not None
    family = [head, *head.children(recursive=True)]
    assert any("raylet" in process.name() for process in family)
    born = [Born.of(process) for process in family]
    assert rlsys.told("down")["address"] == cluster.address
    assert not any(one.find() for one in born)
    for url in (cluster.address, cluster.jobs):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5).close()
            pytest.fail(f"{url} still listens")
    assert not cluster.scratch.exists()
    assert not cluster.token.exists()
    assert rlsys.told("down")["address"] is None
    assert "no cluster is named" in rlsys.refused("status")
