"""What a run's directory says, read once: the numbers a report is written from."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from rlsys.errors import DataError
from rlsys.observability.run_directory import RunDirectory, read_jsonl

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

FILES_READ = 200
"""Recorded steps whose tokens are counted; of a longer run evenly spaced ones are."""

COUNTERS = (
    *("ledger/admitted", "ledger/trained", "ledger/rejected"),
    *("staleness/rejected_groups", "staleness/rejected_tokens"),
    *("workers/rollout/restarts", "workers/reward/restarts"),
)
"""Metrics that count up from the start of a process: where one drops, a resumed run has begun anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm from its raising on. cleared: the step, None while it stands. value, limit: when it was raised."""

    name: str
    severity: str
    raised: int | None
    cleared: int | None
    value: float | None
    limit: float | None
    message: str
    cause: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """Trained tokens by age in versions. by_step: learner step → tokens of age 0, 1, 2 …; files: read, of recorded."""

    by_step: Mapping[int, tuple[int, ...]]
    files: tuple[int, int]

    @property
    def total(self) -> list[int]:
        """Tokens of age 0, 1, 2 … over all steps that were read."""
        longest = max((len(counts) for counts in self.by_step.values()), default=0)
        return [sum(c[age] for c in self.by_step.values() if age < len(c)) for age in range(longest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its files tell it. label: how a report calls it. steps, evaluations: rows of `metrics.jsonl`."""

    root: Path
    label: str
    config: Row
    config_text: str
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    ends: tuple[Row, ...]
    alarms: tuple[Alarm, ...]
    notes: tuple[Row, ...]
    ages: Ages | None
    samples: tuple[Row, ...]

    def setting(self, dotted: str) -> Any:
        """A field of the configuration; None where the run had no such field."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) where the metric was recorded and is not null."""
        rows = self.evaluations if name.startswith("eval/") else self.steps
        return [(row["step"], row[name]) for row in rows if row.get(name) is not None]

    def values(self, name: str) -> list[float]:
        """The same without the steps."""
        return [value for _, value in self.series(name)]

    def mean(self, name: str) -> float | None:
        """Mean over the steps that have it; None if none has."""
        values = self.values(name)
        return sum(values) / len(values) if values else None

    def last(self, name: str) -> float | None:
        """Its newest value."""
        values = self.values(name)
        return values[-1] if values else None

    def largest(self, name: str) -> float | None:
        """Its largest value."""
        return max(self.values(name), default=None)

    def total(self, name: str) -> float | None:
        """Its sum over steps."""
        values = self.values(name)
        return sum(values) if values else None

    @property
    def parts(self) -> list[list[Row]]:
        """The steps by the process that made them: a run that was never resumed has one part."""
        found: list[list[Row]] = []
        reached: dict[str, float] = {}
        for row in self.steps:
            counts = {name: row[name] for name in COUNTERS if row.get(name) is not None}
            if not found or any(count < reached.get(name, 0.0) for name, count in counts.items()):
                found.append([])
                reached = {}
            found[-1].append(row)
            reached |= counts
        return found

    def count(self, name: str) -> float | None:
        """What one of `COUNTERS` came to in the whole run: Σ over its parts of each one's newest value."""
        rows = (_newest(part, name) for part in self.parts)
        values = [row[name] for row in rows if row is not None]
        return sum(values) if values else None

    def pooled(self, name: str, counter: str) -> float | None:
        """A mean since the start of a process over the whole run: each part weighs what it counted."""
        rows = (_newest(part, name, counter) for part in self.parts)
        pairs = [(row[name], row[counter]) for row in rows if row is not None]
        weight = sum(count for _, count in pairs)
        return sum(value * count for value, count in pairs) / weight if weight else None

    @property
    def ended(self) -> Counter[str]:
        """Groups by their named end."""
        return Counter(str(row["end"]) for row in self.ends)


def find_run(name: str | Path, runs: Path = Path("runs")) -> Path:
    """The directory of a run given by name below `runs` or by path. Raises DataError, with the runs there are."""
    for path in (Path(name), runs / name):
        if RunDirectory(path).metrics.is_file() or RunDirectory(path).config.is_file():
            return path
    present = sorted(path.parent.name for path in runs.glob("*/metrics.jsonl"))
    there = f"; {runs}/ holds {', '.join(present)}" if present else ""
    raise DataError(f"{name}: no run there (a run's directory has config.yaml and metrics.jsonl){there}")


