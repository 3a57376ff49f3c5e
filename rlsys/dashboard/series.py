"""Metrics as columns over the steps, and fewer points of them that look the same."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

POINTS = 800
"""Most points sent of one series: about one for every two pixels of a wide chart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of some metrics in the order of their steps; NaN where a row has no value."""

    steps: npt.NDArray[np.int64]
    times: Floats
    values: dict[str, Floats]

    def json(self) -> dict[str, Any]:
        """Columns as lists, null for NaN, six significant digits."""
        return {
            "step": self.steps.tolist(),
            "time": [round(float(t), 3) for t in self.times],
            "values": {name: numbers(column) for name, column in self.values.items()},
        }


class MetricStore:
    """`metrics.jsonl` as columns. Rows with one step (a learner step and its evaluation) are one row here."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._steps = array("q")
        self._times = array("d")
        self._columns: dict[str, array[float]] = {}
        self._first, self._last = math.inf, -math.inf
        self._touched = array("q")  # place in the table of every raw row, in the order of arrival

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def cursor(self) -> int:
        """Raw rows so far: what `since` counts from."""
        return len(self._touched)

    @property
    def names(self) -> set[str]:
        """Metrics with a value in some row."""
        return set(self._columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """One row of the file. A row without a step says nothing here."""
        step = row.get("step")
        if not isinstance(step, int):
            return
        at = _number(row.get("time"))
        if at == at:
            self._first, self._last = min(self._first, at), max(self._last, at)
        place = self._place.get(step)
        if place is None:
            place = self._place[step] = len(self._steps)
            self._steps.append(step)
            self._times.append(at)
            for column in self._columns.values():
                column.append(math.nan)
        self._touched.append(place)
        for name, value in row.items():
            number = _number(value)
            if number != number or name in ("step", "time"):
                continue
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan]) * len(self._steps)
            self._columns[name][place] = number

    def table(self, names: Iterable[str], places: Sequence[int] | None = None) -> Table:
        """These metrics, of all rows or of those at `places`; a metric that is nowhere is a column of NaN."""
        steps = np.array(self._steps, dtype=np.int64)
        chosen = np.arange(len(steps)) if places is None else np.array(places, dtype=np.int64)
        chosen = chosen[np.argsort(steps[chosen], kind="stable")]
        nothing = np.full(len(chosen), np.nan)
        return Table(
            steps=steps[chosen],
            times=np.array(self._times)[chosen],
            values={n: np.array(self._columns[n])[chosen] if n in self._columns else nothing for n in names},
        )

    def since(self, cursor: int, names: Iterable[str]) -> Table:
        """The rows that came or changed after `cursor` raw rows."""
        return self.table(names, sorted(set(self._touched[max(0, cursor) :])))

    def latest(self, name: str) -> float | None:
        """The value at the highest step that has one."""
        newest = _newest(self.table([name]).values[name])
        return None if math.isnan(newest) else newest

    def span(self) -> tuple[float, float] | None:
        """Times of the earliest and the latest raw row."""
        return (self._first, self._last) if self._first <= self._last else None


def downsample(table: Table, points: int = POINTS) -> Table:
    """At most `points` rows in which every bucket of rows keeps the lowest and the highest value of every metric.

    A bucket becomes two rows, at its first and its last step, that hold its two extremes in the order in which
    they came: all metrics share the steps, and an extreme moves by less than its bucket's width. The last row, which
    says where the run stands, is kept; a metric that it lacks has its newest value of the last bucket there.
    """
    rows = len(table.steps)
    if rows <= points:
        return table
    bounds = np.linspace(0, rows - 1, (points - 1) // 2 + 1).astype(int)
    ends = np.append(np.stack([bounds[:-1], bounds[1:] - 1], axis=1).ravel(), rows - 1)
    values = {
        name: np.append(_extremes(column, bounds), _newest(column[bounds[-2] :]))
        for name, column in table.values.items()
    }
    return Table(steps=table.steps[ends], times=table.times[ends], values=values)


def _extremes(column: Floats, bounds: npt.NDArray[np.int64]) -> Floats:
    """Lowest and highest value of every bucket, the earlier first: two numbers a bucket, NaN where it is empty."""
    missing = np.isnan(column)
    low, high = np.where(missing, np.inf, column), np.where(missing, -np.inf, column)
    found = np.full(2 * (len(bounds) - 1), np.nan)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if missing[start:stop].all():
            continue
        places = sorted((start + int(low[start:stop].argmin()), start + int(high[start:stop].argmax())))
        found[2 * i : 2 * i + 2] = column[places]
    return found


def _newest(column: Floats) -> float:
    """Its last value; NaN if it has none."""
    known = column[~np.isnan(column)]
    return float(known[-1]) if len(known) else math.nan


def numbers(values: Floats) -> list[float | None]:
    """For JSON: null for what is not finite, six significant digits."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]


def _number(value: object) -> float:
    if type(value) is float:
        return value
    return float(value) if type(value) is int else math.nan
