"""The recorded tokens of a run, `rollouts/step-*.parquet`: read a few columns at a time, each file once."""

import math
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.dashboard.series import numbers

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BUCKETS = ("0", "1", "2", "3", "4+")
"""Staleness as everywhere in rlsys: four ages, and the rest."""
COLUMNS = 400
"""Most columns of the heat map."""
SAMPLED_FILES = 24
"""Most files behind one histogram."""
KEPT_TABLES = 6

_DTYPES = {"int32": np.int32, "int64": np.int64, "float": np.float32, "double": np.float64}
_FILE = re.compile(r"step-(\d+)\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Ages of one step's trained tokens: `ages` counts them by age; by worker, tokens and their summed ages."""

    ages: Integers
    in_flight: int
    in_queue: int
    workers: dict[str, tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return int(self.ages.sum())


class RolloutIndex:
    """What is recorded, and what has been read of it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen = -1
        self.files: dict[int, tuple[Path, int]] = {}
        self._digests: dict[tuple[int, int], Digest] = {}
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._reading = threading.Lock()

    def look(self) -> None:
        """Notice files that came, went or were written again."""
        try:
            changed = self._directory.stat().st_mtime_ns
            if changed == self._seen:
                return
            found = {}
            for path in self._directory.iterdir():
                if match := _FILE.fullmatch(path.name):
                    found[int(match[1])] = (path, path.stat().st_mtime_ns)
        except OSError:  # no such directory, or a file that a resumed run removed meanwhile: look again next time
            self.files = self.files if self._directory.exists() else {}
            return
        self._seen, self.files = changed, found

    @property
    def steps(self) -> list[int]:
        """Recorded steps in order."""
        return sorted(self.files)

    def digests(self, budget_s: float) -> tuple[dict[int, Digest], int]:
        """By step, and how many files still wait: what could be read within the time, the whole run coarsely first."""
        with self._reading:
            steps, files = self.steps, dict(self.files)
            pending = [step for step in _coarse_to_fine(steps) if (step, files[step][1]) not in self._digests]
            deadline, left = math.inf, len(pending)
            for step in pending:
                path, stamp = files[step]
                try:
                    self._digests[step, stamp] = digest(path, step)
                except (OSError, pa.ArrowInvalid, KeyError):
                    left -= 1
                    continue
                left -= 1
                deadline = min(deadline, time.monotonic() + budget_s)  # the first file also loads the reader
                if time.monotonic() >= deadline:
                    break
            known = {s: d for s in steps if (d := self._digests.get((s, files[s][1]))) is not None}
            return known, left

    def table(self, step: int) -> pa.Table:
        """All columns of one step. Raises KeyError when it is not recorded."""
        path, stamp = self.files[step]
        with self._reading:
            if (step, stamp) not in self._tables:
                try:
                    self._tables[step, stamp] = _read(path)
                except (OSError, pa.ArrowInvalid) as error:
                    raise KeyError(step) from error
            self._tables.move_to_end((step, stamp))
            while len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
            return self._tables[step, stamp]


def digest(path: Path, step: int) -> Digest:
    """Read what the staleness page needs of one file."""
    table = _read(path, ["worker", "versions", "loss_mask"])
    lengths = _lengths(table["versions"])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    versions, mask = flat(table["versions"]).astype(np.int64), flat(table["loss_mask"]).astype(bool)
    finished = np.zeros(len(lengths), dtype=np.int64)
    np.maximum.at(finished, rows, versions)
    rows, versions = rows[mask], versions[mask]
    ages = step - 1 - versions
    in_queue = step - 1 - finished[rows]
    workers = {}
    names = np.array(table["worker"].to_pylist(), dtype=object)
    for worker in sorted(set(names.tolist())):
        of_worker = (names == worker)[rows]
        workers[str(worker)] = (int(of_worker.sum()), int(ages[of_worker].sum()))
    return Digest(
        ages=np.bincount(ages.clip(0)) if len(ages) else np.zeros(1, dtype=np.int64),
        in_flight=int((ages - in_queue).sum()),
        in_queue=int(in_queue.sum()),
        workers=workers,
    )


def staleness_map(digests: dict[int, Digest], columns: int = COLUMNS) -> dict[str, Any]:
    """Share of tokens by age (rows) and step (columns, each a few steps when there are many), and means beside it."""
    steps = sorted(digests)
    groups = np.array_split(np.array(steps, dtype=np.int64), min(columns, len(steps))) if steps else []
    oldest = max((len(d.ages) for d in digests.values()), default=1)
    workers = sorted({worker for d in digests.values() for worker in d.workers})
    shares, flight, queue = [], [], []
    by_worker: dict[str, list[float | None]] = {worker: [] for worker in workers}
    for group in groups:
        members = [digests[int(step)] for step in group]
        counts = np.sum([np.pad(d.ages, (0, oldest - len(d.ages))) for d in members], axis=0)
        tokens = max(int(counts.sum()), 1)
        shares.append([round(float(c) / tokens, 4) for c in counts])
        flight.append(round(sum(d.in_flight for d in members) / tokens, 4))
        queue.append(round(sum(d.in_queue for d in members) / tokens, 4))
        for worker in workers:
            pairs = [d.workers[worker] for d in members if worker in d.workers]
            count = sum(n for n, _ in pairs)
            by_worker[worker].append(round(sum(total for _, total in pairs) / count, 4) if count else None)
    return {
        "first": [int(group[0]) for group in groups],
        "last": [int(group[-1]) for group in groups],
        "ages": oldest,
        "shares": shares,
        "in_flight": flight,
        "in_queue": queue,
        "workers": by_worker,
    }


def histogram(index: RolloutIndex, start: int, stop: int, bins: int = 61) -> dict[str, Any]:
    """log π_θ - log μ of the trained tokens of steps `start`..`stop`, counted by value and staleness bucket.

    At most SAMPLED_FILES evenly chosen files are read. The bins cover all but one token in a thousand on either
    side; the tokens beyond are counted in the outermost bins.
    """
    steps = [step for step in index.steps if start <= step <= stop]
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, SAMPLED_FILES).astype(int))] if steps else []
    ratios, buckets = [np.empty(0)], [np.empty(0, dtype=np.int64)]
    for step in chosen:
        try:
            table = index.table(step)
        except KeyError:
            continue
        mask = flat(table["loss_mask"]).astype(bool)
        ratios.append((flat(table["policy_logprobs"]).astype(float) - flat(table["behavior_logprobs"]))[mask])
        buckets.append((step - 1 - flat(table["versions"]).astype(np.int64)[mask]).clip(0, len(BUCKETS) - 1))
    values, of = np.concatenate(ratios), np.concatenate(buckets)
    of, values = of[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return {"steps": len(steps), "sampled": len(chosen), "tokens": 0, "edges": [], "counts": {}, "quantiles": {}}
    reach = max(float(np.quantile(np.abs(values), 0.998)), 1e-6)
    edges = np.linspace(-reach, reach, bins + 1)
    inside = values.clip(-reach, reach)
    counts = {name: np.histogram(inside[of == i], edges)[0].tolist() for i, name in enumerate(BUCKETS)}
    return {
        "steps": len(steps),
        "sampled": len(chosen),
        "tokens": len(values),
        "edges": numbers(edges),
        "counts": counts,
        "beyond": int((np.abs(values) > reach).sum()),
        "quantiles": {
            name: numbers(np.array([np.quantile(values, q)]))[0]
            for name, q in (("1%", 0.01), ("median", 0.5), ("99%", 0.99))
        },
        "mean": numbers(np.array([values.mean()]))[0],
        "largest": numbers(np.array([np.abs(values).max()]))[0],
    }


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Not `pq.read_table`, whose first call imports datasets and cloud file systems for seconds."""
    with pq.ParquetFile(path) as file:
        return file.read(columns=columns)


def flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of a list column, one response after another."""
    return _values(column.combine_chunks().flatten())


def _values(array: pa.Array) -> npt.NDArray[Any]:
    """Numbers or flags without nulls. Not `to_numpy`, whose first call imports pandas for seconds."""
    places = slice(array.offset, array.offset + len(array))
    data = array.buffers()[1] or b""
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[places].astype(bool)
    return np.frombuffer(data, _DTYPES[str(array.type)])[places]


def offsets(column: pa.ChunkedArray) -> Integers:
    """Where the responses of a list column begin among its values, from 0, and where the last one ends."""
    found = _values(column.combine_chunks().offsets).astype(np.int64)
    return found - found[0]


def _lengths(column: pa.ChunkedArray) -> Integers:
    return np.diff(offsets(column)).astype(np.int64)


def _coarse_to_fine(steps: list[int]) -> list[int]:
    """Every 64th first, then every 32nd, ...; the newest before all."""
    places = sorted(range(len(steps)), key=lambda i: -((i & -i).bit_length() if i else 64))
    return [*steps[-1:], *(steps[i] for i in places[:] if i != len(steps) - 1)]
