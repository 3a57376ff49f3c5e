"""Optional trackers that get every step beside a run's own files: Weights & Biases, MLflow, trackio.

Each has one adapter, which imports it when it is opened, on a thread of its own: a slow network delays no learner step,
and a tracker that fails leaves one event and nothing else. Unless the environment says otherwise nothing leaves the
machine, and their files are below the run's directory:

    wandb     WANDB_MODE            default `offline`; `wandb sync runs/NAME/trackers/wandb/offline-run-*` sends them
    mlflow    MLFLOW_TRACKING_URI   default a file store; MLFLOW_ALLOW_FILE_STORE=true lets a full MLflow open it
    trackio   TRACKIO_DIR           default below the run; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL as trackio has them

A run that is resumed goes on in the same tracker run. The steps it repeats are there twice: trackers cannot forget.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.schema import RunConfig
from rlsys.errors import ConfigError
from rlsys.observability.run_directory import RunDirectory

AHEAD = 1000
"""Steps a tracker may be behind the run before it is given up."""

CLOSE_S = 60.0
"""Time a tracker has at the end to write what it still holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run. directory: where files and identities go; config: plain values, nested."""

    directory: Path
    name: str
    project: str
    config: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """A name no other run has, the same whenever this run goes on; it is kept in the directory."""
        path = self.directory / "id"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(r"[^A-Za-z0-9_.-]", "-", self.name)[:100] + "-" + secrets.token_hex(4))
        return path.read_text()


class Tracker(Protocol):
    """An open tracker. Any method may raise whatever its library raises."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a learner step, or of an evaluation of an earlier one."""

    def close(self) -> None:
        """Finish the run there; returns when all is written."""


class Wandb:
    """`step` is a metric of its own: W&B drops rows whose internal step falls, as a late evaluation's would."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=str(run.directory),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Mlflow:
    """Parameters are those the run started with: MLflow lets none change."""

    def __init__(self, run: TrackedRun) -> None:
        for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
            os.environ.setdefault(name, "true")
        from mlflow.entities import Param, RunStatus
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (run.directory / "mlflow").as_uri())
        self._finished = RunStatus.to_string(RunStatus.FINISHED)
        kept = run.directory / "mlflow-run"
        if kept.exists():
            self._id = kept.read_text()
            self._client.update_run(self._id, status=RunStatus.to_string(RunStatus.RUNNING))
            return
        experiment = self._client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self._id = self._client.create_run(place, run_name=run.name).info.run_id
        params = [Param(name, value) for name, value in flatten(run.config)]
        for start in range(0, len(params), 100):  # the most MLflow takes at once
            self._client.log_batch(self._id, params=params[start : start + 100])
        kept.write_text(self._id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, [Metric(mlflow_name(name), value, now, step) for name, value in metrics.items()]
        )

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, self._finished)


class Trackio:
    """trackio only warns when it cannot store a row, so the rows are counted in the end. Its config is the newest."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run.directory / "trackio"))
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._run: Any = trackio.init(
            project=run.project,
            name=run.identity,
            resume="allow",
            config=dict(run.config),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._stored: Callable[[], int] = lambda: SQLiteStorage.get_log_count(run.project, run_id=self._run.id)
        self._counted = self._run._is_local and self._run._storage_mode == "sqlite"
        self._expected = self._stored() if self._counted else 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)
        self._expected += 1

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
        if self._counted and (stored := self._stored()) < self._expected:
            raise OSError(f"only {stored} of {self._expected} rows were stored")


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


class BackgroundTracker:
    """A tracker on its own thread. Nothing here raises or waits, but for `close`."""

    def __init__(self, name: str, open_it: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_it
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(AHEAD)
        self._problem: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Hand a row over; null metrics are left out."""
        if self._problem is None:
            try:
                self._rows.put_nowait((step, {name: value for name, value in metrics.items() if value is not None}))
            except queue.Full:
                self._problem = f"it is {AHEAD} steps behind"

    def close(self) -> None:
        """Wait until all is written, at most `CLOSE_S`."""
        if self._problem is None:
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
            if self._thread.is_alive() and self._problem is None:
                self._problem = f"it did not finish within {CLOSE_S:.0f} s"

    def new_problem(self) -> str | None:
        """What went wrong, once; from then on nothing is written."""
        if self._problem is None or self._told:
            return None
        self._told = True
        return f"{self._name}: {self._problem}; nothing more is sent to it"

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._open()
            while self._problem is None and (row := self._rows.get()) is not None:
                tracker.write(*row)
            closing, tracker = tracker, None
            closing.close()
        except BaseException as error:  # a library may end its thread in any way; the run goes on and says so
            self._problem = f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # what it has is kept where that is still possible
                if tracker is not None:
                    tracker.close()


def open_trackers(directory: RunDirectory, config: RunConfig) -> list[BackgroundTracker]:
    """Start those the configuration names, each once. Problems come out of `new_problem`."""
    run = TrackedRun(
        directory=directory.trackers.absolute(),
        name=config.name,
        project=config.observability.project,
        config=config.model_dump(mode="json"),
    )
    names = dict.fromkeys(config.observability.sinks)
    if names:
        _ = run.identity  # made here: the threads only read it
    return [BackgroundTracker(name, lambda make=TRACKERS[name]: make(run)) for name in names]  # type: ignore[misc]


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without origin: a directory of that name, where its runs are
            raise ConfigError(f"observability.sinks={name}: the package is not installed; pip install 'rlsys[{name}]'")


def mlflow_name(name: str) -> str:
    """MLflow allows no `+`, and its file store no metric below another: importance/k3.by_staleness/4plus."""
    return name.replace("/by_", ".by_").replace("+", "plus")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of nested sections; what is no text as JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
