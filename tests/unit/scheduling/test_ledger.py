"""Every prompt is somewhere, exactly once, and leaves in the order that bounds its age."""

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlsys.errors import LedgerError
from rlsys.scheduling.ledger import Closed, End, Ledger, State
from tests.fakes import make_prompt


def filled(slots: int, *, window: int = 1) -> Ledger:
    """A ledger full of slots 0, 1, … in flight in their first attempt."""
    ledger = Ledger(capacity=slots, window=window)
    for index in range(slots):
        slot = ledger.admit(make_prompt(index), 0)
        assert ledger.start(slot.id, "a") == 1
    return ledger


def finish(ledger: Ledger, *slots: int) -> None:
    for slot in slots:
        assert ledger.finish(slot, 1)


def taken(ledger: Ledger, groups: int) -> list[int]:
    return [slot.id for slot in ledger.take_batch(groups)]


def by_definition(states: dict[int, State], window: int) -> list[int]:
    """The slots that may be learned from, in order: W = `window` counts from the oldest one not yet picked."""
    picked: list[int] = []
    while left := [
        slot for slot, state in sorted(states.items()) if state is not State.LEARNING and slot not in picked
    ]:
        reachable = [slot for slot in left if slot < left[0] + window and states[slot] is State.FINISHED]
        if not reachable:
            break
        picked.append(reachable[0])
    return picked


# Nothing vanishes


