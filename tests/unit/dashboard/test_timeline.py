"""Shares of time add up to what the trace holds, however its intervals overlap."""

import pytest

from rlsys.dashboard.timeline import Spans, Timeline
from tests.made_run import PROCESSES, events, names


def covered(*spans: tuple[float, float], edges: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0)) -> list[float]:
    found = Spans()
    for start, stop in spans:
        found.add(start, stop)
    return found.covered(edges).tolist()  # type: ignore[arg-type]


def test_overlapping_intervals_count_once() -> None:
    assert covered((0.5, 2.5), (1.0, 2.0), (2.25, 2.75)) == pytest.approx([0.5, 1.0, 0.75, 0.0])
    assert covered((1.0, 2.0), (1.0, 2.0)) == pytest.approx([0, 1, 0, 0])


def test_intervals_in_any_order_and_without_length_do_no_harm() -> None:
    assert covered((3.0, 3.5), (0.0, 1.0), (2.0, 2.0)) == pytest.approx([1, 0, 0, 0.5])
    assert covered((-5.0, 0.5), (3.5, 9.0)) == pytest.approx([0.5, 0, 0, 0.5])


def made(steps: int) -> Timeline:
    timeline = Timeline()
    for event in [*names(), *(event for step in range(1, steps + 1) for event in events(step))]:
        timeline.add(event)
    return timeline


def test_lanes_are_in_the_order_a_token_travels_and_tell_their_shares() -> None:
    page = made(4).window(None, None)
    assert [lane["name"] for lane in page["lanes"]] == list(PROCESSES[:4])  # the controller did nothing
    assert page["duration"] == pytest.approx(1.95)
    totals = {name: state["total"] for name, state in page["lanes"][0]["states"].items()}
    assert totals == pytest.approx({"generate": 1.2 / 1.95, "pause": 0.2 / 1.95}, abs=1e-3)
    assert {len(state["share"]) for lane in page["lanes"] for state in lane["states"].values()} == {600}


def test_a_window_shows_only_its_time() -> None:
    page = made(4).window(0.0, 0.3, bins=6)
    assert page["lanes"][0]["states"]["generate"]["share"] == [100] * 6
    assert page["lanes"][3]["states"]["step"]["share"] == [0, 0, 0, 0, 100, 100]
    assert (page["start"], page["stop"]) == (0.0, 0.3)


def test_versions_are_those_served_and_learned_at_the_time() -> None:
    lines = {line["name"]: line["values"] for line in made(4).window(0.0, None)["versions"]}
    assert list(lines) == ["learner", "rollout-0", "rollout-1"]
    assert lines["learner"][0] is None  # nothing was learned yet
    assert (lines["learner"][-1], lines["rollout-0"][-1], lines["rollout-1"][-1]) == (4, 3, 2)


def test_what_is_no_interval_is_passed_over_and_no_trace_is_an_empty_page() -> None:
    timeline = Timeline()
    for event in ({"ph": "i", "pid": 1, "ts": 1}, {"ph": "X", "pid": "a"}, {"ph": "X", "pid": 1, "ts": None}, {}):
        timeline.add(event)
    assert len(timeline) == 0
    assert timeline.window(None, None)["lanes"] == []
