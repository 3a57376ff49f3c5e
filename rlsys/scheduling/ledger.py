"""The one place that knows where every prompt is.

A prompt holds a slot from admission to a *named* end; nothing vanishes and nothing is counted twice.

    admit            start               finish            take_batch          end(TRAINED)
      ──► WAITING ──────────► IN_FLIGHT ──────────► FINISHED ──────────► LEARNING ──────────► end
             ▲                    │                     │
             └────── retry ───────┘                     └──── end(REJECTED_…, FAILED_…) ───► end

With P groups per step, at most B slots and a completion window W, a slot is consumed at most
⌊(B+W-2)/P⌋ learner steps after its admission: older slots number at most B-1, and only the W-1 admitted
right behind the oldest open one may overtake it. That bounds staleness by construction.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

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
        self._capacity = capacity
        self._window = window
        self._on_close = on_close
        self._next = first_id
        self._slots: dict[int, Slot] = {}
        self.admitted = 0
        self.ended: dict[End, int] = dict.fromkeys(End, 0)

    @property
    def has_room(self) -> bool:
        """Whether another prompt may be admitted."""
        return len(self._slots) < self._capacity

    @property
    def open(self) -> tuple[Slot, ...]:
        """All open slots in admission order."""
        return tuple(self._slots.values())

    def counts(self) -> dict[str, int]:
        """Open slots by state, ended ones by reason, and `lost`, which is 0 unless the ledger is broken."""
        counts = {state.value: 0 for state in State} | {end.value: count for end, count in self.ended.items()}
        for slot in self._slots.values():
            counts[slot.state.value] += 1
        lost = self.admitted - len(self._slots) - sum(self.ended.values())
        return counts | {"admitted": self.admitted, "lost": lost}

    def admit(self, prompt: Prompt, version: PolicyVersion) -> Slot:
        """Give a prompt a slot. Raises `LedgerError` when there is no room."""
        if not self.has_room:
            raise LedgerError(f"all {self._capacity} slots are taken")
        slot = Slot(self._next, prompt, version)
        self._slots[slot.id] = slot
        self._next += 1
        self.admitted += 1
        return slot

    def next_waiting(self) -> Slot | None:
        """The oldest slot nobody works on."""
        return next((slot for slot in self._slots.values() if slot.state is State.WAITING), None)

    def start(self, slot_id: int, worker: str) -> int:
        """A worker begins an attempt; returns its number, which fences off late results of earlier ones."""
        slot = self._require(slot_id, State.WAITING)
        slot.state, slot.worker = State.IN_FLIGHT, worker
        slot.attempt += 1
        return slot.attempt

    def finish(self, slot_id: int, attempt: int) -> bool:
        """The responses of an attempt arrived with their rewards. False: a repeated or outdated delivery."""
        slot = self._slots.get(slot_id)
        if slot is None or slot.attempt != attempt or slot.state is not State.IN_FLIGHT:
            return False
        slot.state = State.FINISHED
        return True

    def retry(self, slot_id: int, attempt: int) -> bool:
        """An attempt was lost (its worker died); the slot waits again. False: outdated news."""
        slot = self._slots.get(slot_id)
        if slot is None or slot.attempt != attempt or slot.state is not State.IN_FLIGHT:
            return False
        slot.state, slot.worker = State.WAITING, None
        return True

    def batch_ready(self, groups: int) -> bool:
        """Whether `take_batch(groups)` would return a batch."""
        return len(self._eligible(groups)) == groups

    def take_batch(self, groups: int) -> list[Slot]:
        """The next `groups` finished slots in admission order, looking at most `window` places ahead."""
        chosen = self._eligible(groups)
        if len(chosen) < groups:
            raise LedgerError(f"only {len(chosen)} of {groups} groups are finished within the window")
        for slot in chosen:
            slot.state = State.LEARNING
        return chosen

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
        """Finished slots that may be learned from now. Each pick moves the window behind the oldest unpicked slot."""
        chosen: list[Slot] = []
        unpicked = [slot for slot in self._slots.values() if slot.state is not State.LEARNING]
        head = 0
        picked: set[int] = set()
        for slot in unpicked:
            while head < len(unpicked) and unpicked[head].id in picked:
                head += 1
            if len(chosen) == groups or (head < len(unpicked) and slot.id >= unpicked[head].id + self._window):
                break
            if slot.state is State.FINISHED:
                chosen.append(slot)
                picked.add(slot.id)
        return chosen

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
