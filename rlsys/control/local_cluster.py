"""A Ray cluster of one user on this machine: `rlsys up` starts it, `rlsys down` ends it and nothing else.

It listens on loopback and asks for a token. A state file names its processes by id and birth, so that neither another
cluster on this machine nor a process that has inherited an id is ever touched.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from rlsys.errors import ClusterError, ConfigError

START_S = 300.0
"""A head that does not answer within this time is given up."""
GRACE_S = 20.0
"""Time that processes get to end by themselves."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Another one each time the kernel starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Born:
    """A process: ids are used again, an id and a birth are not. No clock counts here that anybody can set."""

    pid: int
    ticks: int
    """Of the kernel, from its start to the process's."""
    boot: str
    """The kernel's start."""

    @classmethod
    def of(cls, process: psutil.Process) -> "Born":
        """The identity of a process that is there. Raises `psutil.NoSuchProcess`."""
        try:
            stat = Path(f"/proc/{process.pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            raise psutil.NoSuchProcess(process.pid) from None
        after_name = stat.rpartition(b")")[2].split()  # from the third field on; a name may hold spaces
        return cls(pid=process.pid, ticks=int(after_name[22 - 3]), boot=BOOT_ID.read_text().strip())

    def find(self) -> psutil.Process | None:
        """The process, unless it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if Born.of(process) == self and _runs(process):
                return process
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """What the state file holds."""

    address: str
    """Where `ray.init` finds it, `127.0.0.1:PORT`."""
    jobs: str
    """Its job server, `http://127.0.0.1:PORT`."""
    token: Path
    """File with the token that it asks for; only its owner may read it."""
    scratch: Path
    """Ray's files, logs among them."""
    processes: tuple[Born, ...]
    """The head's first process, which ends the others when it ends, then those it had started when it was up."""

    @property
    def alive(self) -> bool:
        """Whether it is up."""
        return self.processes[0].find() is not None

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2, default=str)

    @classmethod
    def load(cls, text: str) -> "LocalCluster":
        """What `dump` wrote."""
        data: dict[str, Any] = json.loads(text)
        paths = {name: Path(data[name]) for name in ("token", "scratch")}
        return cls(**{**data, **paths, "processes": tuple(Born(**born) for born in data["processes"])})


def state_home() -> Path:
    """Where the state, the token and the log of the head are kept: `$XDG_STATE_HOME/rlsys`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rlsys"


def find_local() -> LocalCluster | None:
    """The cluster of `rlsys up`, if it is up."""
    cluster = _read(state_home())
    return cluster if cluster is not None and cluster.alive else None


def up(
    *, cpus: int | None = None, port: int = 0, job_port: int = 0, object_store_gib: float = 1.0
) -> tuple[LocalCluster, bool]:
    """Start the cluster unless it is up; says whether it had to be started. A port of 0 is a free one.

    Raises `ConfigError` for a port that is taken, and `ClusterError` with the end of the log when the cluster does not
    come up; nothing is left of it then.
    """
    home = state_home()
    with _alone(home):
        found = _read(home)
        if found is not None and found.alive:
            return found, False
        if found is not None:  # the machine was restarted, or somebody killed the head
            _clear(home, found)
        _require_free("--port", port)
        _require_free("--job-port", job_port)
        cluster = _spawn(home, cpus, port or _free_port(), job_port or _free_port(), object_store_gib)
        try:
            _write(home, cluster)  # from here on `down` finds it, whatever becomes of us
            _wait(home, cluster)
            cluster = replace(cluster, processes=_born(_family(cluster)))
            _write(home, cluster)
        except BaseException:
            _clear(home, cluster)
            raise
        return cluster, True


def down() -> LocalCluster | None:
    """End the cluster's processes and their children, and remove its files. None: there was nothing to end."""
    home = state_home()
    with _alone(home):
        cluster = _read(home)
        if cluster is not None:
            _clear(home, cluster)
    return cluster


