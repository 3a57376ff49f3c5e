"""A run is what its files say: how far it is, whether it goes on, what is wrong with it."""

import os
import time
from pathlib import Path

import pytest

from rlsys.dashboard.run import Run, as_json, find_run, standing
from rlsys.errors import ConfigError
from tests.made_run import STARTED, add_step, append, make_run, raise_alarm


def opened(path: Path) -> Run:
    run = Run(path)
    run.refresh()
    return run


def test_a_finished_run_says_so_and_counts_its_slots(tmp_path: Path) -> None:
    summary = opened(make_run(tmp_path / "run", 6)).summary()
    assert (summary["phase"], summary["step"], summary["steps"]) == ("finished", 6, 6)
    assert summary["ledger"]["ends"] == {"trained": 11, "rejected_stale": 1}
    assert summary["ledger"]["open"] == {"waiting": 1, "in_flight": 3, "finished": 2, "learning": 0}
    assert summary["accuracy"] == {"first": 0.25, "last": 0.55}
    assert (summary["started"], summary["elapsed"]) == (STARTED + 0.1, pytest.approx(3.0))
    assert (summary["recorded"], summary["bound"]) == (6, 4)


def test_a_run_that_is_written_to_is_running_and_one_left_alone_is_stale(tmp_path: Path) -> None:
    run = opened(make_run(tmp_path / "run", 3, planned=9))
    assert run.summary()["phase"] == "running"
    long_ago = time.time() - 3600
    for path in [*(tmp_path / "run").rglob("*"), tmp_path / "run"]:
        os.utime(path, (long_ago, long_ago))
    assert run.summary()["phase"] == "stale"


def test_a_run_of_slow_steps_is_given_the_time_of_a_few(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 3, planned=9)
    append(root / "metrics.jsonl", {"step": 4, "time": STARTED + 9, "reward/mean": 0.5, "throughput/step_s": 600.0})
    run = opened(root)
    for minutes, phase in ((40, "running"), (60, "stale")):
        then = time.time() - 60 * minutes
        for path in [*root.rglob("*"), root]:
            os.utime(path, (then, then))
        assert run.summary()["phase"] == phase


def test_a_run_that_has_reported_nothing_is_starting(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 0, planned=9, trace=False)
    (root / "metrics.jsonl").unlink()
    assert opened(root).summary()["phase"] == "starting"


def test_steps_that_come_later_are_seen_without_opening_the_run_again(tmp_path: Path) -> None:
    run = opened(make_run(tmp_path / "run", 3, planned=9))
    events = len(run.timeline)
    add_step(tmp_path / "run", 4)
    run.refresh()
    assert (run.summary()["step"], run.summary()["recorded"]) == (4, 4)
    assert len(run.timeline) == events + 7


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 5, planned=9)
    run = opened(root)
    run.directory.rewind(2)
    run.refresh()
    assert run.summary()["step"] == 2
    assert run.generation == 1
    assert run.rollouts.steps == [1, 2]
    assert sum(run.ends.values()) == 4


def test_an_alarm_stands_until_it_is_cleared_and_the_worst_comes_first(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 5)
    raise_alarm(root)
    raise_alarm(root, name="nan", severity="critical", value=None)
    raise_alarm(root, name="k3_high")
    raise_alarm(root, name="k3_high", state="cleared", step=5)
    run = opened(root)
    assert [alarm["name"] for alarm in standing(run.notes)] == ["nan", "ess_low"]
    assert len(run.summary()["history"]) == 4
    raise_alarm(root, state="cleared", step=6)
    run.refresh()
    assert [alarm["name"] for alarm in run.summary()["alarms"]] == ["nan"]


def test_a_directory_with_only_a_configuration_is_a_run_without_steps(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("not: a configuration of this version\n")
    summary = opened(root).summary()
    assert (summary["step"], summary["steps"], summary["elapsed"], summary["alarms"]) == (0, None, None, [])
    assert opened(root).settings() == {}


def test_a_run_is_found_by_path_and_by_name_and_a_mistake_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run(tmp_path / "runs" / "first", 1)
    monkeypatch.chdir(tmp_path)
    assert find_run("first") == find_run(str(root)) == find_run("runs/first") == root
    with pytest.raises(ConfigError, match="no such run directory, nor runs/secnd; runs has first"):
        find_run("secnd")
    with pytest.raises(ConfigError, match=r"holds no run: .*; runs has first"):
        find_run("runs")


def test_what_json_cannot_say_becomes_null() -> None:
    assert as_json({"a": [float("nan"), 1.5], "b": float("-inf")}) == '{"a":[null,1.5],"b":null}'
