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
from rlsys.control.lifecycle import TrainResult
from rlsys.control.local_cluster import LocalCluster
from rlsys.control.runs import Live
from rlsys.control.service import Status
from rlsys.errors import ClusterError, ConfigError, NoSuchRun
from rlsys.scheduling.crew import WorkerCounts
from tests.fakes import make_config

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
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
    """A cluster of `up` with these jobs and live runs, some of them `silent`; `closed` to all but its job server.

    `ended` counts how often it was ended.
    """
    run = Live(config=make_config(tmp_path), status=STATUS)
    made = SimpleNamespace(jobs=[JOB], live={"run": run}, silent=[], closed=False, ended=0)
    local = LocalCluster(address="head", jobs="http://head", token=tmp_path, scratch=tmp_path, processes=())

    @contextmanager
    def connected(access: Access) -> Iterator[None]:
        if made.closed:
            raise ClusterError("nothing answers at ray://head:10001")
        yield

    monkeypatch.setattr("rlsys.control.access.find_access", lambda address: Access(jobs="http://head", ray="head"))
    monkeypatch.setattr("rlsys.control.access.connected", connected)

    def look(name: str) -> Live:
        if name in made.silent:
            raise ClusterError(f"run {name!r} does not answer for 60 s")
        if name not in made.live:
            raise NoSuchRun(name)
        return made.live[name]

    def look_at_all() -> tuple[dict[str, Live], dict[str, ClusterError]]:
        return made.live, {name: ClusterError(f"run {name!r} does not answer for 60 s") for name in made.silent}

    def end() -> LocalCluster:
        made.ended += 1
        return local

    server = SimpleNamespace(all=lambda: made.jobs, live_runs=lambda: [*made.live, *made.silent])
    monkeypatch.setattr("rlsys.control.jobs.Jobs", lambda access: server)
    monkeypatch.setattr("rlsys.control.runs.look", look)
    monkeypatch.setattr("rlsys.control.runs.look_at_all", look_at_all)
    monkeypatch.setattr("rlsys.control.local_cluster.find_local", lambda: local)
    monkeypatch.setattr("rlsys.control.local_cluster.down", end)
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


def test_a_run_that_does_not_answer_hides_no_other(cluster: SimpleNamespace) -> None:
    cluster.silent.append("deaf")
    done = rlsys("status", "--json")
    assert [(run["run"], run["status"] is not None) for run in json.loads(done.stdout)] == [
        ("deaf", False),
        ("run", True),
    ]
    assert done.stderr == "run 'deaf' does not answer for 60 s\n"
    one = rlsys("status", "run", "--json")
    assert (json.loads(one.stdout)["status"]["version"], one.stderr) == (7, "")


def test_of_a_run_that_does_not_answer_the_job_is_shown_if_it_has_one(cluster: SimpleNamespace) -> None:
    cluster.silent.append("deaf")
    refused = rlsys("status", "deaf")
    assert str(refused.exception) == "run 'deaf' does not answer for 60 s"
    cluster.jobs.append(replace(JOB, run="deaf"))
    done = rlsys("status", "deaf", "--json")
    cluster.jobs.pop()
    assert json.loads(done.stdout)["job"]["status"] == "RUNNING"
    assert done.stderr == "only its job is shown, not where it stands: run 'deaf' does not answer for 60 s\n"


def test_where_only_the_job_server_is_reached_jobs_are_shown_all_the_same(cluster: SimpleNamespace) -> None:
    cluster.closed = True
    done = rlsys("status", "--json")
    assert done.exit_code == 0
    assert [(run["run"], run["status"]) for run in json.loads(done.stdout)] == [("run", None)]
    assert "only jobs are shown" in done.stderr
    assert "ray://head:10001" in done.stderr


