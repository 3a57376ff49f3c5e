"""A cluster of `rlsys up`: its state, its processes, and that nobody else's are touched. The head is made up."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlsys.control import local_cluster
from rlsys.control.local_cluster import Born, LocalCluster, down, find_local, up
from rlsys.errors import ClusterError, ConfigError

HEAD_COMMAND = local_cluster.head_command
"""The real one."""

HEAD = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)


class Nodes(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == f"Bearer {token}"
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"summary": [{"raylet": {"state": "ALIVE"}}]}}).encode())

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[1])), Nodes).serve_forever()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of this test's own, and a head that starts a child which outlives it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(
        local_cluster, "head_command", lambda *, job_port, **_: [sys.executable, "-c", HEAD, str(job_port)]
    )
    yield tmp_path / "rlsys"
    down()


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process of somebody else."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def test_a_cluster_is_up_until_it_is_down(home: Path) -> None:
    assert find_local() is None
    cluster, started = up(cpus=1)
    assert started
    assert find_local() == cluster
    assert up() == (cluster, False)
    assert down() == cluster
    assert find_local() is None
    assert down() is None


def test_down_ends_the_head_and_its_children_and_nothing_else(home: Path, bystander: psutil.Process) -> None:
    cluster, _ = up(cpus=1)
    assert len([born for born in cluster.processes if born.find()]) == 2, "unseen children would prove nothing"
    down()
    assert not any(born.find() for born in cluster.processes)
    assert bystander.is_running()
    assert not cluster.scratch.exists()
    assert sorted(path.name for path in home.iterdir()) == ["lock", "up.log"]


def test_children_of_a_head_that_was_killed_are_still_found(home: Path) -> None:
    cluster, _ = up(cpus=1)
    head, child = cluster.processes
    os.kill(head.pid, signal.SIGKILL)
    while head.find():
        time.sleep(0.01)
    assert find_local() is None
    assert child.find()
    again, started = up(cpus=1)
    assert started
    assert again.processes[0] != cluster.processes[0]
    assert not child.find()
    assert not cluster.scratch.exists()


def test_a_process_that_has_inherited_the_id_is_not_the_cluster(home: Path, bystander: psutil.Process) -> None:
    cluster, _ = up(cpus=1)
    born = Born.of(bystander)
    assert born.find() == bystander
    others = (replace(born, ticks=born.ticks - 1), replace(born, boot="another start of this machine"))
    (home / "state.json").write_text(replace(cluster, processes=(*cluster.processes, *others)).dump())
    down()
    assert bystander.is_running()


def test_a_process_is_the_same_whatever_the_clock_says(
    bystander: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    born = Born.of(bystander)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 0.0)
    assert born.find() is not None


def test_a_process_may_be_named_as_the_table_of_processes_is_written(tmp_path: Path) -> None:
    name = tmp_path / "a) R 1 (b"
    name.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(name), "600"])
    try:
        ticks_to_now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert 0 < Born.of(psutil.Process(process.pid)).ticks <= ticks_to_now
    finally:
        process.kill()
        process.wait()


def test_the_state_survives_writing_and_reading() -> None:
    cluster = LocalCluster(
        address="127.0.0.1:1",
        jobs="http://127.0.0.1:2",
        token=Path("/a"),
        scratch=Path("/b"),
        processes=(Born(pid=3, ticks=4, boot="x"), Born(pid=6, ticks=7, boot="x")),
    )
    assert LocalCluster.load(cluster.dump()) == cluster


def test_a_state_that_cannot_be_read_is_named(home: Path) -> None:
    home.mkdir()
    (home / "state.json").write_text('{"address": 1}')
    with pytest.raises(ClusterError, match=r"state.json is not what `rlsys up` writes"):
        find_local()
    (home / "state.json").unlink()


def test_the_token_is_for_its_owner_alone_and_new_each_time(home: Path) -> None:
    cluster, _ = up(cpus=1)
    assert cluster.token.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    first = cluster.token.read_text()
    assert len(first) >= 32
    down()
    assert not cluster.token.exists()
    assert up(cpus=1)[0].token.read_text() != first


def test_a_head_that_does_not_come_up_is_explained_by_its_log_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no shared memory')"]
    monkeypatch.setattr(local_cluster, "head_command", lambda **_: broken)
    with pytest.raises(ClusterError, match=r"(?s)it ended\. The end of its log:.*no shared memory"):
        up(cpus=1)
    assert sorted(path.name for path in home.iterdir()) == ["lock", "up.log"]


@pytest.mark.parametrize("option", ["port", "job_port"])
def test_a_port_of_somebody_else_is_refused_before_anything_starts(home: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        given = {option: taken}
        with pytest.raises(ConfigError, match=rf"--{option.replace('_', '-')}={taken}: in use; choose another, or 0"):
            up(cpus=1, **given)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody knocked, so nobody brought a token
            server.accept()
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_the_head_takes_no_port_that_another_cluster_expects(tmp_path: Path) -> None:
    command = HEAD_COMMAND(cpus=3, port=7001, job_port=7002, object_store_gib=0.5, scratch=tmp_path)
    for part in ("--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=3"):
        assert part in command
    ports = dict(part.removeprefix("--").split("=") for part in command if "port=" in part)
    assert ports.pop("port") == "7001"
    assert ports.pop("dashboard-port") == "7002"
    assert int(ports.pop("ray-client-server-port")) not in (10001, 7001, 7002)
    assert set(ports.values()) == {"0"}


def test_the_head_inherits_no_other_clusters_address_or_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    cluster, _ = up(cpus=1)
    head = cluster.processes[0].find()
    assert head is not None
    given = head.environ()
    assert "RAY_ADDRESS" not in given
    assert "RAY_AUTH_TOKEN" not in given
    assert given["RAY_AUTH_MODE"] == "token"
    assert given["RAY_AUTH_TOKEN_PATH"] == str(cluster.token)
    assert given["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
