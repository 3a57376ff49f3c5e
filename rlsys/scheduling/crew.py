"""The workers of one role: how many there should be, which there are, and what to do about the difference.

    Start ──► JOINING ── joined() ──► READY ── due(): too many ──► LEAVING ── left() ──► gone
                 └────────── died() ────┴── gone, and missed: Start, perhaps after a while

A name is given once. Times are seconds of any clock that never goes backwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from rlsys.errors import ConfigError

SETTLED_S = 30.0
"""A worker that worked for this long shows that workers can: the deaths before it were no crash loop."""

LONGEST_WAIT_S = 60.0
"""Between a death and the next start, however many there were."""


class Stage(StrEnum):
    """Where a worker is in its life."""

    JOINING = "joining"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(slots=True)
class Member:
    """One worker. `seat`: the lowest number that no other one has; `number`: how many were started before it."""

    name: str
    number: int
    seat: int
    stage: Stage = Stage.JOINING
    ready_at: float = inf


@dataclass(frozen=True, slots=True)
class Start:
    """A worker is to be started; see `Member` for its numbers."""

    name: str
    number: int
    seat: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """A worker is to go. `joined`: it may have work."""

    name: str
    joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCounts:
    """Workers of a role: how many there should be, how many work, how many were started in place of a dead one."""

    desired: int
    ready: int
    restarts: int


def require_count(role: str, count: int, most: int) -> None:
    """Raise ConfigError unless a role may have `count` workers."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ConfigError(
            f"{role} workers: {count!r}: must be a whole number from 1 to {most} (scaling.{role}_max, which is fixed "
            "when a run starts)"
        )


class Crew:
    """Membership of one role, which begins with the workers `present`, all of them settled."""

    def __init__(self, role: str, present: Iterable[str], *, most: int, max_restarts: int, backoff_s: float) -> None:
        self.role, self.most = role, most
        self.members = {name: Member(name, i, i, Stage.READY, ready_at=-inf) for i, name in enumerate(present)}
        self.desired = self._started = len(self.members)
        self._max_restarts, self._backoff_s = max_restarts, backoff_s
        self._restarts = self._missed = self.deaths_in_a_row = 0
        self._last_death = self._not_before = -inf

    @property
    def present(self) -> list[Member]:
        """Those that are to stay, ready or not."""
        return [member for member in self.members.values() if member.stage is not Stage.LEAVING]

    @property
    def counts(self) -> WorkerCounts:
        """Of those that are to stay."""
        ready = sum(member.stage is Stage.READY for member in self.present)
        return WorkerCounts(desired=self.desired, ready=ready, restarts=self._restarts)

    @property
    def given_up(self) -> bool:
        """Whether so many died in a row that another one would, too."""
        return self.deaths_in_a_row > self._max_restarts

    def ask(self, count: int) -> None:
        """There should be `count`, which may fail again of what failed before. Raises ConfigError."""
        require_count(self.role, count, self.most)
        self.desired, self._missed = count, 0
        self.deaths_in_a_row, self._not_before = 0, -inf

    def settle_for_less(self) -> None:
        """Want no more than there are."""
        self.desired, self._missed = len(self.present), 0

    def is_off(self, now: float) -> bool:
        """Whether `due` has something to do."""
        return len(self.present) > self.desired or (len(self.present) < self.desired and now >= self._not_before)

    def due(self, now: float) -> list[Start | Dismiss]:
        """What makes the difference good, taken as done. Who has not joined goes first, then who came last."""
        present = self.present
        surplus = len(present) - self.desired
        if surplus > 0:
            present.sort(key=lambda member: (member.stage is Stage.READY, -member.number))
            return [self._dismiss(member) for member in present[:surplus]]
        return [self._start() for _ in range(-surplus)] if now >= self._not_before else []

    def is_joining(self, name: str) -> bool:
        """Whether a worker is awaited: it is neither there yet, nor dead, nor told to go meanwhile."""
        member = self.members.get(name)
        return member is not None and member.stage is Stage.JOINING

    def joined(self, name: str, now: float) -> None:
        """One that was awaited works from now on."""
        member = self.members[name]
        member.stage, member.ready_at = Stage.READY, now

    def left(self, name: str) -> None:
        """One that was dismissed is gone."""
        self.members.pop(name, None)

    def died(self, name: str, now: float) -> bool:
        """A worker is dead. False: that was known, or it was to go anyway."""
        member = self.members.get(name)
        if member is None or member.stage is Stage.LEAVING:
            return False
        if any(m.ready_at > self._last_death and now - m.ready_at >= SETTLED_S for m in self.members.values()):
            self.deaths_in_a_row = 0
        if now - member.ready_at < SETTLED_S:
            self.deaths_in_a_row += 1
            wait = min(self._backoff_s * 2 ** (self.deaths_in_a_row - 1), LONGEST_WAIT_S)
            self._last_death, self._not_before = now, now + wait
        del self.members[name]
        self._missed += 1
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until a start is allowed."""
        return max(0.0, self._not_before - now)

    def _start(self) -> Start:
        seat = next(i for i in range(len(self.members) + 1) if all(m.seat != i for m in self.members.values()))
        member = Member(f"{self.role}-{self._started}", self._started, seat)
        self.members[member.name] = member
        self._started += 1
        if self._missed:
            self._missed -= 1
            self._restarts += 1
        return Start(member.name, member.number, member.seat)

    def _dismiss(self, member: Member) -> Dismiss:
        joined, member.stage = member.stage is Stage.READY, Stage.LEAVING
        return Dismiss(member.name, joined)
