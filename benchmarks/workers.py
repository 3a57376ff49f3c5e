"""Workers that serve one run of the control loop after the other: starting them takes longer than a short run."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig


class Workers:
    """A Ray cluster with the actors of one model and task. Each run gets a learner, a weight-sync service and a ledger
    of its own; the others know neither objectives nor staleness."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._scratch = Path(tempfile.mkdtemp())

    def __enter__(self) -> "Workers":
        from rlsys.actors.process import settle
        from rlsys.control import remote
        from rlsys.control.build import start_actors
        from rlsys.control.cluster import cluster
        from rlsys.control.lifecycle import initial_model
        from rlsys.control.preflight import load_prompts

        config = self._config
        self._path = initial_model(config)
        self._prompts = load_prompts(config, self._path)
        self._cluster = cluster(config)
        self._cluster.__enter__()
        settle("other", config)  # this process runs the loop, as the controller would
        self._fleet = start_actors(config, self._path, None, 0)
        asyncio.run(remote.all_ready([w.stats.remote() for w in self._fleet.rollouts.values()]))
        return self

    def __exit__(self, *failure: Any) -> None:
        self._cluster.__exit__(*failure)
        shutil.rmtree(self._scratch)

    def train(self, config: RunConfig) -> list[dict[str, Any]]:
        """One run from the initial model on; the rows of its metrics.jsonl. The probe is left out where it is off."""
        from rlsys.control.build import connect
        from rlsys.control.loop import TrainingLoop
        from rlsys.observability.run_directory import RunDirectory
        from rlsys.observability.sinks import RunJournal
        from rlsys.scheduling.ledger import Ledger

        config = config.model_copy(update={"run_dir": self._scratch})
        directory = RunDirectory(config.path)
        directory.create("")
        asyncio.run(self._fresh_learner(config))
        journal = RunJournal(directory, config)
        parts = connect(self._fleet, self._prompts.source, journal)
        if not config.probe.fraction:
            parts.probe = None

        async def run() -> None:
            ledger = Ledger(capacity=config.slots, window=config.staleness.window)
            await TrainingLoop(config, parts, ledger=ledger, eval_prompts=self._prompts.held_out).run()

        asyncio.run(run())
        journal.close()
        rows = list(directory.rows())
        shutil.rmtree(directory.root)
        return rows

    async def _fresh_learner(self, config: RunConfig) -> None:
        """Another learner with the initial weights, and a weight-sync service that has published nothing yet."""
        import ray

        from rlsys.actors.learner import LearnerActor
        from rlsys.actors.weight_sync import WeightSyncActor
        from rlsys.control import remote
        from rlsys.control.learner import RemoteLearner

        for former in (*self._fleet.learner, self._fleet.weights):
            ray.kill(former)
        learner = LearnerActor.options(num_cpus=1).remote(self._path, config, None)  # type: ignore[attr-defined]
        self._fleet.learner = [learner]
        self._fleet.weights = WeightSyncActor.options(num_cpus=0).remote(config, learner)  # type: ignore[attr-defined]
        await RemoteLearner(self._fleet.learner).load()
        for worker, handle in self._fleet.rollouts.items():
            await remote.call(self._fleet.weights.add.remote(worker, handle))
