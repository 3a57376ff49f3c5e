"""The files of a run, `runs/<name>/`: everything needed to open, audit and recompute it later."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths below one run's directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per learner step; evaluations are rows of their own."""
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON object per closed slot."""
        return self.root / "ledger.jsonl"

    @property
    def notes(self) -> Path:
        """One JSON object per event a person should read."""
        return self.root / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "events"

    @property
    def trace(self) -> Path:
        """What every role did when, for trace viewers."""
        return self.root / "trace.json"

    @property
    def rollouts(self) -> Path:
        """Parquet files: `step-*`, one per recorded step, and `refused-*`, batches that could not be learned from."""
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """`step-*` directories."""
        return self.root / "checkpoints"

    @property
    def trackers(self) -> Path:
        """Files and identities of the trackers, where `observability.sinks` names any."""
        return self.root / "trackers"

    @property
    def plot(self) -> Path:
        """Reward and staleness over the steps."""
        return self.root / "summary.png"

    def rows(self) -> list[dict[str, Any]]:
        """All of `metrics.jsonl`; a last line cut short by a crash is left out."""
        return list(read_jsonl(self.metrics))

    def require_new(self) -> None:
        """Raise `CheckpointError` when the directory already holds a run."""
        if any(self.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"{self.root} already holds a run; continue it with --resume, or choose another name (name=...)"
            )
        if self.metrics.exists():
            raise CheckpointError(
                f"{self.root} already holds a run, which ended before its first checkpoint; remove that directory, or "
                "choose another name (name=...)"
            )

    def create(self, config_yaml: str) -> None:
        """Make the directory of a new run. Raises `CheckpointError` when it already holds one."""
        self.require_new()
        self.root.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config_yaml)

    def rewind(
        self,
        version: int,
        *,
        cursor: tuple[int, int] | None = None,
        reopened: Collection[tuple[int, int]] = (),
    ) -> None:
        """Drop what a run recorded after the checkpoint it resumes from, so that nothing is there twice.

        Prompts are (epoch, index): those from the checkpoint's `cursor` on are admitted again, and so are the
        `reopened` ones; what became of them at `version` itself, after the checkpoint, is forgotten too.
        """

        def ended(row: dict[str, Any]) -> bool:
            prompt = (row["epoch"], row["prompt"])
            return row["version"] <= version and (cursor is None or prompt < cursor) and prompt not in reopened

        _keep(self.metrics, lambda row: row["step"] <= version)
        _keep(self.ledger, ended)
        _keep(self.notes, lambda row: True)  # all but a line cut short, which the next one would continue
        for path in self.rollouts.glob("*-*.parquet"):
            if int(path.stem.split("-")[1]) > version:
                path.unlink()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSON-lines file; nothing if it does not exist."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _keep(path: Path, wanted: Any) -> None:
    if path.exists():
        rows = [row for row in read_jsonl(path) if wanted(row)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
