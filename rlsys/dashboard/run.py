"""One run as the dashboard sees it: its directory, read anew as it grows."""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig, load_config
from rlsys.dashboard.follow import Follower, Row
from rlsys.dashboard.recorded import RolloutIndex
from rlsys.dashboard.series import MetricStore
from rlsys.dashboard.timeline import Timeline
from rlsys.errors import ConfigError
from rlsys.observability.run_directory import RunDirectory

QUIET_S = 60.0
QUIET_STEPS = 5
"""A run that has not ended is called stale when it wrote nothing for this long, and for as long as so many steps."""
STARTING_S = 900.0
"""The same before its first row: a model is made, a cluster started, an engine loaded."""

OPEN_STATES = ("waiting", "in_flight", "finished", "learning")
HEADLINES = (
    "reward/mean",
    "reward/pass_rate",
    "staleness/mean",
    "staleness/p95",
    "staleness/max",
    "staleness/violations",
    "importance/ess_token",
    "importance/ess_sequence",
    "kl/reference_k3",
    "throughput/generated_tokens_per_s",
    "throughput/trained_tokens_per_s",
)
"""Metrics whose newest value stands in the summary."""


class Run:
    """A run's directory. `refresh` reads what is new; everything else answers from memory. Safe between threads."""

    def __init__(self, root: Path) -> None:
        self.directory = RunDirectory(root.absolute())
        self.lock = threading.RLock()
        self.metrics = MetricStore()
        self.timeline = Timeline()
        self.rollouts = RolloutIndex(self.directory.rollouts)
        self.ends: Counter[str] = Counter()
        self.notes: list[Row] = []
        self._config: tuple[float, RunConfig | None] = (-1.0, None)
        self._metrics = Follower(self.directory.metrics)
        self._ledger = Follower(self.directory.ledger)
        self._notes = Follower(self.directory.notes)
        self._trace = Follower(self.directory.trace)
        self._generations = dict.fromkeys((self._metrics, self._ledger, self._notes, self._trace), 0)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.root.name

    @property
    def generation(self) -> int:
        """Grows when metrics that were shown have been taken back."""
        return self._metrics.generation

    def refresh(self) -> None:
        """Read what the files have gained since the last time."""
        with self.lock:
            for row in self._new(self._metrics):
                self.metrics.add(row)
            for row in self._new(self._ledger):
                self.ends[str(row.get("end", "unknown"))] += 1
            self.notes += self._new(self._notes)
            for event in self._new(self._trace):
                self.timeline.add(event)
            self.rollouts.look()

    def _new(self, follower: Follower) -> list[Row]:
        rows = follower.poll()
        if follower.generation != self._generations[follower]:
            self._generations[follower] = follower.generation
            if follower is self._metrics:
                self.metrics = MetricStore()
            elif follower is self._ledger:
                self.ends.clear()
            elif follower is self._notes:
                self.notes.clear()
            else:
                self.timeline = Timeline()
        return rows

    @property
    def config(self) -> RunConfig | None:
        """The resolved configuration; None where it is missing or of another version of this package."""
        try:
            changed = self.directory.config.stat().st_mtime
        except OSError:
            return None
        if self._config[0] != changed:
            try:
                self._config = changed, load_config(self.directory.config)
            except ConfigError:
                self._config = changed, None
        return self._config[1]

    def summary(self) -> dict[str, Any]:
        """Name, phase, progress, newest headline values, ledger counts and alarms."""
        with self.lock:
            config, span, now = self.config, self.metrics.span(), time.time()
            steps = config.learner.steps if config else None
            step = self._step()
            written = self._last_write()
            phase = self._phase(written, now, step, steps)
            latest = {name: self.metrics.latest(name) for name in HEADLINES}
            bound = self.metrics.latest("staleness/bound")
            return {
                "name": self.name,
                "phase": phase,
                "step": step,
                "steps": steps,
                "started": span[0] if span else None,
                "elapsed": (now if phase in ("starting", "running") else span[1]) - span[0] if span else None,
                "written": written,
                "now": now,
                "generation": self.generation,
                "rows": self.metrics.cursor,
                "recorded": len(self.rollouts.files),
                "events": len(self.timeline),
                "bound": config.staleness.max if config and bound is None else bound,
                "latest": latest,
                "accuracy": self._accuracy(),
                "ledger": self._ledger_counts(),
                "alarms": standing(self.notes),
                "history": alarm_rows(self.notes)[-50:],
                "notes": [row for row in self.notes if "alarm" not in row][-50:],
            }

    def settings(self) -> dict[str, Any]:
        """What the pages need of the configuration, to say why something is not there; empty where unknown."""
        config = self.config
        if config is None:
            return {}
        return {
            "rollouts_every": config.records.rollouts_every,
            "probe_fraction": config.probe.fraction,
            "audit_every": config.audit.every,
            "trace": config.observability.trace,
            "objective": config.objective.name,
            "correction": config.objective.correction.name,
            "task": config.task.name,
        }

    def _step(self) -> int:
        """The newest learner step; an evaluation of version 0 is none."""
        table = self.metrics.table(["reward/mean"])
        done = table.steps[table.values["reward/mean"] == table.values["reward/mean"]]
        return int(done.max()) if len(done) else 0

    def _accuracy(self) -> dict[str, float | None]:
        table = self.metrics.table(["eval/accuracy"])
        values = [float(v) for v in table.values["eval/accuracy"] if v == v]
        return {"first": values[0] if values else None, "last": values[-1] if values else None}

    def _ledger_counts(self) -> dict[str, Any]:
        states = {state: self.metrics.latest(f"ledger/{state}") for state in OPEN_STATES}
        return {"open": states, "ends": dict(self.ends), "lost": self.metrics.latest("ledger/lost")}

    def _last_write(self) -> float | None:
        d = self.directory
        times = [_mtime(path) for path in (d.metrics, d.ledger, d.notes, d.rollouts, d.trace, d.config)]
        return max((t for t in times if t is not None), default=None)

    def _phase(self, written: float | None, now: float, step: int, steps: int | None) -> str:
        """starting, running, finished, or stale: neither ended nor written to for a while."""
        metrics, picture = _mtime(self.directory.metrics), _mtime(self.directory.plot)
        drawn = picture is not None and metrics is not None and picture >= metrics
        saved = steps is not None and step >= steps and any(self.directory.checkpoints.glob(f"step-{step:06d}"))
        if drawn or saved:
            return "finished"
        starting = not len(self.metrics)
        patience = max(QUIET_S, QUIET_STEPS * (self.metrics.latest("throughput/step_s") or 0.0))
        if written is None or now - written > (STARTING_S if starting else patience):
            return "stale"
        return "starting" if starting else "running"


