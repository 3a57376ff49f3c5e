"""Two machines in one: network namespaces joined by a virtual cable, for a Ray node in each.

Nothing else is touched. Both ends of the cable, all addresses and all ports are inside, and what runs in a namespace
is known by it, so that it can be ended without looking at any other process. Who clears away is a process of its own
(this file, executed): it does so too when the one that made the namespaces was killed.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "veth0"
"""Name of the interface at both ends."""

STORE = 256 << 20
"""Bytes of each node's object store."""

CLOSE_S = 30.0
"""Longest wait for killed processes to be gone."""

NOTICE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that does not answer is given up after 9 s; with Ray's own settings it takes a minute."""

REFUSED = {"RAY_NUM_REDIS_GET_RETRIES": "3"}
"""A node whose token is refused tries again three times; on its own it would twenty times."""


@dataclass(frozen=True)
class Node:
    """A machine with one interface, at `address`; `scratch` is where its Ray keeps logs and sockets."""

    namespace: str
    address: str
    scratch: Path

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self.namespace, *command]

    @property
    def sent(self) -> int:
        """Bytes that left through its cable, by the kernel's count."""
        (link,) = json.loads(_ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", CABLE))
        sent: int = link["stats64"]["tx"]["bytes"]
        return sent

    @property
    def pids(self) -> list[int]:
        """Every process there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def unplug(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", CABLE, "down")

    def close(self) -> None:
        """End every process there, then the namespace, if it was made."""
        if not Path("/run/netns", self.namespace).exists():
            return
        deadline = time.monotonic() + CLOSE_S
        while (left := self.pids) and time.monotonic() < deadline:
            for pid in left:  # again and again: they start each other
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        _ip("netns", "del", self.namespace)
        if left:
            raise RuntimeError(f"{self.namespace}: processes {left} outlived SIGKILL")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of two nodes that asks for a token. `near` is its head and has the learner, `far` the rollouts."""

    near: Node
    far: Node
    environment: Mapping[str, str]
    port: int = 6379

    @property
    def address(self) -> str:
        """Where to join it."""
        return f"{self.near.address}:{self.port}"

    def start(self, *, far: int, near: int = 0) -> None:
        """A node, or two, with room for so many rollout workers; the near one is for the learner and rewards too."""
        head = ("--head", f"--port={self.port}", "--include-dashboard=false")
        self._ray(self.near, near + 1, {"rollout": near, "learner": 1, "reward": 2}, *head)
        if far:
            self.join(far)

    def join(self, rollouts: int, environment: Mapping[str, str] | None = None) -> None:
        """The far node. Raises `CalledProcessError` with what Ray said when it is refused."""
        self._ray(self.far, rollouts, {"rollout": rollouts}, f"--address={self.address}", environment=environment)

    def _ray(
        self,
        node: Node,
        cpus: int,
        offers: Mapping[str, int],
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        offered = json.dumps({name: count for name, count in offers.items() if count})
        resources = (f"--num-cpus={cpus}", f"--resources={offered}", f"--object-store-memory={STORE}")
        own = (f"--node-ip-address={node.address}", f"--temp-dir={node.scratch}", "--disable-usage-stats")
        output = node.scratch / "start"
        with output.open("w") as said:  # a file: what it starts keeps it open, and would keep a pipe open
            status = subprocess.run(
                node.inside(sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *resources, *own),
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            ).returncode
        if status:
            raise subprocess.CalledProcessError(status, "ray start", output.read_text())


def lacking() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "ip is not installed (Debian package iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    return None


@contextlib.contextmanager
def two_nodes(environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Two joined namespaces with no Ray yet; they and all that runs in them are gone when the block ends.

    `environment` is that of the processes to be started; a token is added to it.
    """
    scratch = Path(tempfile.mkdtemp(prefix="rlsys-"))  # below /tmp: a socket's path may have 107 characters
    token = write_token(scratch / "token")
    near, far = _nodes(scratch)
    keeper = subprocess.Popen([sys.executable, __file__, str(scratch)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        for node in (near, far):
            node.scratch.mkdir()
            _ip("netns", "add", node.namespace)
        _ip("-n", near.namespace, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", far.namespace)
        for node, other in ((near, far), (far, near)):
            _ip("-n", node.namespace, "address", "add", f"{node.address}/30", "dev", CABLE)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
            _ip("-n", node.namespace, "link", "set", CABLE, "up")
            _ip("-n", node.namespace, "route", "add", "default", "via", other.address)
        yield Cluster(near, far, {**environment, **NOTICE, **REFUSED, **token, "RAY_worker_niceness": "0"})
    finally:
        keeper.communicate()
        if keeper.returncode:
            raise RuntimeError(f"{near.namespace} and {far.namespace} were not cleared away")


def _nodes(scratch: Path) -> list[Node]:
    names = zip(("near", "far"), ADDRESSES, strict=True)
    return [Node(f"{scratch.name}-{name}", address, scratch / name) for name, address in names]


def _clear_away(scratch: Path) -> None:
    """Waits for the end of the block, or of its process: either closes the pipe that is read here."""
    sys.stdin.read()
    with contextlib.ExitStack() as closing:  # every step, whichever fails
        closing.callback(shutil.rmtree, scratch)
        for node in _nodes(scratch):
            closing.callback(node.close)


def write_token(path: Path) -> dict[str, str]:
    """Make a token that only its owner can read; returns what makes Ray ask for it and show it."""
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    _clear_away(Path(sys.argv[1]))
