"""What holds for every command, and what the cluster's commands show, on made-up runs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from rlsys import cli_cluster
from rlsys.cli import app
from rlsys.cli_view import RunView, out
from rlsys.control.access import Access
from rlsys.control.jobs import Job
from rlsys.control.runs import Live
from rlsys.control.service import Status
from rlsys.errors import ClusterError, ConfigError, NoSuchRun
from rlsys.scheduling.crew import WorkerCounts
from tests.fakes import make_config

COMMANDS = [str(command.name) for command in app.registered_commands]
WITHOUT_JSON = {"export"}

JOB = Job(
    submission_id="rlsys-run-1",
    run="run",
    directory="/runs/run",
    status="RUNNING",
    message="",
    started_at=0.0,
)
STATUS = Status(
    phase="training",
    version=7,
    published_version=7,
    metrics={"reward/mean": 0.5, "staleness/mean": 1.25, "staleness/max": 3.0, "importance/ess_sequence": 0.875},
    ledger={"trained": 56, "in_flight": 8},
    serving={"rollout-0": 7},
    workers={
        "rollout": WorkerCounts(desired=2, ready=1, restarts=0),
        "reward": WorkerCounts(desired=1, ready=1, restarts=0),
    },
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert said.exit_code == 0
    assert f"Example: rlsys {command}" in said.output
    assert ("--json" in said.output) == (command not in WITHOUT_JSON)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A cluster with these jobs and live runs; `closed` to all but its job server."""
    made = SimpleNamespace(jobs=[JOB], live={"run": Live(config=make_config(tmp_path), status=STATUS)}, closed=False)

    @contextmanager
    def connected(access: Access) -> Iterator[None]:
        if made.closed:
            raise ClusterError("nothing answers at ray://head:10001")
        yield

    monkeypatch.setattr("rlsys.control.access.find_access", lambda address: Access(jobs="http://head", ray="head"))
    monkeypatch.setattr("rlsys.control.access.connected", connected)
    monkeypatch.setattr("rlsys.control.jobs.Jobs", lambda access: SimpleNamespace(all=lambda: made.jobs))
    monkeypatch.setattr("rlsys.control.runs.look_at_all", lambda: made.live)
    monkeypatch.setattr(out, "width", 200)
    return made


def rlsys(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_status_lists_runs_that_go_on_beside_those_that_ended(cluster: SimpleNamespace) -> None:
    cluster.jobs.append(replace(JOB, submission_id="rlsys-old-1", run="old", status="FAILED", message="it broke"))
    told = json.loads(rlsys("status", "--json").stdout)
    assert [(run["run"], run["job"]["status"]) for run in told] == [("old", "FAILED"), ("run", "RUNNING")]
    assert told[0]["status"] is None
    assert told[1]["status"]["metrics"]["staleness/mean"] == 1.25
    cluster.jobs.pop()


def test_status_of_one_run_is_one_object(cluster: SimpleNamespace) -> None:
    told = json.loads(rlsys("status", "run", "--json").stdout)
    assert (told["run"], told["status"]["version"], told["job"]["submission_id"]) == ("run", 7, "rlsys-run-1")


def test_status_of_a_run_that_is_not_there_names_the_nearest(cluster: SimpleNamespace) -> None:
    refused = rlsys("status", "rum")
    assert isinstance(refused.exception, NoSuchRun)
    assert "did you mean 'run'?" in str(refused.exception)


def test_where_only_the_job_server_is_reached_jobs_are_shown_all_the_same(cluster: SimpleNamespace) -> None:
    cluster.closed = True
    done = rlsys("status", "--json")
    assert done.exit_code == 0
    assert [(run["run"], run["status"]) for run in json.loads(done.stdout)] == [("run", None)]
    assert "only jobs are shown" in done.stderr
    assert "ray://head:10001" in done.stderr


def test_a_scale_without_a_count_is_refused(cluster: SimpleNamespace) -> None:
    refused = rlsys("scale", "run")
    assert isinstance(refused.exception, ConfigError)
    assert "give --rollout N, --reward N, or both" in str(refused.exception)


def test_the_table_of_runs_shows_step_staleness_and_ess(cluster: SimpleNamespace) -> None:
    with out.capture() as shown:
        out.print(cli_cluster._list(cluster.live, {"run": JOB, "old": replace(JOB, run="old", status="STOPPED")}))
    old, run = shown.get().splitlines()[1:]
    assert run.split()[:3] == ["run", "training", f"7/{cluster.live['run'].config.learner.steps}"]
    assert "1.25 (max 3)" in run
    assert "0.875" in run
    assert "reward 1/1, rollout 1/2" in run
    assert run.split()[-1] == "RUNNING"
    assert old.split() == ["old", "–", "–", "–", "–", "–", "STOPPED"]


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path: Path) -> None:
    view = RunView(make_config(tmp_path), quiet=False)
    with out.capture() as shown:
        view.status(STATUS)
        view.status(replace(STATUS, version=8))
    assert shown.get().splitlines() == [
        f"training  step 7/{make_config(tmp_path).learner.steps}  reward 0.500  staleness 1.25  ESS 0.875"
    ]
