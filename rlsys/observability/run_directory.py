"""The files of a run, `runs/<name>/`: everything needed to open, audit and recompute it later."""

import fcntl
import json
import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.errors import CheckpointError

log = logging.getLogger(__name__)


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

    @property
    def has_checkpoints(self) -> bool:
        """Whether it holds any, complete or not."""
        return any(self.checkpoints.glob("step-*"))

    def require_new(self) -> None:
        """Raise `CheckpointError` when the directory already holds a run."""
        if self.metrics.exists() or self.has_checkpoints:
            raise CheckpointError(
                f"{self.root} already holds a run; continue it with --resume, or choose another name (name=...)"
            )

    def create(self, config_yaml: str) -> None:
        """Make the directory of a new run. Raises `CheckpointError` when it already holds one."""
        self.require_new()
        self.write_config(config_yaml)

    def write_config(self, config_yaml: str) -> None:
        """What the run is configured as from now on; what it was before stays as `config-1.yaml`, `config-2.yaml`, …"""
        self.root.mkdir(parents=True, exist_ok=True)
        if self.config.exists() and self.config.read_text() != config_yaml:
            before = len(list(self.root.glob("config-*.yaml"))) + 1
            self.config.rename(self.root / f"config-{before}.yaml")
        self.config.write_text(config_yaml)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For one process at a time: raises `CheckpointError` while another one trains here.

        Directories that were made for it are taken away again when nothing was begun there.
        """
        made = [directory for directory in (self.root, *self.root.parents) if not directory.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        lock = self.root / ".lock"
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.root}: another process is training there; wait for its end, or choose another name "
                    "(name=...)"
                ) from None
            except OSError as error:
                log.warning("%s: nothing keeps a second process from this run: no file locks (%s)", self.root, error)
            try:
                yield
            finally:
                if made and [*self.root.iterdir()] == [lock]:
                    lock.unlink()
                    with suppress(OSError):  # another run may have begun beside it
                        for directory in made:
                            directory.rmdir()

    def rewind(
        self,
        version: int,
        *,
        cursor: tuple[int, int] | None = None,
        reopened: Collection[tuple[int, int]] = (),
    ) -> None:
        """Drop what a run recorded after the checkpoint it resumes from, so that nothing is there twice.

        The checkpoint's own version is evaluated again, first of all; its step and its audit do not come back. Prompts
        are (epoch, index): those from the checkpoint's `cursor` on are admitted again, and so are the `reopened` ones;
        what became of them at `version` itself, after the checkpoint, is forgotten too.
        """

        def ended(row: dict[str, Any]) -> bool:
            prompt = (row["epoch"], row["prompt"])
            return row["version"] <= version and (cursor is None or prompt < cursor) and prompt not in reopened

        def stays(row: dict[str, Any]) -> bool:
            return row["step"] < version or (row["step"] == version and "eval/accuracy" not in row)

        _keep(self.metrics, stays)
        _keep(self.ledger, ended)
        _keep(self.notes, lambda row: True)  # all but a line cut short, which the next one would continue
        self._clear_alarms(version)
        for path in self.rollouts.glob("*-*.parquet"):
            if int(path.stem.split("-")[1]) > version:
                path.unlink()

    def _clear_alarms(self, version: int) -> None:
        """End the alarms that stand: what goes on judges afresh, and raises again what persists."""
        last = {row["alarm"]["name"]: row["alarm"] for row in read_jsonl(self.notes) if row["kind"] == "alarm"}
        for name, alarm in last.items():
            if alarm["state"] == "raised":
                cleared = {**alarm, "state": "cleared", "step": version, "value": None}
                row = {"time": time.time(), "kind": "alarm", "message": f"{name} cleared: the run was resumed"}
                with self.notes.open("a") as file:
                    file.write(json.dumps({**row, "alarm": cleared}) + "\n")


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
