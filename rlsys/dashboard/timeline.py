"""`trace.json` as lanes: what share of every stretch of time each role spent in each of its states."""

import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 600
"""Stretches a window is cut into: about one for every two pixels."""

Floats = npt.NDArray[np.float64]


class Spans:
    """The intervals of one state of one lane, in seconds since the epoch."""

    def __init__(self) -> None:
        self._start, self._stop = array("d"), array("d")

    def add(self, start: float, stop: float) -> None:
        """Intervals may overlap: what counts is the time that at least one covers."""
        self._start.append(start)
        self._stop.append(stop)

    def __len__(self) -> int:
        return len(self._start)

    def covered(self, edges: Floats) -> Floats:
        """Seconds covered within each of the stretches between `edges`."""
        starts, stops = np.array(self._start), np.array(self._stop)
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        # An interval that begins within the reach of the earlier ones adds only what lies beyond it.
        begins = np.concatenate([starts[:1], np.maximum(starts[1:], reach[:-1])])
        lengths = np.maximum(reach - begins, 0.0)
        done = np.concatenate([[0.0], np.cumsum(lengths)])
        knots = np.column_stack([begins, np.maximum(reach, begins)]).ravel()
        heights = np.column_stack([done[:-1], done[1:]]).ravel()
        return np.diff(np.interp(edges, knots, heights))


class Timeline:
    """Events of a Chrome trace, by process and name."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._spans: dict[tuple[int, str], Spans] = {}
        self._versions: dict[int, tuple[array[float], array[float]]] = {}
        self._learner: set[int] = set()
        self._first, self._last = math.inf, -math.inf
        self._events = 0

    def __len__(self) -> int:
        return self._events

    def add(self, event: Mapping[str, Any]) -> None:
        """One event. What is no interval and no process name is not shown here."""
        pid, args = event.get("pid"), event.get("args")
        if not isinstance(pid, int):
            return
        args = args if isinstance(args, dict) else {}
        if event.get("ph") == "M" and event.get("name") == "process_name":
            self._names[pid] = str(args.get("name", pid))
            return
        start, length, name = event.get("ts"), event.get("dur"), str(event.get("name"))
        if event.get("ph") != "X" or not isinstance(start, int | float) or not isinstance(length, int | float):
            return
        self._events += 1
        begin, end = start / 1e6, (start + length) / 1e6
        self._first, self._last = min(self._first, begin), max(self._last, end)
        self._spans.setdefault((pid, name), Spans()).add(begin, end)
        version = args.get("version")
        if name in ("pause", "publish") and isinstance(version, int):
            # A worker serves a version when its pause is over; the learner has it before it publishes it.
            times, versions = self._versions.setdefault(pid, (array("d"), array("d")))
            times.append(end if name == "pause" else begin)
            versions.append(version)
            if name == "publish":
                self._learner.add(pid)

    def window(self, start: float | None, stop: float | None, bins: int = BINS) -> dict[str, Any]:
        """Lanes between two times, in seconds since the trace's first event; None: from its start, to its end.

        `share` of a state is the percentage of each stretch spent in it, `total` the share of the whole window.
        """
        if not self._events:
            return {"lanes": [], "versions": [], "duration": 0.0, "start": 0.0, "stop": 0.0, "origin": None}
        duration = self._last - self._first
        begin = min(max(0.0, start or 0.0), duration)
        end = duration if stop is None else min(max(stop, begin), duration)
        end = max(end, begin + 1e-3)
        edges = self._first + np.linspace(begin, end, bins + 1)
        lanes: dict[int, dict[str, Any]] = {}
        for (pid, name), spans in self._spans.items():
            covered = spans.covered(edges)
            lane = lanes.setdefault(pid, {"name": self._names.get(pid, f"process {pid}"), "states": {}})
            lane["states"][name] = {
                "share": np.rint(100 * covered * bins / (end - begin)).astype(int).clip(0, 100).tolist(),
                "total": round(float(covered.sum()) / (end - begin), 4),
                "count": len(spans),
            }
        return {
            "lanes": [lanes[pid] for pid in sorted(lanes, key=lambda p: _lane_order(lanes[p]["name"]))],
            "versions": self._version_lines(begin, end),
            "duration": duration,
            "start": begin,
            "stop": end,
            "origin": self._first,
        }

    def _version_lines(self, begin: float, end: float, points: int = 400) -> list[dict[str, Any]]:
        """The version each role had at evenly spaced times of the window: the learner first, then the workers."""
        grid = np.linspace(begin, end, points)
        lines = []
        for pid, (times, versions) in self._versions.items():
            order = np.argsort(np.array(times), kind="stable")
            at, had = np.array(times)[order] - self._first, np.array(versions)[order]
            places = np.searchsorted(at, grid, side="right") - 1
            values = [float(had[p]) if p >= 0 else None for p in places]
            name = self._names.get(pid, f"process {pid}")
            lines.append({"name": name, "learner": pid in self._learner, "values": values})
        return sorted(lines, key=lambda line: (not line["learner"], _lane_order(line["name"])))


def _lane_order(name: str) -> tuple[int, str, int]:
    """Rollout workers first, in the order of their numbers, then as a token travels."""
    kinds = ("rollout", "reward", "reference", "learner", "probe", "controller")
    kind, _, number = name.partition("-")
    return (kinds.index(kind) if kind in kinds else len(kinds), kind, int(number) if number.isdigit() else 0)
