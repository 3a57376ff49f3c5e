"""How a command reaches a cluster: by which addresses, with which token, and what to say when that fails."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rlsys.control.local_cluster import LocalCluster, find_local
from rlsys.errors import ClusterError, ConfigError, RlsysError

JOB_PORT, CLIENT_PORT = 8265, 10001
"""Where a Ray head has its job server and its Ray Client server unless it was told otherwise."""

ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Named after the systems on which 0, a cluster of one machine, is Ray's default. On Linux it is read, too."""

ANSWER_S = 10.0
"""A head that does not answer within this time is taken for unreachable."""

FORMS = "http://HOST:8265 (job server), ray://HOST:10001 (Ray Client) or HOST:6379 (from a node of the cluster)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The two doors of a cluster."""

    jobs: str
    """What Ray's job client takes: the job server's URL, or an address whose head knows it."""
    ray: str
    """What `ray.init` takes."""
    local: LocalCluster | None = None
    """The cluster of `rlsys up`, when it is that one."""

    def use(self) -> None:
        """Let this process talk to this cluster and to no other, whatever the environment names."""
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # either would win over an address that was given
            os.environ.pop(name, None)
        if self.local is None:
            return
        stay_on_loopback()
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(self.local.token))
        if raylet := sys.modules.get("ray._raylet"):  # it read the mode when it was imported
            raylet.Config.initialize("")


def stay_on_loopback() -> None:
    """Make 127.0.0.1 mean loopback to Ray, in this process and its children.

    To Ray on Linux this machine is a possible node of a larger cluster: it puts the address of a network interface in
    the place of 127.0.0.1, listens on all interfaces, and looks for a cluster there. On one machine alone it need not.
    """
    os.environ[ALONE] = "0"
    if constants := sys.modules.get("ray._private.ray_constants"):  # it read the variable when it was imported
        vars(constants)["ENABLE_RAY_CLUSTER"] = False


def find_access(address: str | None) -> Access:
    """The cluster meant by `--address` or `resources.address`, or else by RAY_ADDRESS, or else that of `rlsys up`.

    Raises `ConfigError` for what is no address, `ClusterError` when no cluster is meant.
    """
    return choose_access(address, os.environ, find_local())


def choose_access(address: str | None, environment: Mapping[str, str], local: LocalCluster | None) -> Access:
    """`find_access` as a function of what it looks at."""
    given = address if address not in (None, "auto") else environment.get("RAY_ADDRESS") or address
    if local is not None and (given in (None, "auto") or _same(given, local)):
        return Access(jobs=local.jobs, ray=local.address, local=local)
    if given is None:
        raise ClusterError("no cluster is named: give --address, set RAY_ADDRESS, or start one here with `rlsys up`")
    if given == "auto":  # a node of some cluster: Ray finds it
        return Access(jobs=given, ray=given)
    scheme, host, port = _split(given)
    if scheme in ("http", "https"):
        return Access(jobs=given, ray=f"ray://{host}:{CLIENT_PORT}")
    if scheme == "ray":
        return Access(jobs=f"http://{host}:{JOB_PORT}", ray=given)
    if scheme or port is None:
        raise ConfigError(f"{given!r} is no address of a Ray cluster; expected {FORMS}")
    return Access(jobs=given, ray=given)


def _split(address: str) -> tuple[str, str, int | None]:
    """Scheme, host (an IPv6 one in brackets) and port."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of a Ray cluster ({error}); expected {FORMS}") from error
    if not host:
        raise ConfigError(f"{address!r} is no address of a Ray cluster; expected {FORMS}")
    return parts.scheme, f"[{host}]" if ":" in host else host, port


def _same(address: str, local: LocalCluster) -> bool:
    return address.rstrip("/").replace("localhost", "127.0.0.1") in (local.address, local.jobs)


@contextlib.contextmanager
def connected(access: Access) -> Iterator[None]:
    """A Ray driver's connection for the length of a `with` block. Raises `ClusterError` that says why there is none."""
    import ray

    join(access)
    try:
        yield
    finally:
        ray.shutdown()


def join(access: Access) -> None:
    """Connect this process to the cluster as a Ray driver. Raises `ClusterError`."""
    access.use()
    import ray

    with explained(access.ray):
        knock(access.ray)
        ray.init(address=access.ray, log_to_driver=False, logging_level=logging.ERROR)


def knock(address: str) -> None:
    """Raise unless somebody answers, and a head takes our token.

    Ray alone would try for between 20 s and a quarter of an hour, and not say what is wrong.
    """
    if address == "auto":
        return
    scheme, host, port = _split(address)
    if port is not None:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {address} ({error})") from error
    if scheme:
        return
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with contextlib.closing(init_grpc_channel(address)) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_S)


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what Ray raises about a cluster into a `ClusterError` that says what to do."""
    try:
        yield
    except RlsysError:
        raise
    except Exception as error:
        raise ClusterError(explain(error, address)) from error


def explain(error: Exception, address: str) -> str:
    """What is wrong with the connection to a cluster, and what to do about it."""
    text = str(error)
    if type(error).__name__ == "AuthenticationError" or "UNAUTHENTICATED" in text:
        return f"{address} refused us: {_refusal(text, os.environ)}"
    if "StatusCode." in text:  # something else than a head listens there, or one that is going down
        return f"{address} does not answer as the head of a Ray cluster does; expected {FORMS}"
    if "Couldn't obtain the API server address" in text or "returned 404" in text:
        return (
            f"{address}: this cluster has no job server; its head needs `pip install 'ray[default]'` and "
            "`ray start --head --include-dashboard=true`"
        )
    if isinstance(error, ConnectionError):
        hint = "its port, a firewall, or a missing tunnel; a Ray head has its job server at 8265, Ray Client at 10001"
        return f"{text if address in text else f'{address}: {text}'}. Is the cluster up? Otherwise look at {hint}"
    return f"{address}: {type(error).__name__}: {text}"


def _refusal(text: str, environment: Mapping[str, str]) -> str:
    """Whether no token was sent or a wrong one, in the words of who has to set it."""
    how = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN=...) give the one that its head has"
    if environment.get("RAY_AUTH_MODE", "").lower() != "token" or "no authentication token was found" in text.lower():
        return f"it asks for a token, and none was sent. {how}"
    if environment.get("RAY_AUTH_TOKEN"):
        origin = "RAY_AUTH_TOKEN"
    else:
        origin = environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return f"the token in {origin} is not this cluster's. {how}"