def test_down_ends_no_run_unless_it_is_forced_to(cluster: SimpleNamespace) -> None:
    refused = rlsys("down")
    assert isinstance(refused.exception, ClusterError)
    steps = cluster.live["run"].config.learner.steps
    assert str(refused.exception) == (
        f"down: run 'run' is training (step 7 of {steps}); `rlsys stop run` ends it with a checkpoint, "
        "`rlsys down --force` at once"
    )
    assert cluster.ended == 0
    assert json.loads(rlsys("down", "--force", "--json").stdout) == {"address": "head"}
    assert cluster.ended == 1


def test_down_counts_runs_that_have_not_begun_or_do_not_answer(cluster: SimpleNamespace) -> None:
    cluster.live.clear()
    cluster.silent.append("deaf")
    assert str(rlsys("down").exception).startswith(
        "down: run 'deaf' does not answer, run 'run' is about to start (job RUNNING); `rlsys stop RUN` ends"
    )
    assert cluster.ended == 0


def test_down_ends_a_cluster_without_runs_and_one_that_does_not_answer(cluster: SimpleNamespace) -> None:
    cluster.jobs = [replace(JOB, status="SUCCEEDED")]
    live, cluster.live = cluster.live, {}
    assert rlsys("down").exit_code == 0
    cluster.jobs, cluster.live = [JOB], {"run": replace(live["run"], status=replace(STATUS, phase="finished"))}
    assert rlsys("down").exit_code == 0
    cluster.jobs, cluster.live, cluster.closed = [], live, True
    assert rlsys("down").exit_code == 0
    assert cluster.ended == 3


def test_only_who_waits_can_wait_for_so_long(cluster: SimpleNamespace) -> None:
    refused = rlsys("scale", "run", "--rollout", "2", "--timeout", "5")
    assert str(refused.exception) == "--timeout=5: only --wait waits"


def test_a_scale_without_a_count_is_refused(cluster: SimpleNamespace) -> None:
    refused = rlsys("scale", "run")
    assert isinstance(refused.exception, ConfigError)
    assert "give --rollout N, --reward N, or both" in str(refused.exception)


def test_the_table_of_runs_shows_step_staleness_and_ess(cluster: SimpleNamespace) -> None:
    with out.capture() as shown:
        out.print(
            cli_cluster._list(
                ["old", "run"], cluster.live, {"run": JOB, "old": replace(JOB, run="old", status="STOPPED")}
            )
        )
    old, run = shown.get().splitlines()[1:]
    assert run.split()[:3] == ["run", "training", f"7/{cluster.live['run'].config.learner.steps}"]
    assert "1.25 (max 3)" in run
    assert "0.875" in run
    assert "reward 1/1, rollout 1/2" in run
    assert run.split()[-1] == "RUNNING"
    assert old.split() == ["old", "–", "–", "–", "–", "–", "STOPPED"]


def test_after_training_the_policy_is_checked_on_the_task_that_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "quickstart" / "checkpoints" / "step-000002"
    result = TrainResult(
        directory=tmp_path / "quickstart",
        checkpoint=checkpoint,
        version=2,
        accuracy={0: 0.5, 2: 0.75},
        ledger={},
        seconds=1.0,
        plot=tmp_path / "summary.png",
    )
    monkeypatch.setattr("rlsys.control.lifecycle.train", lambda *_, **__: result)
    with out.capture() as shown:
        rlsys("train", str(CONFIG), "task.digits=1", "learner.steps=2")
    (line,) = (line for line in shown.get().splitlines() if "check the policy" in line)
    assert line.split("check the policy")[1].split() == ["scripts/run", "eval", str(checkpoint)]


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path: Path) -> None:
    view = RunView(make_config(tmp_path), quiet=False)
    with out.capture() as shown:
        view.status(STATUS)
        view.status(replace(STATUS, version=8))
    assert shown.get().splitlines() == [
        f"training  step 7/{make_config(tmp_path).learner.steps}  reward 0.500  staleness 1.25  ESS 0.875"
    ]
