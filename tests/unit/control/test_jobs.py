"""Runs as jobs, on a made-up job server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsys.control.access import Access
from rlsys.control.jobs import DIRECTORY, RUN, Jobs
from rlsys.control.shipping import CONFIG, Shipment
from rlsys.errors import ClusterError, ConfigError
from tests.fakes import make_config

SERVER = Access(jobs="auto", ray="auto")


class AuthenticationError(Exception):
    """Ray's, by its name."""


class FakeServer:
    """Remembers what was submitted, newest last; `refusing` it answers nobody."""

    def __init__(self) -> None:
        self.jobs: list[SimpleNamespace] = []
        self.packed: list[set[str]] = []
        self.live: list[SimpleNamespace] = []
        self.refusing = False

    def __call__(self, address: str) -> "FakeServer":
        if self.refusing:
            raise AuthenticationError("Forbidden")
        return self

    def add(self, submission_id: str | None, status: str, metadata: dict[str, str] | None, message: str = "") -> None:
        self.jobs.append(
            SimpleNamespace(
                submission_id=submission_id,
                status=SimpleNamespace(value=status),
                metadata=metadata,
                message=message,
                start_time=1000 * (len(self.jobs) + 1),
            )
        )

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str], **_: str) -> str:
        root = Path(runtime_env["working_dir"])
        self.packed.append({str(path.relative_to(root)) for path in root.rglob("*")})
        self.environment, self.entrypoint = runtime_env, _["entrypoint"]
        self.add(submission_id, "PENDING", metadata)
        return submission_id

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return next(job for job in self.jobs if job.submission_id == submission_id)

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def get_address(self) -> str:
        return "http://head:8265"

    def get_job_logs(self, submission_id: str) -> str:
        return f"output of {submission_id}"

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        yield "one "
        yield "two"
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def stop_job(self, submission_id: str) -> bool:
        self.get_job_info(submission_id).status = SimpleNamespace(value="STOPPED")
        return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", fake)
    monkeypatch.setattr("ray.util.state.list_actors", lambda **_: fake.live)
    return fake


@pytest.fixture
def shipment(tmp_path: Path) -> Shipment:
    (tmp_path / "mine.py").write_text("")
    return Shipment(config=make_config(tmp_path), files={Path("mine.py"): tmp_path / "mine.py"}, remarks=())


def test_a_run_is_submitted_with_its_files_and_without_an_environment(server: FakeServer, shipment: Shipment) -> None:
    job = Jobs(SERVER).submit(shipment)
    assert server.packed == [{"mine.py", CONFIG}]
    assert set(server.environment) == {"working_dir", "env_vars"}
    assert server.entrypoint == f"python -m rlsys.cli train {CONFIG}"
    assert (job.run, job.directory, job.status) == (shipment.config.name, str(shipment.config.path), "PENDING")
    assert job.submission_id.startswith(f"rlsys-{job.run}-")
    assert not Path(server.environment["working_dir"]).exists()


def test_what_cannot_travel_is_not_blamed_on_the_cluster(server: FakeServer, shipment: Shipment) -> None:
    shipment.files[Path("mine.py")].unlink()
    with pytest.raises(ConfigError, match=r"^cannot pack .*mine.py"):
        Jobs(SERVER).submit(shipment)
    assert server.jobs == []


def test_a_run_can_be_gone_on_with(server: FakeServer, shipment: Shipment) -> None:
    Jobs(SERVER).submit(shipment, resume=True)
    assert server.entrypoint.endswith(" --resume")


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_name_is_taken_while_a_job_of_it_goes_on(server: FakeServer, shipment: Shipment, status: str) -> None:
    server.add("rlsys-one", status, {RUN: shipment.config.name})
    with pytest.raises(ClusterError, match=r"a run of this name is going on as job rlsys-one"):
        Jobs(SERVER).submit(shipment)
    assert server.packed == []


def test_a_name_is_taken_while_a_run_of_it_lives_that_nobody_submitted(server: FakeServer, shipment: Shipment) -> None:
    server.live = [SimpleNamespace(name=shipment.config.name, state="ALIVE")]
    with pytest.raises(ClusterError, match=r"a run of this name is going on there"):
        Jobs(SERVER).submit(shipment)


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_name_is_free_again_when_its_job_has_ended(server: FakeServer, shipment: Shipment, status: str) -> None:
    server.add("rlsys-one", status, {RUN: shipment.config.name})
    server.live = [SimpleNamespace(name=shipment.config.name, state="DEAD")]
    Jobs(SERVER).submit(shipment)


def test_others_jobs_are_not_ours_and_the_newest_of_a_name_is_meant(server: FakeServer) -> None:
    server.add(None, "RUNNING", None)
    server.add("raysubmit_x", "RUNNING", {})
    server.add("rlsys-a-1", "FAILED", {RUN: "a", DIRECTORY: "/runs/a"}, "it broke")
    server.add("rlsys-a-2", "RUNNING", {RUN: "a"})
    jobs = Jobs(SERVER)
    assert [job.submission_id for job in jobs.all()] == ["rlsys-a-2", "rlsys-a-1"]
    newest, first = jobs.find("a"), jobs.find("rlsys-a-1")
    assert newest is not None
    assert first is not None
    assert (newest.submission_id, newest.ended) == ("rlsys-a-2", False)
    assert (first.message, first.directory, first.started_at, first.ended) == ("it broke", "/runs/a", 3.0, True)
    assert jobs.find("b") is None


def test_a_job_can_be_read_followed_and_killed(server: FakeServer) -> None:
    server.add("rlsys-a-1", "RUNNING", {RUN: "a"})
    jobs = Jobs(SERVER)
    (job,) = jobs.all()
    assert jobs.logs(job) == "output of rlsys-a-1"
    seen: list[str] = []

    async def follow() -> None:
        async for text in jobs.follow(job):
            seen.append(text)

    with pytest.raises(ClusterError, match="closed unexpectedly"):
        asyncio.run(follow())
    assert seen == ["one ", "two"]
    assert jobs.kill(job)
    assert jobs.outcome(job).status == "STOPPED"


def test_a_server_that_refuses_us_is_explained(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refusing = True
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ClusterError, match=r"auto refused us: the token in RAY_AUTH_TOKEN is not this cluster's"):
        Jobs(SERVER)
