"""A trace can be opened by anyone: valid JSON when a run ended, readable while it lives, continued by a resumed run."""

import json
import threading
import time
from pathlib import Path

from rlsys.observability.spans import KEPT, Span, SpanLog
from rlsys.observability.trace import TraceWriter, read_trace


def write(path: Path, *names: str, role: str = "rollout-0", close: bool = True) -> TraceWriter:
    trace = TraceWriter(path)
    trace.spans(role, [Span(name=name, start=10.0 + i, end=10.5 + i, facts={"n": i}) for i, name in enumerate(names)])
    if close:
        trace.close()
    return trace


def test_a_finished_trace_is_json_with_one_process_per_role_and_times_in_microseconds(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.json", "generate", close=False)
    trace.spans("learner", [Span(name="step", start=11.0, end=11.25, track=2, facts={"version": 3})])
    trace.instant("alarms", "ess_low", 12.0, {"step": 3})
    trace.close()
    names, generate, _, step, _, alarm, _ = json.loads((tmp_path / "trace.json").read_text())
    assert names == {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "rollout-0"}}
    expected = {"ph": "X", "cat": "rollout", "name": "generate", "pid": 1, "tid": 0}
    assert generate == {**expected, "ts": 10_000_000, "dur": 500_000, "args": {"n": 0}}
    assert (step["pid"], step["tid"], step["dur"], step["args"]) == (2, 2, 250_000, {"version": 3})
    assert (alarm["ph"], alarm["name"], alarm["ts"]) == ("i", "ess_low", 12_000_000)


def test_a_living_trace_can_be_read_and_so_can_one_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write(path, "generate", "pause", close=False)
    assert [event["name"] for event in read_trace(path)] == ["process_name", "generate", "pause"]
    path.write_text(path.read_text()[:-20])
    assert [event["name"] for event in read_trace(path)] == ["process_name", "generate"]
    assert read_trace(tmp_path / "none.json") == []


def test_a_resumed_run_continues_its_trace_with_the_same_processes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write(path, "generate")
    write(path, "pause")
    write(path, "step", role="learner")
    events = json.loads(path.read_text())
    assert [event["name"] for event in events if event["ph"] == "X"] == ["generate", "pause", "step"]
    assert [event["pid"] for event in events if event["ph"] == "X"] == [1, 1, 2]
    assert sum(event["name"] == "end_of_trace" for event in events) == 1


def test_work_at_the_same_time_gets_tracks_of_its_own_and_a_free_track_is_used_again() -> None:
    log = SpanLog()
    with log.span("a"):
        with log.span("b", groups=2):
            pass
        with log.span("c"):
            pass
    assert [(span.name, span.track, dict(span.facts)) for span in log.take()] == [
        ("b", 1, {"groups": 2}),
        ("c", 1, {}),
        ("a", 0, {}),
    ]
    assert log.take() == []


def test_work_that_fails_is_noted_too() -> None:
    log, before = SpanLog(), time.time()
    try:
        with log.span("score"):
            raise ValueError
    except ValueError:
        pass
    (span,) = log.take()
    assert before <= span.start <= span.end <= time.time()


def test_a_log_that_nobody_reads_stays_small() -> None:
    log = SpanLog()
    for i in range(KEPT + 5):
        log.add("x", i, i + 1)
    spans = log.take()
    assert (len(spans), spans[0].start) == (KEPT, 5)


def test_threads_lose_no_span() -> None:
    log = SpanLog()

    def work() -> None:
        for _ in range(200):
            with log.span("x"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.take()) == 800
