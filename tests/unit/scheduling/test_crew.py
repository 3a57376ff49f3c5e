"""Membership of a role: who is started, who goes, and when it is given up."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import ConfigError
from rlsys.scheduling.crew import LONGEST_WAIT_S, SETTLED_S, Crew, Dismiss, Stage, Start, WorkerCounts


def crew(*present: str, **changed: Any) -> Crew:
    return Crew("rollout", present, **{"most": 8, "max_restarts": 3, "backoff_s": 1.0, **changed})


def counts(crew: Crew) -> tuple[int, int, int]:
    return crew.counts.desired, crew.counts.ready, crew.counts.restarts


def test_it_begins_with_what_is_present_and_nothing_to_do() -> None:
    one = crew("rollout-0", "rollout-1")
    assert one.counts == WorkerCounts(desired=2, ready=2, restarts=0)
    assert not one.is_off(0.0)
    assert one.due(0.0) == []


def test_missing_workers_are_started_once_with_names_and_seats_of_their_own() -> None:
    one = crew("rollout-0")
    one.ask(3)
    assert one.is_off(0.0)
    assert one.due(0.0) == [Start("rollout-1", 1, 1), Start("rollout-2", 2, 2)]
    assert one.due(0.0) == []
    assert counts(one) == (3, 1, 0)
    one.joined("rollout-1", 5.0)
    assert counts(one) == (3, 2, 0)


def test_who_has_not_joined_goes_first_then_who_came_last() -> None:
    one = crew("rollout-0")
    one.ask(4)
    one.due(0.0)
    one.joined("rollout-2", 0.0)
    one.joined("rollout-3", 0.0)
    one.ask(1)
    assert one.due(0.0) == [Dismiss("rollout-1", False), Dismiss("rollout-3", True), Dismiss("rollout-2", True)]
    assert counts(one) == (1, 1, 0)
    assert one.due(0.0) == []


def test_a_name_is_never_used_again_and_a_seat_once_it_is_free() -> None:
    one = crew("rollout-0", "rollout-1")
    one.ask(1)
    assert one.due(0.0) == [Dismiss("rollout-1", True)]
    one.ask(2)
    assert one.due(0.0) == [Start("rollout-2", 2, 2)], "rollout-1 still sits there"
    one.left("rollout-1")
    one.ask(3)
    assert one.due(0.0) == [Start("rollout-3", 3, 1)]


@pytest.mark.parametrize("count", [0, -1, 9, 1.5, True, "2"])
def test_an_impossible_number_is_refused_with_what_is_allowed(count: Any) -> None:
    one = crew("rollout-0")
    with pytest.raises(ConfigError, match=r"rollout workers: .*: must be a whole number from 1 to 8 \(scaling\.rollo"):
        one.ask(count)
    assert one.desired == 1


def test_a_dead_worker_that_had_worked_is_replaced_at_once_and_counted() -> None:
    one = crew("rollout-0")
    assert one.died("rollout-0", 100.0)
    assert counts(one) == (1, 0, 0)
    assert one.due(100.0) == [Start("rollout-1", 1, 0)]
    assert counts(one) == (1, 0, 1)


def test_the_death_of_one_that_was_to_go_or_is_gone_is_no_news() -> None:
    one = crew("rollout-0", "rollout-1")
    one.ask(1)
    one.due(0.0)
    assert not one.died("rollout-1", 0.0)
    one.left("rollout-1")
    assert not one.died("rollout-1", 0.0)
    assert not one.died("never", 0.0)
    assert counts(one) == (1, 1, 0)


def test_who_dies_young_waits_twice_as_long_each_time_until_it_is_given_up() -> None:
    one, now, waits = crew("rollout-0"), 100.0, []
    one.died("rollout-0", now)
    while not one.given_up:
        (start,) = one.due(now)
        assert isinstance(start, Start)
        one.died(start.name, now)
        waits.append(one.wait_s(now))
        assert one.due(now + waits[-1] - 0.01) == []
        now += waits[-1]
    assert waits == [1, 2, 4, 8]  # three may die in a row, the fourth is one too many
    assert one.deaths_in_a_row == 4


def test_a_wait_has_an_end() -> None:
    one = crew("rollout-0", max_restarts=100)
    one.died("rollout-0", 0.0)
    for start in range(1, 50):
        one.due(1000.0 * start)
        one.died(f"rollout-{start}", 1000.0 * start)
    assert one.wait_s(49000.0) == LONGEST_WAIT_S


def test_a_replacement_that_worked_for_long_enough_ends_the_row() -> None:
    one = crew("rollout-0")
    one.died("rollout-0", 100.0)
    one.due(100.0)
    one.died("rollout-1", 100.0)
    one.due(101.0)
    one.joined("rollout-2", 102.0)
    assert one.died("rollout-2", 102.0 + SETTLED_S)
    assert one.deaths_in_a_row == 0
    assert one.wait_s(132.0) == 0


def test_workers_that_were_there_before_do_not_end_the_row() -> None:
    one = crew("rollout-0")
    one.ask(2)
    for start in range(1, 5):
        one.due(1000.0 * start)
        one.died(f"rollout-{start}", 1000.0 * start)
    assert one.given_up


def test_who_asks_again_is_tried_again_at_once() -> None:
    one = crew("rollout-0", max_restarts=0)
    one.ask(2)
    one.due(0.0)
    one.died("rollout-1", 0.0)
    was_given_up = one.given_up
    one.settle_for_less()
    assert counts(one) == (1, 1, 0)
    assert not one.is_off(1000.0)
    one.ask(2)
    assert (was_given_up, one.given_up) == (True, False)
    assert one.due(0.0) == [Start("rollout-2", 2, 1)]
    assert counts(one) == (2, 1, 0)


@given(st.lists(st.tuples(st.sampled_from(["ask", "join", "die", "leave", "tick"]), st.integers(0, 7)), max_size=60))
def test_whatever_happens_the_members_tend_to_the_number_desired(moves: list[tuple[str, int]]) -> None:
    one, now, names, restarts = crew("rollout-0", max_restarts=10**6), 0.0, {"rollout-0"}, 0
    for move, number in moves:
        members = list(one.members.values())
        chosen = members[number % len(members)] if members else None
        match move:
            case "ask":
                one.ask(number + 1)
            case "join" if chosen and chosen.stage is Stage.JOINING:
                one.joined(chosen.name, now)
            case "die" if chosen:
                restarts += one.died(chosen.name, now)
            case "leave" if chosen and chosen.stage is Stage.LEAVING:
                one.left(chosen.name)
            case "tick":
                now += 10.0 * number
        due = one.due(now)
        started = [action.name for action in due if isinstance(action, Start)]
        assert not names & set(started), "a name was used twice"
        names |= set(started)
        assert len({member.seat for member in one.members.values()}) == len(one.members)
        assert one.due(now) == [], "it was done already"
        assert not one.is_off(now)
        assert one.counts.ready <= one.desired
        assert one.counts.restarts <= restarts
    one.due(now + LONGEST_WAIT_S)
    assert len(one.present) == one.desired
