"""The recorder actor: writes every token of a batch to parquet, off everyone's path."""

from collections.abc import Sequence
from pathlib import Path

import ray

from rlsys.actors.bundle import Bundle, Place, select
from rlsys.actors.process import settle
from rlsys.config.schema import RunConfig
from rlsys.observability.spans import Span, SpanLog
from rlsys.records import BatchArrays, GroupScore


@ray.remote
class RecorderActor:
    """Receives payloads straight from the object store."""

    def __init__(self, config: RunConfig) -> None:
        settle("other", config)
        self._directory = config.path / "rollouts"
        self._spans = SpanLog()

    def write(
        self,
        name: str,
        version: int,
        scores: Sequence[GroupScore],
        arrays: BatchArrays,
        places: Sequence[Place],
        *bundles: Bundle,
    ) -> Path:
        """One file for the step that made `version`, or was refused at it; returns its path."""
        from rlsys.observability.rollouts import write_rollouts

        path = self._directory / f"{name}.parquet"
        with self._spans.span("write", version=version):
            return write_rollouts(path, version, select(places, bundles), scores, arrays)

    def spans(self) -> list[Span]:
        """What it did since the last call."""
        return self._spans.take()
