"""`rlsys submit | status | logs | scale | stop`: runs on a Ray cluster, from whatever may reach it."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rlsys.cli_view import AsJson, err, note, number, out, print_json, run_table, say
from rlsys.config import load_config
from rlsys.errors import ClusterError, ConfigError, NoSuchRun

if TYPE_CHECKING:
    from rlsys.control.access import Access
    from rlsys.control.jobs import Job, Jobs
    from rlsys.control.runs import Live

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="http://HOST:8265, ray://HOST:10001, or HOST:6379 on a node of the cluster. "
        "Default: $RAY_ADDRESS, or the cluster of `rlsys up`.",
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `rlsys status` lists them.", show_default=False)]


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.FIELD=VALUE]...", help="Changes to it, e.g. run_dir=/shared/runs.", show_default=False
        ),
    ] = None,
    address: Address = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A further file or directory that the run reads.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output until it ends; exit as it does.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on a cluster, as a Ray job.

    The configuration is checked here first. With it travel this package, modules of yours that the task and the
    reward import, and data files given by relative paths; never an environment. Run files land below `run_dir`:
    for the cluster of `rlsys up` as for `rlsys train`, for any other an absolute path on storage that its nodes share.
    """
    from rlsys.control.access import find_access
    from rlsys.control.shipping import prepare

    settings = load_config(config, overrides or ())
    access = find_access(address)
    shipment = prepare(settings, here=Path.cwd(), shared=access.local is not None, include=include or ())
    from rlsys.control.jobs import Jobs

    jobs = Jobs(access)
    job = jobs.submit(shipment, resume=resume)
    if not as_json:
        say(f"submitted {job.run} as job {job.submission_id}; its files land in {job.directory}")
        for remark in shipment.remarks:
            say(f"  note: {remark}")
        _say_next(job.run, address)
    if follow:
        job = _follow(jobs, job, address, to_stderr=as_json)
    if as_json:
        print_json({**asdict(job), "address": access.jobs, "remarks": list(shipment.remarks)})
    if follow and job.status != "SUCCEEDED":
        raise typer.Exit(1)


