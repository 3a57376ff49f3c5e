"""`rlsys up | down`: a Ray cluster of one's own on this machine."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from rlsys.cli_view import AsJson, err, print_json, say
from rlsys.errors import ClusterError

if TYPE_CHECKING:
    from rlsys.control.access import Access


def up(
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPUs to offer: one a rollout worker, one the learner. Default: this machine's."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where Ray listens; 0: a free one.")] = 0,
    job_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the job server and Ray's dashboard listen; 0: a free one.")
    ] = 0,
    object_store_gib: Annotated[float, typer.Option(min=0.1, help="Shared memory for weights and batches.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Start a Ray cluster of your own on this machine, on loopback and with a token. The other commands find it."""
    from rlsys.control.access import ALONE
    from rlsys.control.local_cluster import up as start

    with err.status("starting a Ray cluster"):
        cluster, started = start(cpus=cpus, port=port, job_port=job_port, object_store_gib=object_store_gib)
    if as_json:
        print_json({"address": cluster.address, "jobs": cluster.jobs, "token": str(cluster.token), "started": started})
        return
    say(f"{'up' if started else 'already up'}: {cluster.address}, jobs and Ray's dashboard at {cluster.jobs}")
    say(f"  its token is in {cluster.token}; rlsys finds both by itself, other programs need")
    say(f"  RAY_ADDRESS={cluster.address} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token} {ALONE}=0")
    say("  rlsys submit CONFIG   trains on it")
    say("  rlsys down            ends it")


def down(
    force: Annotated[
        bool, typer.Option("--force", help="Also while runs go on there: they end at once, without a checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """End the cluster of `rlsys up` with everything that runs on it, and nothing else."""
    from rlsys.control.access import Access
    from rlsys.control.local_cluster import down as end
    from rlsys.control.local_cluster import find_local

    local = find_local()
    if local is not None and not force:
        _require_idle(Access(jobs=local.jobs, ray=local.address, local=local))
    with err.status("ending the Ray cluster"):
        cluster = end()
    if as_json:
        print_json({"address": cluster.address if cluster else None})
    else:
        say(f"ended {cluster.address}" if cluster else "nothing is up")


def _require_idle(access: "Access") -> None:
    """Raise `ClusterError` when runs go on there. Of a cluster that does not answer nobody can say that."""
    from rlsys.control.access import connected, explained
    from rlsys.control.jobs import Jobs
    from rlsys.control.runs import look_at_all

    going: dict[str, str] = {}
    with suppress(ClusterError):
        going |= {job.run: f"is about to start (job {job.status})" for job in Jobs(access).all() if not job.ended}
    with suppress(ClusterError), connected(access), explained(access.ray):
        live, silent = look_at_all()
        going |= dict.fromkeys(silent, "does not answer")
        for name, run in live.items():
            going.pop(name, None)
            if run.status.phase != "finished":
                going[name] = f"is {run.status.phase} (step {run.status.version} of {run.config.learner.steps})"
    if going:
        which = ", ".join(f"run {name!r} {how}" for name, how in sorted(going.items()))
        one = next(iter(going)) if len(going) == 1 else "RUN"
        raise ClusterError(
            f"down: {which}; `rlsys stop {one}` ends it with a checkpoint, `rlsys down --force` "
            f"{'at once' if len(going) == 1 else 'all of them at once'}"
        )
