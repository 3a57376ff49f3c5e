"""Which rollout worker gets the next prompt: one that serves a fresh enough version and has the least to do."""

from dataclasses import dataclass

from rlsys.versions import PolicyVersion


@dataclass(slots=True)
class Worker:
    """What the router knows of a rollout worker. `serving_version` None: it serves nothing yet."""

    name: str
    serving_version: PolicyVersion | None = None
    in_flight: int = 0


class Router:
    """Least-loaded among the workers at most `max_lag` versions behind the learner (L).

    A worker holds at most `capacity` groups, so that a joining worker finds prompts still to be given out.
    """

    def __init__(self, *, max_lag: int, capacity: int) -> None:
        self._max_lag = max_lag
        self._capacity = capacity
        self.workers: dict[str, Worker] = {}

    def add(self, name: str) -> None:
        """A worker exists; it gets prompts once it acknowledged a version."""
        self.workers.setdefault(name, Worker(name))

    def remove(self, name: str) -> Worker | None:
        """A worker gets no further prompts; returns what it still has, or None when that was known."""
        return self.workers.pop(name, None)

    def acknowledge(self, name: str, version: PolicyVersion) -> None:
        """A worker serves `version` from now on; news never goes backwards."""
        worker = self.workers.get(name)
        if worker is not None and (worker.serving_version is None or version > worker.serving_version):
            worker.serving_version = version

    def choose(self, learner_version: PolicyVersion) -> Worker | None:
        """The worker for the next prompt, or None while nobody is fresh enough and free."""
        fresh = [
            worker
            for worker in self.workers.values()
            if worker.serving_version is not None
            and learner_version - worker.serving_version <= self._max_lag
            and worker.in_flight < self._capacity
        ]
        return min(fresh, key=lambda worker: worker.in_flight, default=None)

    def serving_lag_max(self, learner_version: PolicyVersion) -> int:
        """Versions the slowest serving worker is behind the learner; 0 without workers."""
        lags = [learner_version - w.serving_version for w in self.workers.values() if w.serving_version is not None]
        return max(lags, default=0)


def groups_per_worker(sequences: int, samples: int) -> int:
    """Groups of `samples` that a worker decoding `sequences` at once may hold: twice what it decodes, at least 2.

    So its batch stays full while results gather and travel.

    >>> groups_per_worker(256, 8)
    64
    """
    return max(2, -(-2 * sequences // samples))