def status(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Default: all runs that the cluster knows.", show_default=False),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Where runs stand: phase, policy version, staleness, effective sample size, workers, prompts."""
    from rlsys.control.access import find_access
    from rlsys.control.jobs import Jobs

    access = find_access(address)
    server = Jobs(access)
    jobs = {job.run: job for job in reversed(server.all())}
    if run is not None:
        _show_one(run, _look(access, server, run, jobs), jobs.get(run), as_json)
        return
    live, silent = _look_at_all(access)
    names = sorted({*live, *silent, *jobs})
    if as_json:
        print_json([_facts(name, live.get(name), jobs.get(name)) for name in names])
    elif not names:
        say("no runs here; `rlsys submit CONFIG` starts one")
    else:
        out.print(_list(names, live, jobs))


def logs(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's name, or a job's submission id.", show_default=False)
    ],
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a submitted run has printed."""
    from rlsys.control.access import find_access
    from rlsys.control.jobs import Jobs

    jobs = Jobs(find_access(address))
    job = _job(jobs, run)
    if follow:
        job = _follow(jobs, job, address, to_stderr=as_json)
    if as_json:
        print_json({**asdict(job), "logs": jobs.logs(job)})
    elif not follow:
        sys.stdout.write(jobs.logs(job))


def stop(
    run: Run,
    address: Address = None,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a run: it finishes its step and writes a checkpoint, from which `--resume` continues."""
    from rlsys.control import runs
    from rlsys.control.access import connected, find_access
    from rlsys.control.jobs import Jobs

    access = find_access(address)
    jobs = Jobs(access)
    job = next((job for job in jobs.all() if job.run == run), None)
    if now and job is not None and not job.ended:
        jobs.kill(job)
    else:
        with connected(access):
            if job is not None and run not in runs.names():
                raise NoSuchRun(
                    f"run {run!r} has ended: job {job.submission_id} is {job.status}"
                    if job.ended
                    else f"run {run!r} has not started yet: job {job.submission_id} is {job.status}; try again in a "
                    f"while, or end it with `rlsys stop {run} --now`"
                )
            (runs.kill if now else runs.stop)(run)
    if as_json:
        print_json({"run": run, "submission_id": job.submission_id if job else None, "now": now})
    elif now:
        say(f"ended {run}; its last checkpoint is what it had written by itself")
    else:
        say(f"{run} finishes its step, writes a checkpoint and ends" + (f": {job.directory}" if job else ""))


def scale(
    run: Run,
    rollout: Annotated[int | None, typer.Option(help="Rollout workers to have.", show_default=False)] = None,
    reward: Annotated[int | None, typer.Option(help="Reward workers to have.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when they are ready.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With --wait: fail when they are not by then. Default: wait.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Change how many workers a run has, while it trains."""
    from rlsys.control import runs
    from rlsys.control.access import connected, find_access

    wanted = {role: count for role, count in (("rollout", rollout), ("reward", reward)) if count is not None}
    if not wanted:
        raise ConfigError("nothing to change: give --rollout N, --reward N, or both")
    if timeout is not None and not wait:
        raise ConfigError(f"--timeout={timeout:g}: only --wait waits")
    with connected(find_access(address)):
        runs.scale(run, rollout=rollout, reward=reward)
        if wait:
            with err.status(f"waiting for the workers of {run}") as shown:
                now = runs.wait_for_workers(
                    run, wanted, lambda status: shown.update(f"{run}: {_workers(status)}"), within_s=timeout
                )
        else:
            now = runs.look(run).status
    if as_json:
        print_json({"run": run, "workers": {role: asdict(count) for role, count in now.workers.items()}})
    else:
        say(f"{run}: {_workers(now)}")


def _follow(jobs: "Jobs", job: "Job", address: str | None, *, to_stderr: bool) -> "Job":
    """Show a job's output until it ends, and say how it did. Ctrl-C leaves it running."""
    stream = sys.stderr if to_stderr else sys.stdout

    async def show() -> None:
        async with aclosing(jobs.follow(job)) as texts:
            async for text in texts:
                stream.write(text)
                stream.flush()

    try:
        asyncio.run(show())
        ended = jobs.outcome(job)
    except KeyboardInterrupt:
        err.print(f"\n{job.run} goes on.", markup=False, highlight=False)
        _say_next(job.run, address, to=err)
        raise typer.Exit(130) from None
    if ended.status != "SUCCEEDED":
        err.print(f"{job.run}: {ended.status}. {_first_line(ended.message)}", markup=False, highlight=False)
    return ended


def _job(jobs: "Jobs", name: str) -> "Job":
    from rlsys.control.runs import unknown

    job = jobs.find(name)
    if job is not None:
        return job
    if name in jobs.live_runs():
        raise ClusterError(f"run {name!r} was not submitted: its output is where `rlsys train` was started")
    raise NoSuchRun(unknown(name, {job.run for job in jobs.all()}))


def _look(access: "Access", server: "Jobs", run: str, jobs: "Mapping[str, Job]") -> "Live | None":
    """Where one run stands, whatever the others do; None when there is only its job, with a note if it was not heard.

    Raises `NoSuchRun`, and `ClusterError` when it goes on without a job and is not heard.
    """
    from rlsys.control.access import connected
    from rlsys.control.runs import look, unknown

    try:
        with connected(access):
            return look(run)
    except ClusterError as error:
        if run in jobs:
            if not isinstance(error, NoSuchRun):  # it has ended, or not begun
                note(f"only its job is shown, not where it stands: {error}")
            return None
        live = server.live_runs()
        if run in live:
            raise
        raise NoSuchRun(unknown(run, [*live, *jobs])) from None


def _look_at_all(access: "Access") -> "tuple[dict[str, Live], list[str]]":
    """The runs that go on, and those of them that do not answer; a note says what cannot be reached."""
    from rlsys.control.access import connected
    from rlsys.control.runs import look_at_all

    try:
        with connected(access):
            live, silent = look_at_all()
    except ClusterError as error:
        note(f"only jobs are shown, not where they stand: {error}")
        return {}, []
    for why in silent.values():
        note(str(why))
    return live, list(silent)


def _show_one(run: str, live: "Live | None", job: "Job | None", as_json: bool) -> None:
    if as_json:
        print_json(_facts(run, live, job))
        return
    if job is not None:
        say(f"{run}: job {job.submission_id} {job.status}, submitted {_when(job.started_at)}, files in {job.directory}")
        if job.ended:
            say(f"  {_first_line(job.message)}")
    if live is not None:
        say(f"{run}: {live.status.phase}, step {live.status.version} of {live.config.learner.steps}")
        out.print(run_table(live.status, live.config))


def _list(names: Sequence[str], live: "Mapping[str, Live]", jobs: "Mapping[str, Job]") -> Table:
    table = Table("run", "phase", "step", "staleness", "ESS", "workers", "job", box=None, padding=(0, 2, 0, 0))
    for name in names:
        job = jobs[name].status if name in jobs else "–"
        if name not in live:
            table.add_row(name, *["–"] * 5, job)
            continue
        now, m = live[name].status, live[name].status.metrics
        table.add_row(
            name,
            now.phase,
            f"{now.version}/{live[name].config.learner.steps}",
            f"{number(m.get('staleness/mean'), 2)} (max {number(m.get('staleness/max'), 0)})",
            number(m.get("importance/ess_sequence")),
            _workers(now),
            job,
        )
    return table


def _workers(now: Any) -> str:
    return ", ".join(f"{role} {count.ready}/{count.desired}" for role, count in sorted(now.workers.items()))


def _facts(run: str, live: "Live | None", job: "Job | None") -> dict[str, Any]:
    return {
        "run": run,
        "job": asdict(job) if job else None,
        "directory": str(live.config.path) if live else job.directory if job else None,
        "steps": live.config.learner.steps if live else None,
        "status": asdict(live.status) if live else None,
    }


def _say_next(run: str, address: str | None, to: Any = out) -> None:
    where = f" --address {address}" if address else ""
    for what, command in (
        ("where it stands", f"rlsys status {run}{where}"),
        ("what it prints", f"rlsys logs {run} --follow{where}"),
        ("more workers", f"rlsys scale {run} --rollout 2 --wait{where}"),
        ("end it with a checkpoint", f"rlsys stop {run}{where}"),
    ):
        to.print(f"  {what:<26} {command}", markup=False, highlight=False, soft_wrap=True)


def _first_line(text: str) -> str:
    """Ray adds the end of a failed job's output, for which there is `rlsys logs`."""
    return text.partition("\n")[0]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
