"""A tracker holds what the run wrote, goes on where it was, and may break without breaking anything else."""

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlsys.control.preflight import check_config
from rlsys.errors import ConfigError
from rlsys.observability import trackers
from rlsys.observability.catalogue import CATALOGUE, PARTS
from rlsys.observability.run_directory import RunDirectory, read_jsonl
from rlsys.observability.sinks import RunJournal
from rlsys.observability.trackers import Tracker, flatten, mlflow_name, require_trackers
from tests.fakes import make_config

NAMES = [
    *CATALOGUE,
    *(
        f"{n}/{kind}/{part}"
        for kind, parts in PARTS.items()
        for n, m in CATALOGUE.items()
        if getattr(m, kind)
        for part in parts
    ),
]
"""Every name a run may write."""

# -- the real ones, in two processes as a run and its continuation are, offline ---------------------------------------

WRITE = """
import json, socket, sys
from pathlib import Path
from rlsys.config import parse_config
from rlsys.observability.run_directory import RunDirectory
from rlsys.observability.sinks import RunJournal

calls = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        unix = arguments[0].family == socket.AF_UNIX
        calls.append([event, "unix" if unix else str(arguments[1][0])])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        calls.append([event, str(arguments[0])])
sys.addaudithook(watch)

config = parse_config({"task": {"name": "arithmetic"}, "name": "a run", "run_dir": sys.argv[1]},
                      ["observability.sinks=[wandb,mlflow,trackio]", "observability.project=proj",
                       "observability.prometheus=false", sys.argv[2]])
journal = RunJournal(RunDirectory(config.path), config)
for step, metrics in json.loads(sys.stdin.read()):
    journal.step(step, metrics)
journal.close()
"""

CALLS = """
print("\\n" + json.dumps({"calls": calls}))
"""

READ = """
from mlflow.tracking import MlflowClient
client = MlflowClient((config.path / "trackers" / "mlflow").as_uri())
(experiment,) = [e for e in client.search_experiments() if e.name == "proj"]
runs = client.search_runs([experiment.experiment_id])
mlflow = {
    "runs": len(runs), "status": runs[0].info.status, "name": runs[0].info.run_name, "params": runs[0].data.params,
    "metrics": {name: [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, name)]
                for name in runs[0].data.metrics},
}
import trackio
from trackio.sqlite_storage import SQLiteStorage
runs = trackio.Api().runs("proj")
trackio = {"runs": len(runs), "config": runs[0].config, "rows": SQLiteStorage.get_logs("proj", run_id=runs[0].id)}
print("\\n" + json.dumps({"mlflow": mlflow, "trackio": trackio, "calls": calls}))
"""

HERE = {"unix", "localhost", "127.0.0.1", "::1", "None"}
"""Where a call that leaves no machine goes; the name None is the wildcard address."""


