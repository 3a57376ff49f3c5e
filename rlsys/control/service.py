"""The controller: a named Ray actor that runs the loop and answers `status`, `scale` and `stop` from any process."""

from dataclasses import dataclass, field
from pathlib import Path

import ray

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.control.reconcile import require_counts
from rlsys.errors import ClusterError
from rlsys.scheduling.crew import WorkerCounts
from rlsys.versions import PolicyVersion

NAMESPACE = "rlsys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run at one moment."""

    phase: str
    version: PolicyVersion = 0
    published_version: PolicyVersion = -1
    metrics: dict[str, float | None] = field(default_factory=dict)
    ledger: dict[str, int] = field(default_factory=dict)
    serving: dict[str, PolicyVersion] = field(default_factory=dict)
    accuracy: dict[PolicyVersion, float] = field(default_factory=dict)
    workers: dict[str, WorkerCounts] = field(default_factory=dict)


@ray.remote
class ControllerActor:
    """Owns the run's other actors: when it ends, they end."""

    def __init__(self, config: RunConfig, path: str, resume: Path | None) -> None:
        settle("other", config)
        from rlsys.control.loop import TrainingLoop

        self._config, self._path, self._resume = config, path, resume
        self._phase = "starting"
        self._loop: TrainingLoop | None = None
        self._stopping = False
        self._asked: dict[str, int | None] = {}

    async def run(self) -> Status:
        """Build, train, write the last checkpoint. Raises what stopped the run."""
        from rlsys.control.build import build

        self._loop, _, journal = await build(self._config, self._path, self._resume)
        try:
            self._loop.workers.scale("asked for", **self._asked)
            if self._config.observability.prometheus:
                journal.event("metrics_endpoint", metrics_endpoint())
            if self._stopping:  # it was asked to before there was anything to stop
                self._loop.stop()
            else:
                self._phase = "training"
            await self._loop.run()
            self._phase = "saving"
            await self._loop.checkpoint()
            self._phase = "finished"
        finally:
            journal.close()
        return await self.status()

    async def status(self) -> Status:
        """Where the run stands."""
        if self._loop is None:
            return Status(phase=self._phase)
        progress = self._loop.progress
        return Status(
            phase=self._phase,
            version=progress.version,
            published_version=progress.published_version,
            metrics=dict(progress.metrics),
            ledger={str(name): count for name, count in self._loop.ledger.counts().items()},
            serving={name: ack.version for name, ack in progress.acks.items()},
            accuracy={version: result.accuracy for version, result in progress.evaluations.items()},
            workers=progress.workers,
        )

    async def configuration(self) -> RunConfig:
        """What the run was started with."""
        return self._config

    async def scale(self, rollout: int | None = None, reward: int | None = None) -> None:
        """There should be so many workers; None: as many as before. Returns at once, `status` shows them come and go.

        Raises ConfigError for a number that is not allowed, ClusterError when the run does not train any more.
        """
        asked = {"rollout": rollout, "reward": reward}
        require_counts(self._config, asked)
        if self._phase not in ("starting", "training"):
            raise ClusterError(f"run {self._config.name} is {self._phase}: its workers cannot be changed any more")
        if self._loop is not None:
            self._loop.workers.scale("asked for", **asked)
        else:
            self._asked |= {role: count for role, count in asked.items() if count is not None}

    async def stop(self) -> None:
        """Finish the step that is running, write a checkpoint, and let `run` return."""
        self._phase, self._stopping = "stopping", True
        if self._loop is not None:
            self._loop.stop()


def metrics_endpoint() -> str:
    """Where this node's metrics can be scraped, this process's gauges among them."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
