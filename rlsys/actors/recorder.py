"""The recorder actor: writes every token of a batch to parquet, off everyone's path."""

from pathlib import Path

import ray

from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.records import BatchArrays, GroupScore, RolloutGroup


@ray.remote
class RecorderActor:
    """Receives payloads straight from the object store."""

    def __init__(self, config: RunConfig) -> None:
        settle("other", pin=config.resources.pin_cores)
        self._directory = config.path / "rollouts"

    def write(
        self, name: str, version: int, scores: list[GroupScore], arrays: BatchArrays, *groups: RolloutGroup
    ) -> Path:
        """One file for the step that made `version`, or was refused at it; returns its path."""
        from rlsys.observability.rollouts import write_rollouts

        return write_rollouts(self._directory / f"{name}.parquet", version, groups, scores, arrays)
