"""What a role did, and when: noted where it happens, taken by whoever writes the trace."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

Fact = int | float | str

KEPT = 4096
"""Spans a log holds for whoever takes them; older ones are dropped, so that nobody has to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One piece of work, `start` and `end` in seconds since the epoch. Spans of one `track` never overlap."""

    name: str
    start: float
    end: float
    track: int = 0
    facts: Mapping[str, Fact] = field(default_factory=dict)


class SpanLog:
    """The recent spans of one role. Thread-safe.

    >>> log = SpanLog()
    >>> with log.span("score", groups=2):
    ...     pass
    >>> [span.name for span in log.take()], log.take()
    (['score'], [])
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._tracks: set[int] = set()

    def add(self, name: str, start: float, end: float, *, track: int = 0, **facts: Fact) -> None:
        """Note a span that is over."""
        with self._lock:
            self._spans.append(Span(name=name, start=start, end=end, track=track, facts=facts))
            del self._spans[:-KEPT]

    @contextmanager
    def span(self, name: str, **facts: Fact) -> Iterator[None]:
        """Note the work inside, whether it succeeds or not; what runs at the same time gets a track of its own."""
        with self._lock:
            track = next(i for i in range(len(self._tracks) + 1) if i not in self._tracks)
            self._tracks.add(track)
        start = time.time()
        try:
            yield
        finally:
            self.add(name, start, time.time(), track=track, **facts)
            with self._lock:
                self._tracks.discard(track)

    def take(self) -> list[Span]:
        """The spans noted since the last call."""
        with self._lock:
            taken, self._spans = self._spans, []
        return taken