def process(code: str, directory: Path, override: str, rows: list[Any]) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
    home = {"HOME": str(directory / "home"), "HF_HOME": str(directory / "home"), "PYTHONPATH": str(Path.cwd())}
    arguments = [sys.executable, "-c", code, str(directory), override]
    done = subprocess.run(
        arguments, input=json.dumps(rows), capture_output=True, text=True, check=False, env=clean | home, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    """A run with an evaluation that came late, and its continuation with another learning rate."""
    root = tmp_path_factory.mktemp("tracked")
    everything = {name: 0.5 * i for i, name in enumerate(NAMES)}
    late = [3, {"eval/accuracy": 0.75}]
    first = process(
        WRITE + CALLS,
        root,
        "learner.lr=0.25",
        [[2, everything], [4, {"reward/mean": 0.5, "importance/k3/by_staleness/4+": None}], late],
    )
    second = process(WRITE + READ, root, "learner.lr=0.5", [[5, {"reward/mean": 0.625}]])
    before, found = (json.loads(out.splitlines()[-1]) for out in (first, second))
    return RunDirectory(root / "a run"), found | {"calls": [before["calls"], found["calls"]]}


def test_a_run_and_its_continuation_are_one_mlflow_run(tracked: tuple[RunDirectory, dict[str, Any]]) -> None:
    mlflow = tracked[1]["mlflow"]
    assert (mlflow["runs"], mlflow["status"], mlflow["name"]) == (1, "FINISHED", "a run")
    assert mlflow["params"]["learner.lr"] == "0.25"
    metrics = mlflow["metrics"]
    assert metrics["reward/mean"] == [[2, 0.0], [4, 0.5], [5, 0.625]]
    assert [3, 0.75] in metrics["eval/accuracy"]
    i = NAMES.index("importance/k3/by_staleness/4+")
    assert metrics["importance/k3.by_staleness/4plus"] == [[2, 0.5 * i]]
    assert len(metrics) == len(NAMES)


def test_a_run_and_its_continuation_are_one_trackio_run(tracked: tuple[RunDirectory, dict[str, Any]]) -> None:
    trackio = tracked[1]["trackio"]
    assert trackio["runs"] == 1
    assert trackio["config"]["learner"]["lr"] == 0.5
    rows = {row["step"]: row for row in trackio["rows"]}
    assert sorted(rows) == [2, 3, 4, 5]
    assert all(rows[2][name] == 0.5 * i for i, name in enumerate(NAMES))
    assert rows[3]["eval/accuracy"] == 0.75
    assert "importance/k3/by_staleness/4+" not in rows[4]
    assert rows[5]["reward/mean"] == 0.625


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline datastore: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a header does not cross a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_a_run_and_its_continuation_have_one_wandb_identity(tracked: tuple[RunDirectory, dict[str, Any]]) -> None:
    directory = tracked[0]
    rows, identities, configs = list[dict[str, Any]](), set[str](), list[float]()
    for path in sorted(directory.trackers.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                assert (record.run.project, record.run.display_name) == ("proj", "a run")
                identities.add(record.run.run_id)
                configs += [json.loads(c.value_json)["lr"] for c in record.run.config.update if c.key == "learner"]
            if record.HasField("history"):
                values = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                rows.append({name: value for name, value in values.items() if not name.startswith("_")})
    assert len(identities) == 1
    assert {0.25, 0.5} == set(configs)
    assert rows[0] == {"step": 2} | {name: 0.5 * i for i, name in enumerate(NAMES)}
    assert rows[1:] == [
        {"step": 4, "reward/mean": 0.5},
        {"step": 3, "eval/accuracy": 0.75},
        {"step": 5, "reward/mean": 0.625},
    ]


def test_offline_nobody_is_called_and_every_file_is_below_the_run(
    tracked: tuple[RunDirectory, dict[str, Any]],
) -> None:
    directory, found = tracked
    for calls in found["calls"]:
        assert ["socket.connect", "unix"] in calls or ["socket.connect", "127.0.0.1"] in calls, "W&B's own service"
        assert [call for call in calls if call[1] not in HERE] == []
    assert list(read_jsonl(directory.notes)) == []
    assert {path.name for path in directory.trackers.iterdir()} == {"id", "mlflow", "mlflow-run", "trackio", "wandb"}
    assert {path.name for path in directory.root.parent.iterdir()} <= {"a run", "home"}


# -- names ------------------------------------------------------------------------------------------------------------


def test_mlflow_names_stay_apart_and_none_lies_below_another() -> None:
    names = [mlflow_name(name) for name in NAMES]
    assert len(set(names)) == len(NAMES)
    assert not {parent for name in names for parent in map(str, Path(name).parents)} & set(names)
    assert mlflow_name("reward/mean") == "reward/mean"


def test_a_nested_configuration_becomes_dotted_names() -> None:
    nested = {"a": 1, "b": {"c": None, "d": {"e": ["x", 2]}}, "f": {}, "g": "x"}
    assert dict(flatten(nested)) == {"a": "1", "b.c": "null", "b.d.e": '["x", 2]', "f": "{}", "g": "x"}


# -- a tracker that breaks --------------------------------------------------------------------------------------------


class Fake:
    """Keeps rows; `fails` names the method that raises."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.rows, self.closed = fails, list[tuple[int, dict[str, float]]](), 0
        if fails == "open":
            raise ConnectionError("no server")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.fails == "write" and step == 2:
            raise ConnectionError("no server")
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1
        if self.fails == "close":
            raise ConnectionError("no server")


def ignoring_the_run(opener: Callable[[], Tracker]) -> Callable[[trackers.TrackedRun], Tracker]:
    return lambda run: opener()


def journal_with(directory: RunDirectory, patch: pytest.MonkeyPatch, *openers: Callable[[], Tracker]) -> RunJournal:
    """A journal whose W&B, and MLflow if there are two, are made so."""
    names = ["wandb", "mlflow"][: len(openers)]
    for name, opener in zip(names, openers, strict=True):
        patch.setitem(trackers.TRACKERS, name, ignoring_the_run(opener))
    config = make_config(directory.root.parent, "observability.prometheus=false", f"observability.sinks={names}")
    return RunJournal(directory, config)


@pytest.mark.parametrize("fails", ["open", "write", "close"])
def test_a_tracker_that_fails_leaves_one_event_and_the_run_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    directory, sound = RunDirectory(tmp_path), Fake()
    broken = Fake(fails) if fails != "open" else None
    journal = journal_with(directory, monkeypatch, lambda: broken or Fake(fails), lambda: sound)
    for step in (1, 2, 3):
        journal.step(step, {"reward/mean": 0.5, "kl/reference_k1": None})
    journal.close()
    (event,) = read_jsonl(directory.notes)
    assert event["kind"] == "tracker_failed"
    assert event["message"] == "wandb: ConnectionError: no server; nothing more is sent to it"
    assert [row["step"] for row in directory.rows()] == [1, 2, 3]
    assert sound.rows == [(step, {"reward/mean": 0.5}) for step in (1, 2, 3)]
    assert sound.closed == 1
    if broken is not None:
        assert broken.closed == 1, "what it has is kept"
        assert [step for step, _ in broken.rows] == ([1] if fails == "write" else [1, 2, 3])


def test_a_tracker_that_hangs_delays_no_step_and_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "AHEAD", 2)
    hung = threading.Event()

    def never() -> Tracker:
        hung.wait()
        return Fake()

    directory = RunDirectory(tmp_path)
    journal = journal_with(directory, monkeypatch, never)
    for step in range(1, 6):
        journal.step(step, {"reward/mean": 0.5})
    journal.close()
    hung.set()
    (event,) = read_jsonl(directory.notes)
    assert event["message"] == "wandb: it is 2 steps behind; nothing more is sent to it"
    assert len(directory.rows()) == 5


def test_a_tracker_that_does_not_finish_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.01)
    hung = threading.Event()

    class Slow(Fake):
        def close(self) -> None:
            hung.wait()

    directory = RunDirectory(tmp_path)
    journal = journal_with(directory, monkeypatch, Slow)
    journal.close()
    hung.set()
    (event,) = read_jsonl(directory.notes)
    assert "did not finish" in event["message"]


# -- before anything starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = make_config(tmp_path, f"observability.sinks=[{name}]")
    check_config(config)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert f"observability.sinks={name}" in str(raised.value)
    assert f"pip install 'rlsys[{name}]'" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_runs_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="not installed"):
        require_trackers(["wandb"])


def test_every_tracker_of_the_configuration_has_an_adapter() -> None:
    from typing import get_args

    from rlsys.config.observing import SinkName

    assert set(get_args(SinkName)) == set(trackers.TRACKERS)