class RandomUse(RuleBasedStateMachine):
    """Any sequence of calls; `model` says for each open slot where it is, `ended` how the others ended."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[Closed] = []
        self.ledger = Ledger(capacity=5, window=2, on_close=self.closed.append, first_id=7)
        self.model: dict[int, State] = {}
        self.attempts: dict[int, int] = {}
        self.ended: dict[int, End] = {}
        self.admitted = 0

    def slots_in(self, *states: State) -> list[int]:
        return [slot for slot, state in self.model.items() if state in states]

    @precondition(lambda self: len(self.model) < 5)
    @rule()
    def admit(self) -> None:
        slot = self.ledger.admit(make_prompt(self.admitted), 0)
        assert slot.id == 7 + self.admitted
        self.admitted += 1
        self.model[slot.id], self.attempts[slot.id] = State.WAITING, 0

    @precondition(lambda self: len(self.model) == 5)
    @rule()
    def admit_without_room(self) -> None:
        with pytest.raises(LedgerError, match="all 5 slots are taken"):
            self.ledger.admit(make_prompt(99), 0)

    @precondition(lambda self: self.slots_in(State.WAITING))
    @rule()
    def start(self) -> None:
        slot = self.ledger.next_waiting()
        assert slot is not None
        assert slot.id == min(self.slots_in(State.WAITING))
        self.attempts[slot.id] += 1
        assert self.ledger.start(slot.id, "a") == self.attempts[slot.id]
        self.model[slot.id] = State.IN_FLIGHT

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), what=st.sampled_from(["finish", "retry", "fail"]), late=st.integers(0, 2))
    def hear_of_an_attempt(self, data: st.DataObject, what: str, late: int) -> None:
        """Of any slot ever admitted and any attempt, current or `late`, once or again."""
        slot = data.draw(st.sampled_from(sorted(self.attempts)))
        attempt = self.attempts[slot] - late
        current = late == 0 and self.model.get(slot) is State.IN_FLIGHT
        if what == "fail":
            assert self.ledger.fail(slot, attempt, End.FAILED_REWARD, 3) is current
        else:
            assert getattr(self.ledger, what)(slot, attempt) is current
        if current and what == "fail":
            del self.model[slot]
            self.ended[slot] = End.FAILED_REWARD
        elif current:
            self.model[slot] = State.FINISHED if what == "finish" else State.WAITING

    @rule(groups=st.integers(1, 3))
    def take(self, groups: int) -> None:
        allowed = by_definition(self.model, window=2)
        assert self.ledger.batch_ready(groups) is (len(allowed) >= groups)
        if len(allowed) < groups:
            with pytest.raises(LedgerError):
                self.ledger.take_batch(groups)
            return
        chosen = taken(self.ledger, groups)
        assert chosen == allowed[:groups]
        for slot in chosen:
            assert self.model[slot] is State.FINISHED
            self.model[slot] = State.LEARNING

    @precondition(lambda self: self.slots_in(State.LEARNING))
    @rule()
    def commit(self) -> None:
        learning = self.slots_in(State.LEARNING)
        self.ledger.commit(learning, 4)
        for slot in learning:
            del self.model[slot]
            self.ended[slot] = End.TRAINED

    @precondition(lambda self: self.slots_in(State.LEARNING))
    @rule()
    def restart(self) -> None:
        learning = self.slots_in(State.LEARNING)
        self.ledger.restart(learning)
        self.model |= dict.fromkeys(learning, State.WAITING)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), reason=st.sampled_from([end for end in End if end is not End.TRAINED]))
    def end(self, data: st.DataObject, reason: End) -> None:
        slot = data.draw(st.sampled_from(sorted(self.model)))
        self.ledger.end(slot, reason, 5)
        del self.model[slot]
        self.ended[slot] = reason

    @invariant()
    def admitted_is_open_plus_ended(self) -> None:
        counts = self.ledger.counts()
        assert counts["admitted"] == self.admitted == len(self.model) + len(self.ended)
        assert counts["lost"] == 0
        assert {state: counts[state] for state in State} == {state: len(self.slots_in(state)) for state in State}
        ends = list(self.ended.values())
        assert {end: counts[end] for end in End} == {end: ends.count(end) for end in End}

    @invariant()
    def open_slots_stand_in_order_of_admission(self) -> None:
        assert [(slot.id, slot.state) for slot in self.ledger.open] == sorted(self.model.items())

    @invariant()
    def every_end_is_told_once(self) -> None:
        assert {row.slot: row.end for row in self.closed} == self.ended
        assert len(self.closed) == len(self.ended)


RandomUse.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestNothingVanishes = RandomUse.TestCase


def test_the_row_of_an_end_says_what_it_was_and_how_it_went() -> None:
    rows: list[Closed] = []
    ledger = Ledger(capacity=1, on_close=rows.append, first_id=40)
    slot = ledger.admit(make_prompt(11, epoch=2), 5)
    ledger.start(slot.id, "a")
    ledger.retry(slot.id, 1)
    ledger.start(slot.id, "b")
    ledger.finish(slot.id, 2)
    ledger.take_batch(1)
    ledger.commit([slot.id], 9)
    row = Closed(slot=40, epoch=2, prompt=11, end=End.TRAINED, attempts=2, admitted_version=5, version=9)
    assert rows == [row]
    assert ledger.next_id == 41


# Late and repeated news


def test_a_result_delivered_twice_counts_once() -> None:
    ledger = filled(1)
    assert ledger.finish(0, 1)
    assert not ledger.finish(0, 1)
    assert taken(ledger, 1) == [0]
    assert not ledger.finish(0, 1)
    ledger.commit([0], 1)
    assert not ledger.finish(0, 1)
    assert ledger.counts()["trained"] == 1


def test_news_of_an_earlier_attempt_is_fenced_off() -> None:
    ledger = filled(1)
    assert ledger.retry(0, 1)
    assert ledger.start(0, "b") == 2
    assert not ledger.finish(0, 1)
    assert not ledger.retry(0, 1)
    assert not ledger.fail(0, 1, End.FAILED_REWARD, 0)
    assert ledger.open[0].state is State.IN_FLIGHT
    assert ledger.open[0].worker == "b"
    assert ledger.finish(0, 2)


def test_a_returned_slot_is_given_out_before_younger_ones() -> None:
    ledger = filled(3)
    for slot in (2, 0):
        assert ledger.retry(slot, 1)
    order = []
    while (waiting := ledger.next_waiting()) is not None:
        order.append(waiting.id)
        ledger.start(waiting.id, "b")
    assert order == [0, 2]


# Order and window


def test_window_1_trains_in_order_of_admission_whatever_finishes_first() -> None:
    ledger = filled(4)
    finish(ledger, 3, 2, 1)
    assert not ledger.batch_ready(1)
    finish(ledger, 0)
    assert taken(ledger, 3) == [0, 1, 2]
    assert taken(ledger, 1) == [3]


def test_window_3_lets_two_slots_overtake_the_oldest_and_no_third() -> None:
    ledger = filled(6, window=3)
    finish(ledger, 1, 2, 3, 4, 5)
    assert not ledger.batch_ready(3)  # 3 is as far from 0 as the window is wide
    assert taken(ledger, 2) == [1, 2]
    assert not ledger.batch_ready(1)
    finish(ledger, 0)
    assert taken(ledger, 4) == [0, 3, 4, 5]


def test_the_window_counts_from_the_oldest_of_several_unfinished_slots() -> None:
    ledger = filled(6, window=3)
    finish(ledger, 2, 3, 4)
    assert not ledger.batch_ready(2)  # 1 is unfinished too, but 0 is the oldest
    assert taken(ledger, 1) == [2]


def test_every_pick_of_the_oldest_moves_the_window() -> None:
    ledger = filled(6, window=3)
    finish(ledger, 0, 2, 3, 5)
    assert taken(ledger, 3) == [0, 2, 3]  # 0 is picked, so 1 is the oldest: 2 and 3 may pass it, 5 may not
    assert not ledger.batch_ready(1)


def test_slots_being_learned_do_not_hold_the_window_back() -> None:
    ledger = filled(4, window=2)
    finish(ledger, 0, 1, 3)
    assert taken(ledger, 2) == [0, 1]
    assert taken(ledger, 1) == [3]  # 2 is the oldest now
    assert not ledger.batch_ready(1)


def test_a_failed_slot_makes_way() -> None:
    ledger = filled(3)
    finish(ledger, 1, 2)
    assert not ledger.batch_ready(2)
    assert ledger.fail(0, 1, End.FAILED_ROLLOUT, 0)
    assert taken(ledger, 2) == [1, 2]


def test_a_batch_asked_for_too_early_changes_nothing() -> None:
    ledger = filled(2)
    finish(ledger, 0)
    with pytest.raises(LedgerError, match="only 1 of 2 groups"):
        ledger.take_batch(2)
    assert ledger.open[0].state is State.FINISHED


# Illegal transitions


def test_transitions_that_would_lose_or_repeat_a_sample_are_refused() -> None:
    ledger = filled(2)
    finish(ledger, 0)
    with pytest.raises(LedgerError, match="slot 0 is finished, expected waiting"):
        ledger.start(0, "b")
    with pytest.raises(LedgerError, match="slot 0 is finished, expected learning"):
        ledger.commit([0], 1)
    with pytest.raises(LedgerError, match="slots are trained through commit"):
        ledger.end(0, End.TRAINED, 1)
    ledger.take_batch(1)
    ledger.commit([0], 1)
    for again in (lambda: ledger.commit([0], 1), lambda: ledger.end(0, End.REJECTED_STALE, 1)):
        with pytest.raises(LedgerError, match="slot 0 is not open"):
            again()
    with pytest.raises(LedgerError, match="slot 9 is not open"):
        ledger.start(9, "b")


@pytest.mark.parametrize(("capacity", "window"), [(0, 1), (1, 0)])
def test_a_ledger_without_slots_or_window_is_refused(capacity: int, window: int) -> None:
    with pytest.raises(LedgerError, match=f"capacity={capacity} and window={window} must be at least 1"):
        Ledger(capacity=capacity, window=window)


def test_an_event_costs_no_more_in_a_large_ledger() -> None:
    """2048 slots that finish youngest first: scanning them at every event took 0.8 ms each, now some microseconds."""
    ledger = filled(2048)
    start = time.process_time()
    for slot in reversed(range(2048)):
        ledger.finish(slot, 1)
        assert ledger.next_waiting() is None
        assert ledger.batch_ready(512) is (slot == 0)
    assert (time.process_time() - start) / 2048 < 200e-6