def alarm_rows(notes: Sequence[Row]) -> list[dict[str, Any]]:
    """Every raising and clearing of an alarm: what stands under `alarm` in a note, with the note's time and message."""
    return [
        {**row["alarm"], "time": row.get("time"), "message": row.get("message")}
        for row in notes
        if isinstance(row.get("alarm"), dict)
    ]


def standing(notes: Sequence[Row]) -> list[dict[str, Any]]:
    """The alarms whose last word is that they were raised, the most severe first."""
    last: dict[str, dict[str, Any]] = {}
    for alarm in alarm_rows(notes):
        last[str(alarm.get("name"))] = alarm
    raised = [alarm for alarm in last.values() if alarm.get("state") == "raised"]
    return sorted(raised, key=lambda alarm: alarm.get("severity") != "critical")


def find_run(name: str) -> Path:
    """The directory of a run given by path, or by its name below `runs/`. Raises `ConfigError`."""
    for path in (Path(name), Path("runs") / name):
        if path.is_dir():
            if (path / "config.yaml").exists() or (path / "metrics.jsonl").exists():
                return path.absolute()
            raise ConfigError(f"{path} holds no run: neither config.yaml nor metrics.jsonl is there{_runs_below(path)}")
    raise ConfigError(f"{name}: no such run directory, nor runs/{name}{_runs_below(Path('runs'))}")


def _runs_below(path: Path) -> str:
    found = sorted({p.parent.name for p in [*path.glob("*/config.yaml"), *path.glob("*/metrics.jsonl")]})
    return f"; {path} has {', '.join(found[:12])}" if found else ""


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def as_json(value: Any) -> str:
    """JSON that a browser's parser accepts: what is not finite, which a note may hold, becomes null."""
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
