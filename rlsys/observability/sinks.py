"""Where a run's numbers go: JSON lines, TensorBoard, and the trackers that were asked for."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rlsys.config.schema import RunConfig
from rlsys.observability.alarms import Alarm
from rlsys.observability.catalogue import definition
from rlsys.observability.prometheus import Prometheus
from rlsys.observability.run_directory import RunDirectory
from rlsys.observability.spans import Span
from rlsys.observability.trace import TraceWriter
from rlsys.observability.trackers import open_trackers


class JsonLines:
    """One JSON object per line, flushed as it is written."""

    def __init__(self, path: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises ValueError for NaN and infinity, which JSON does not have."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard scalars, written without torch."""

    def __init__(self, directory: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory))

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Scalars of one step; null metrics are left out."""
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if value is not None
        ]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class RunJournal:
    """History of one run. Refuses metrics that the catalogue does not define."""

    def __init__(self, directory: RunDirectory, config: RunConfig) -> None:
        self._metrics = JsonLines(directory.metrics)
        self._ledger = JsonLines(directory.ledger)
        self._notes = JsonLines(directory.notes)
        self._tensorboard = TensorBoard(directory.tensorboard) if config.records.tensorboard else None
        self._prometheus = Prometheus(config) if config.observability.prometheus else None
        self._trace = TraceWriter(directory.trace) if config.observability.trace else None
        self._trackers = open_trackers(directory, config)

    def step(self, version: int, metrics: Mapping[str, float | None]) -> None:
        """One row of metrics.jsonl, and its scalars."""
        for name in metrics:
            definition(name)
        self._metrics.write({"step": version, "time": time.time(), **metrics})
        for sink in (self._tensorboard, self._prometheus):
            if sink is not None:
                sink.write(version, metrics)
        for tracker in self._trackers:
            tracker.write(version, metrics)
        self._note_trackers()

    def event(self, kind: str, message: str) -> None:
        """Something a person should read."""
        self._notes.write({"time": time.time(), "kind": kind, "message": message})

    def alarm(self, alarm: Alarm) -> None:
        """An alarm was raised or cleared."""
        now = time.time()
        fields = dataclasses.asdict(alarm)
        self._notes.write({"time": now, "kind": "alarm", "message": alarm.message, "alarm": fields})
        if self._prometheus is not None:
            self._prometheus.alarm(alarm)
        if self._trace is not None:
            self._trace.instant("alarms", alarm.name, now, {"state": alarm.state, "step": alarm.step})

    def spans(self, role: str, spans: Sequence[Span]) -> None:
        """What a role did, for the trace."""
        if self._trace is not None:
            self._trace.spans(role, spans)

    def tick(self) -> None:
        """Another second has passed."""
        if self._prometheus is not None:
            self._prometheus.refresh()

    def closed(self, slot: Any) -> None:
        """One row of ledger.jsonl: a slot's end."""
        self._ledger.write(dataclasses.asdict(slot))

    def close(self) -> None:
        """Close all files; the trackers first, which may have something to say."""
        for tracker in self._trackers:
            tracker.close()
        self._note_trackers()
        for sink in (self._metrics, self._ledger, self._notes, self._tensorboard, self._trace):
            if sink is not None:
                sink.close()

    def _note_trackers(self) -> None:
        for tracker in self._trackers:
            if problem := tracker.new_problem():
                self.event("tracker_failed", problem)
