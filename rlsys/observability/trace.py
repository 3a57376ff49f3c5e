"""`trace.json`: what every role of a run did, for Perfetto, `chrome://tracing` and the dashboard's fleet page.

The Trace Event Format of Chrome: an array of events, times in microseconds. One process per role, one thread per
track. A run that is still going leaves the array open, which the viewers accept; `close` makes it plain JSON.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlsys.observability.spans import Fact, Span

END = {"ph": "M", "name": "end_of_trace", "pid": 0, "args": {}}
"""The one event without a comma behind it."""


class TraceWriter:
    """Appends to a trace; continues one that an earlier part of the run wrote."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._processes: dict[str, int] = {}
        events = read_trace(path)
        for event in events:
            if event["name"] == "process_name":
                self._processes[event["args"]["name"]] = event["pid"]
        # Written anew: what a crash cut short, or `close` ended, must become an open array again.
        path.write_text("[\n" + "".join(f"{json.dumps(event)},\n" for event in events))
        self._file = path.open("a")

    def spans(self, role: str, spans: Iterable[Span]) -> None:
        """What a role did."""
        for span in spans:
            self._write(
                role,
                {
                    "ph": "X",
                    "cat": role.split("-")[0],
                    "name": span.name,
                    "tid": span.track,
                    "ts": _micros(span.start),
                    "dur": max(_micros(span.end) - _micros(span.start), 0),
                    "args": dict(span.facts),
                },
            )
        self._file.flush()

    def instant(self, role: str, name: str, time_s: float, facts: Mapping[str, Fact]) -> None:
        """Something that happened at one moment, an alarm say."""
        self._write(
            role,
            {
                "ph": "i",
                "s": "g",
                "cat": role.split("-")[0],
                "name": name,
                "tid": 0,
                "ts": _micros(time_s),
                "args": dict(facts),
            },
        )
        self._file.flush()

    def close(self) -> None:
        """End the array and the file."""
        self._file.write(f"{json.dumps(END)}\n]\n")
        self._file.close()

    def _write(self, role: str, event: dict[str, Any]) -> None:
        if role not in self._processes:
            self._processes[role] = len(self._processes) + 1
            self._put({"ph": "M", "name": "process_name", "pid": self._processes[role], "args": {"name": role}})
        self._put({**event, "pid": self._processes[role]})

    def _put(self, event: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps(event)},\n")


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, finished or not; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    events = [json.loads(line.rstrip().rstrip(",")) for line in lines if line.startswith("{") and line.endswith("\n")]
    return [event for event in events if event != END]


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)
