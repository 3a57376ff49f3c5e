"""The one place that knows where every prompt is.

A prompt holds a slot from admission to a *named* end; nothing vanishes and nothing is counted twice.

    admit            start               finish            take_batch          end(TRAINED)
      ──► WAITING ──────────► IN_FLIGHT ──────────► FINISHED ──────────► LEARNING ──────────► end
             ▲                    │                     │                  │
             ├────── retry ───────┘                     └──── end(REJECTED_…, FAILED_…) ───► end
             └────────────────────────── restart ──────────────────────────┘

With P groups per step, at most B slots and a completion window W, a slot is consumed at most
⌊(B+W-2)/P⌋ learner steps after its admission: older slots number at most B-1, and only the W-1 admitted
right behind the oldest open one may overtake it. That bounds staleness by construction.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush

from rlsys.errors import LedgerError
from rlsys.records import Prompt
from rlsys.versions import PolicyVersion


class State(StrEnum):
    """Where an open slot is."""

    WAITING = "waiting"
    IN_FLIGHT = "in_flight"
    FINISHED = "finished"
    LEARNING = "learning"


class End(StrEnum):
    """Why a slot was closed."""

    TRAINED = "trained"
    REJECTED_STALE = "rejected_stale"
    REJECTED_NO_SIGNAL = "rejected_no_signal"
    REJECTED_NONFINITE = "rejected_nonfinite"
    """The learner refused its batch: loss or gradient was not finite."""
    FAILED_ROLLOUT = "failed_rollout"
    FAILED_REWARD = "failed_reward"


@dataclass(slots=True)
class Slot:
    """One open prompt. `id` is its place in the order of admission."""

    id: int
    prompt: Prompt
    admitted_version: PolicyVersion
    state: State = State.WAITING
    attempt: int = 0
    worker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """How a slot ended: the row of `ledger.jsonl`."""

    slot: int
    epoch: int
    prompt: int
    end: End
    attempts: int
    admitted_version: PolicyVersion
    version: PolicyVersion


class Ledger:
    """At most `capacity` open slots (B), handed to the learner in admission order within `window` (W)."""

    def __init__(
        self,
        *,
        capacity: int,
        window: int = 1,
        on_close: Callable[[Closed], None] = lambda closed: None,
        first_id: int = 0,
    ) -> None:
        if capacity < 1 or window < 1:
            raise LedgerError(f"capacity={capacity} and window={window} must be at least 1")
        self._capacity = self._admitting = capacity
        self._window = window
        self._on_close = on_close
        self._slots: dict[int, Slot] = {}
        self._in: Counter[State] = Counter()
        self._waiting: list[int] = []  # heap; an entry counts while its slot is WAITING
        self.next_id = first_id
        self.admitted = 0
        self.ended: dict[End, int] = dict.fromkeys(End, 0)

    @property
    def has_room(self) -> bool:
        """Whether another prompt may be admitted."""
        return len(self._slots) < self._admitting

    @property
    def admitting(self) -> int:
        """Slots that may be open now."""
        return self._admitting

    def admit_up_to(self, slots: int) -> None:
        """Narrow admission to `slots` open ones, or widen it again; never beyond the capacity."""
        self._admitting = min(max(1, slots), self._capacity)

    @property
    def open(self) -> tuple[Slot, ...]:
        """All open slots in admission order."""
        return tuple(self._slots.values())

    def counts(self) -> dict[str, int]:
        """Open slots by state, ended ones by reason, and `lost`, which is 0 unless the ledger is broken."""
        counts = {state.value: self._in[state] for state in State} | {end.value: n for end, n in self.ended.items()}
        lost = self.admitted - len(self._slots) - sum(self.ended.values())
        return counts | {"admitted": self.admitted, "lost": lost}

    def admit(self, prompt: Prompt, version: PolicyVersion) -> Slot:
        """Give a prompt a slot. Raises `LedgerError` when there is no room."""
        if not self.has_room:
            raise LedgerError(f"all {self._admitting} slots are taken")
        slot = Slot(self.next_id, prompt, version)
        self._slots[slot.id] = slot
        self._in[slot.state] += 1
        heappush(self._waiting, slot.id)
        self.next_id += 1
        self.admitted += 1
        return slot

    def next_waiting(self) -> Slot | None:
        """The oldest slot nobody works on."""
        while self._waiting:
            slot = self._slots.get(self._waiting[0])
            if slot is not None and slot.state is State.WAITING:
                return slot
            heappop(self._waiting)
        return None

    def start(self, slot_id: int, worker: str) -> int:
        """A worker begins an attempt; returns its number, which fences off late results of earlier ones."""
        slot = self._require(slot_id, State.WAITING)
        self._move(slot, State.IN_FLIGHT)
        slot.worker = worker
        slot.attempt += 1
        return slot.attempt

    def finish(self, slot_id: int, attempt: int) -> bool:
        """The responses of an attempt arrived with their rewards. False: a repeated or outdated delivery."""
        slot = self._current(slot_id, attempt)
        if slot is not None:
            self._move(slot, State.FINISHED)
        return slot is not None

    def retry(self, slot_id: int, attempt: int) -> bool:
        """An attempt was lost (its worker died); the slot waits again. False: outdated news."""
        slot = self._current(slot_id, attempt)
        if slot is not None:
            self._wait_again(slot)
        return slot is not None

    def fail(self, slot_id: int, attempt: int, reason: End, version: PolicyVersion) -> bool:
        """An attempt came to nothing and another would too; the slot ends. False: outdated news."""
        if self._current(slot_id, attempt) is None:
            return False
        self.end(slot_id, reason, version)
        return True

    def batch_ready(self, groups: int, backlog: int = 0) -> bool:
        """Whether `take_batch(groups)` would succeed, and leave `backlog` finished slots as eligible behind it."""
        wanted = groups + backlog
        return self._in[State.FINISHED] >= wanted and len(self._eligible(wanted)) == wanted

    def take_batch(self, groups: int) -> list[Slot]:
        """The next `groups` finished slots in admission order, looking at most `window` places ahead."""
        chosen = self._eligible(groups)
        if len(chosen) < groups:
            raise LedgerError(f"only {len(chosen)} of {groups} groups are finished within the window")
        for slot in chosen:
            self._move(slot, State.LEARNING)
        return chosen

    def restart(self, slot_ids: Iterable[int]) -> None:
        """The responses of a batch were lost on their way to the learner; its slots wait again."""
        for slot_id in slot_ids:
            self._wait_again(self._require(slot_id, State.LEARNING))

    def commit(self, slot_ids: Iterable[int], version: PolicyVersion) -> None:
        """The learner step that made `version` trained these slots."""
        for slot_id in slot_ids:
            self._require(slot_id, State.LEARNING)
            self._close(slot_id, End.TRAINED, version)

    def end(self, slot_id: int, reason: End, version: PolicyVersion) -> None:
        """Close a slot for any reason but training."""
        if reason is End.TRAINED:
            raise LedgerError("slots are trained through commit()")
        self._close(slot_id, reason, version)

    def _eligible(self, groups: int) -> list[Slot]:
        """Finished slots that may be learned from now: those less than W after the oldest one passed over."""
        chosen: list[Slot] = []
        end = math.inf
        for slot in self._slots.values():
            if len(chosen) == groups or slot.id >= end:
                break
            if slot.state is State.FINISHED:
                chosen.append(slot)
            elif slot.state is not State.LEARNING:
                end = min(end, slot.id + self._window)
        return chosen

    def _current(self, slot_id: int, attempt: int) -> Slot | None:
        """The slot, if this attempt is the one in flight."""
        slot = self._slots.get(slot_id)
        return slot if slot is not None and (slot.attempt, slot.state) == (attempt, State.IN_FLIGHT) else None

    def _wait_again(self, slot: Slot) -> None:
        self._move(slot, State.WAITING)
        slot.worker = None
        heappush(self._waiting, slot.id)

    def _move(self, slot: Slot, state: State) -> None:
        self._in[slot.state] -= 1
        self._in[state] += 1
        slot.state = state

    def _require(self, slot_id: int, state: State) -> Slot:
        slot = self._slots.get(slot_id)
        if slot is None:
            raise LedgerError(f"slot {slot_id} is not open")
        if slot.state is not state:
            raise LedgerError(f"slot {slot_id} is {slot.state}, expected {state}")
        return slot

    def _close(self, slot_id: int, reason: End, version: PolicyVersion) -> None:
        slot = self._slots.pop(slot_id, None)
        if slot is None:
            raise LedgerError(f"slot {slot_id} is not open; it cannot end as {reason}")
        self._in[slot.state] -= 1
        self.ended[reason] += 1
        self._on_close(
            Closed(
                slot=slot.id,
                epoch=slot.prompt.epoch,
                prompt=slot.prompt.index,
                end=reason,
                attempts=slot.attempt,
                admitted_version=slot.admitted_version,
                version=version,
            )
        )