def _spawn(home: Path, cpus: int | None, port: int, job_port: int, object_store_gib: float) -> LocalCluster:
    token = home / "token"
    token.unlink(missing_ok=True)
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    # Not below `home`: the names of Ray's sockets would become too long for the kernel.
    scratch = Path(tempfile.mkdtemp(prefix="rlsys-"))
    with (home / "up.log").open("w") as log:
        process = subprocess.Popen(
            head_command(
                cpus=cpus or len(os.sched_getaffinity(0)),
                port=port,
                job_port=job_port,
                object_store_gib=object_store_gib,
                scratch=scratch,
            ),
            env=_head_environment(token),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not meant for it
        )
    return LocalCluster(
        address=f"127.0.0.1:{port}",
        jobs=f"http://127.0.0.1:{job_port}",
        token=token,
        scratch=scratch,
        processes=(Born.of(psutil.Process(process.pid)),),
    )


def head_command(*, cpus: int, port: int, job_port: int, object_store_gib: float, scratch: Path) -> list[str]:
    """A head node that stays in the foreground, on loopback, and leaves other clusters the ports they expect."""
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": job_port,
        "dashboard-agent-listen-port": 0,
        "dashboard-agent-grpc-port": 0,
        "ray-client-server-port": _free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": cpus,
        "object-store-memory": int(object_store_gib * (1 << 30)),
        "temp-dir": scratch,
    }
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return head + [f"--{name}={value}" for name, value in options.items()]


def _head_environment(token: Path) -> dict[str, str]:
    """Ours, with this cluster's token in the place of others', and this Python first on the path of its jobs."""
    others = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in others}
    return {
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **kept,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback is loopback: see `access.stay_on_loopback`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _wait(home: Path, cluster: LocalCluster) -> None:
    """Until the job server knows a living node."""
    deadline = time.monotonic() + START_S
    while not _has_node(cluster):
        ended = not cluster.alive
        if ended or time.monotonic() > deadline:
            why = "it ended" if ended else f"nothing answers after {START_S:.0f} s"
            log = "\n".join((home / "up.log").read_text(errors="replace").splitlines()[-15:])
            raise ClusterError(f"cannot start a Ray cluster on this machine: {why}. The end of its log:\n{log}")
        time.sleep(0.2)


def _has_node(cluster: LocalCluster) -> bool:
    request = urllib.request.Request(
        f"{cluster.jobs}/nodes?view=summary", headers={"Authorization": f"Bearer {cluster.token.read_text()}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except (OSError, ValueError, KeyError):  # not there yet, or still starting
        return False
    return any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)


def _clear(home: Path, cluster: LocalCluster) -> None:
    """End what is left of a cluster and remove its files; the state last, so that a broken `down` can be repeated."""
    head = cluster.processes[0].find()
    family = _family(cluster)
    if head is not None:
        _signal([head], signal.SIGTERM)  # Ray ends the others in order
        _wait_for_end([head])
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(family, number)
        family = _wait_for_end(family)
    if family:
        left = ", ".join(str(process.pid) for process in family)
        raise ClusterError(f"the cluster's processes {left} do not end; end them and repeat `rlsys down`")
    shutil.rmtree(cluster.scratch, ignore_errors=True)
    cluster.token.unlink(missing_ok=True)
    (home / "state.json").unlink(missing_ok=True)


def _family(cluster: LocalCluster) -> list[psutil.Process]:
    """The cluster's processes that are there, the first one first, with all their descendants."""
    found: dict[int, psutil.Process] = {}
    for known in filter(None, (born.find() for born in cluster.processes)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {process.pid: process for process in (known, *known.children(recursive=True))}
    return list(found.values())


def _born(processes: Sequence[psutil.Process]) -> tuple[Born, ...]:
    """Those that have not ended meanwhile."""
    found: list[Born] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(Born.of(process))
    return tuple(found)


def _wait_for_end(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended in time. A zombie has: in a container there may be nobody to bury it."""
    deadline = time.monotonic() + GRACE_S
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares the time of birth before it signals
            process.send_signal(number)


def _read(home: Path) -> LocalCluster | None:
    path = home / "state.json"
    try:
        return LocalCluster.load(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path} is not what `rlsys up` writes ({type(error).__name__}: {error}); look which Ray processes are "
            "yours, end them, and remove the file"
        ) from error


def _write(home: Path, cluster: LocalCluster) -> None:
    new = home / "state.new"
    new.write_text(cluster.dump())
    new.replace(home / "state.json")


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _require_free(option: str, port: int) -> None:
    """Raise `ConfigError` when somebody listens there: it would be taken for our head, and be sent its token."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        why = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"{option}={port}: {why}; choose another, or 0 for a free one") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
