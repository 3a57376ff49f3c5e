"""A Ray cluster for one run: the one named in the configuration, or one of our own on this machine."""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from rlsys.config.scaling import most_workers
from rlsys.config.schema import RunConfig
from rlsys.errors import ClusterError, RlsysError

STARTS = 3
"""Tries to bring up a cluster of our own."""


@contextlib.contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Connect for the length of a `with` block; a cluster that we started ends with it.

    Ours listens on loopback and asks every client for a token that only this process and its children know.
    Raises `ClusterError` when the cluster cannot be reached or is too small.
    """
    import ray

    scratch = tempfile.mkdtemp(prefix="rlsys-")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if config.resources.address is None:
            _start(config, scratch)
        else:
            _join(config.resources.address)
        _require_room(config)
        yield
    finally:
        try:
            ray.shutdown()
        finally:  # also when it is interrupted
            shutil.rmtree(scratch, ignore_errors=True)


def _start(config: RunConfig, scratch: str) -> None:
    """A cluster on this machine. Ray gives it half a minute to come up; a busy machine may need a second start."""
    from rlsys.control.access import stay_on_loopback

    stay_on_loopback()
    import ray

    # Ray turns token authentication on for a cluster it starts, and takes the token from here.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Its workers would run at 15: behind everything else here, and behind the raylet that only feeds them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    for start in range(1, STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), most_workers(config)["rollout"] + config.learner.ranks),
                resources=_offered(config),
                object_store_memory=int(config.resources.object_store_gib * (1 << 30)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=scratch,
            )
            return
        except Exception as error:  # Ray raises a bare one when a node is slow to start
            if start == STARTS or "timed out" not in str(error):
                raise ClusterError(
                    f"cannot start a Ray cluster on this machine: {error}. `rlsys doctor` says what it lacks; "
                    "resources.address names a running cluster"
                ) from error


def _join(address: str) -> None:
    from rlsys.control.access import find_access, join

    try:
        join(find_access(address))
    except RlsysError as error:
        raise ClusterError(f"resources.address={address}: cannot join the Ray cluster: {error}") from error


def _offered(config: RunConfig) -> dict[str, float]:
    """Custom resources of a cluster of our own: enough of every role, where the configuration demands them."""
    if not config.resources.roles:
        return {}
    return {
        "learner": float(config.learner.ranks),
        **{role: float(most) for role, most in most_workers(config).items()},
    }


def gpus(config: RunConfig) -> float:
    """GPUs that a run asks for when it starts; the probe has as large a share as the reference."""
    resources, scorers = config.resources, config.kl.reference + bool(config.probe.fraction)
    shares = (
        config.learner.ranks * resources.learner_gpus
        + config.rollout.workers * resources.rollout_gpus
        + scorers * resources.reference_gpus
    )
    return round(shares, 4)  # Ray counts in ten-thousandths


def _require_room(config: RunConfig) -> None:
    """Raise ClusterError when the cluster is too small for what the run starts with.

    Not with `resources.roles`: what is missing is then for the autoscaler to bring.
    """
    import ray

    if config.resources.roles:
        return
    have = ray.cluster_resources()
    workers, ranks = config.rollout.workers, config.learner.ranks
    need = {"CPU": float(workers + ranks), "GPU": gpus(config)}
    for kind, amount in need.items():
        if have.get(kind, 0.0) < amount:
            raise ClusterError(
                f"the cluster has {have.get(kind, 0.0):g} {kind}, the run needs {amount:g} "
                f"(rollout.workers={workers}, learner.ranks={ranks}, resources.*_gpus); lower these or add nodes"
            )
