"""Runs as Ray jobs: submitted, listed, followed, ended."""

import logging
import re
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.control.access import Access, explained, knock
from rlsys.control.runs import taken
from rlsys.control.service import NAMESPACE
from rlsys.control.shipping import CONFIG, Shipment
from rlsys.errors import ClusterError

RUN, DIRECTORY = "rlsys.run", "rlsys.directory"
"""Keys in a job's metadata."""

END_S = 30.0
"""From the end of a job's output to the job's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One submission of a run."""

    submission_id: str
    run: str
    directory: str
    """Where its files go."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray says it."""
    message: str
    started_at: float
    """Seconds since the epoch."""

    @property
    def ended(self) -> bool:
        """Whether its status is the last one."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """A cluster's job server. Every method raises `ClusterError` when it cannot be reached or refuses us."""

    def __init__(self, access: Access) -> None:
        access.use()
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):  # they tell of every package and every closed connection
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        self._address = access.jobs
        with explained(self._address):
            knock(self._address)
            self._client: Any = JobSubmissionClient(self._address)

    def submit(self, shipment: Shipment, *, resume: bool = False) -> Job:
        """Start a run as a job, or go on with one.

        Raises `ClusterError` when one of its name goes on already, `ConfigError` for what cannot travel with it.
        """
        name = shipment.config.name
        self._require_free(name)
        submission_id = f"rlsys-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:40]}-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory(prefix="rlsys-submit-") as directory:
            shipment.pack(Path(directory))
            with explained(self._address):
                self._client.submit_job(
                    entrypoint=f"python -m rlsys.cli train {CONFIG}{' --resume' if resume else ''}",
                    submission_id=submission_id,
                    runtime_env={"working_dir": directory, "env_vars": {"PYTHONUNBUFFERED": "1"}},
                    metadata={RUN: name, DIRECTORY: str(shipment.config.path)},
                )
                return _job(self._client.get_job_info(submission_id))

    def _require_free(self, name: str) -> None:
        for job in self.all():
            if job.run == name and not job.ended:
                raise ClusterError(taken(name, f"as job {job.submission_id}"))
        if name in self.live_runs():
            raise ClusterError(taken(name, "there"))

    def all(self) -> list[Job]:
        """Every submission of a run that the cluster remembers, the newest first."""
        with explained(self._address):
            details = self._client.list_jobs()
        jobs = [_job(one) for one in details if (one.metadata or {}).get(RUN)]
        return sorted(jobs, key=lambda job: job.started_at, reverse=True)

    def find(self, name: str) -> Job | None:
        """The newest submission of a run, or the one with this submission id."""
        return next((job for job in self.all() if name in (job.run, job.submission_id)), None)

    def live_runs(self) -> list[str]:
        """Names of the runs whose controllers live, however they were started."""
        from ray.util.state import list_actors

        wanted = [("ray_namespace", "=", NAMESPACE), ("class_name", "=", "ControllerActor")]
        with explained(self._address):
            actors = list_actors(address=self._client.get_address(), filters=wanted, limit=1000)
        return sorted(actor.name for actor in actors if actor.name and actor.state != "DEAD")

    def logs(self, job: Job) -> str:
        """What a job has printed so far."""
        with explained(self._address):
            return str(self._client.get_job_logs(job.submission_id))

    async def follow(self, job: Job) -> AsyncGenerator[str, None]:
        """What a job prints, from its beginning to its end."""
        with explained(self._address):
            async for text in self._client.tail_job_logs(job.submission_id):
                yield text

    def outcome(self, job: Job) -> Job:
        """How a job ended whose output has ended."""
        deadline = time.monotonic() + END_S
        while True:
            with explained(self._address):
                now = _job(self._client.get_job_info(job.submission_id))
            if now.ended or time.monotonic() > deadline:
                return now
            time.sleep(0.2)

    def kill(self, job: Job) -> bool:
        """End a job at once, without a checkpoint. False: it had ended."""
        with explained(self._address):
            return bool(self._client.stop_job(job.submission_id))


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        submission_id=details.submission_id,
        run=metadata.get(RUN, ""),
        directory=metadata.get(DIRECTORY, ""),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        started_at=(details.start_time or 0) / 1000,
    )