def read_run(path: Path, label: str | None = None) -> RunRecord:
    """Read a run's directory; what a run did not write is empty. Raises DataError for a file that is damaged."""
    directory = RunDirectory(path)
    try:
        text = directory.config.read_text("utf-8") if directory.config.exists() else ""
        rows, events, ends = (list(read_jsonl(file)) for file in (directory.metrics, directory.notes, directory.ledger))
        config = yaml.safe_load(text) or {}
    except (json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: a file of this run is damaged: {error}") from error
    files = sorted(directory.rollouts.glob("step-*.parquet"))
    rows.sort(key=lambda row: row["step"])
    return RunRecord(
        root=path,
        label=label or path.resolve().name,
        config=config,
        config_text=text,
        steps=tuple(row for row in rows if "eval/accuracy" not in row),
        evaluations=tuple(row for row in rows if "eval/accuracy" in row),
        ends=tuple(ends),
        alarms=tuple(_alarms(events)),
        notes=tuple(event for event in events if event.get("kind") != "alarm"),
        ages=_ages(files),
        samples=tuple(_samples(files)),
    )


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `quickstart`, or `a/quickstart` and `b/quickstart`."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"the same run is given twice: {', '.join(map(str, paths))}")


def _newest(rows: Sequence[Row], *names: str) -> Row | None:
    """The last row that has them all."""
    return next((row for row in reversed(rows) if all(row.get(name) is not None for name in names)), None)


def _alarms(events: Sequence[Row]) -> list[Alarm]:
    """Raised alarms in order, with the step that cleared them. A resumed run may raise again what stands."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.get("kind") != "alarm":
            continue
        alarm = event.get("alarm") or {}
        standing = [one for one in found if one["name"] == alarm.get("name") and one["cleared"] is None]
        if alarm.get("state") == "cleared" and standing:
            standing[-1]["cleared"] = alarm.get("step")
        if alarm.get("state") == "cleared" or standing:
            continue
        found.append(
            {
                "name": str(alarm.get("name", "alarm")),
                "severity": str(alarm.get("severity", "")),
                "raised": alarm.get("step"),
                "cleared": None,
                "value": alarm.get("value"),
                "limit": alarm.get("limit"),
                "message": str(event.get("message", "")),
                "cause": str(alarm.get("cause", "")),
                "advice": str(alarm.get("advice", "")),
            }
        )
    return [Alarm(**fields) for fields in found]


def _ages(files: Sequence[Path]) -> Ages | None:
    """The batch that made version s was trained at version s-1: a token of version v was s-1-v versions old."""
    if not files:
        return None
    chosen = _spaced(files, FILES_READ)
    by_step: dict[int, tuple[int, ...]] = {}
    for path in chosen:
        table = _columns(path, ["step", "versions", "loss_mask"])
        if len(table):
            step = int(table["step"][0].as_py())
            versions, mask = (
                table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                for name in ("versions", "loss_mask")
            )
            ages = step - 1 - versions[mask.astype(bool)].astype(np.int64)
            by_step[step] = tuple(int(n) for n in np.bincount(np.maximum(ages, 0)))
    return Ages(by_step=by_step, files=(len(chosen), len(files)))


def _samples(files: Sequence[Path]) -> list[Row]:
    """Of the first and of the last recorded batch: a prompt's best and worst response, two prompts each."""
    columns = ["step", "slot", "prompt_text", "response_text", "reward", "advantage", "finish_reason", "versions"]
    found: list[Row] = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        groups: dict[int, list[Row]] = {}
        for row in _columns(path, columns).to_pylist():
            groups.setdefault(row["slot"], []).append(row)
        telling = sorted(groups.values(), key=lambda rows: len({row["reward"] for row in rows}) == 1)
        for rows in telling[:2]:
            best, worst = (choose(rows, key=lambda row: row["reward"]) for choose in (max, min))
            found += [best] if best["reward"] == worst["reward"] else [best, worst]
    return found


def _columns(path: Path, names: Sequence[str]) -> "pa.Table":
    """Columns of a recorded step. Raises DataError for a file that is damaged or has no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read(columns=list(names)).select(list(names))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: this file is damaged: {error}") from error
    except KeyError as error:
        raise DataError(f"{path}: this file has no column {error}") from error


def _spaced(files: Sequence[Path], most: int) -> list[Path]:
    if len(files) <= most:
        return list(files)
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
