"""Runs that go on in a cluster, reached through their named controllers from any process that may join it."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import ray

from rlsys.config.schema import RunConfig
from rlsys.control.ports import WorkerLost
from rlsys.control.remote import unwrap
from rlsys.control.service import NAMESPACE, Status
from rlsys.errors import ClusterError, NoSuchRun

ANSWER_S = 60.0
"""A controller that does not answer within this time is said not to; one that starts on a busy machine may need it."""
LOOK_S = 0.5
"""Between two looks at a run that we wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A run that goes on: its configuration and where it stands."""

    config: RunConfig
    status: Status


def names() -> list[str]:
    """Runs with a living controller."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in found if actor["namespace"] == NAMESPACE)


def require_free(name: str) -> None:
    """Raise `ClusterError` when a run of this name goes on in the cluster that this process has joined."""
    if name in names():
        raise ClusterError(taken(name, "in this cluster"))


def look(name: str) -> Live:
    """Where one run stands."""
    controller = _controller(name)
    status, config = _answers(name, [controller.status.remote(), controller.configuration.remote()])
    return Live(config=config, status=status)


def look_at_all() -> dict[str, Live]:
    """Where every run stands; one that ends while it is asked is not among them."""
    found: dict[str, Live] = {}
    for name in names():
        with contextlib.suppress(NoSuchRun):
            found[name] = look(name)
    return found


def stop(name: str) -> None:
    """Ask a run to finish its step, write a checkpoint and end."""
    _answers(name, [_controller(name).stop.remote()])


def kill(name: str) -> None:
    """End a run at once: without a checkpoint, and its actors with it."""
    ray.kill(_controller(name))


def scale(name: str, *, rollout: int | None, reward: int | None) -> None:
    """Set how many workers a run should have. Raises what the run says against it."""
    _answers(name, [_controller(name).scale.remote(rollout=rollout, reward=reward)])


def wait_for_workers(
    name: str, wanted: Mapping[str, int], on_status: Callable[[Status], None] = lambda status: None
) -> Status:
    """Wait until so many workers of each role are ready. Raises `ClusterError` when the run stops training before."""
    while True:
        status = look(name).status
        on_status(status)
        if status.phase not in ("starting", "training"):
            raise ClusterError(f"run {name!r} is {status.phase}: its workers do not change any more")
        ready = {role: counts.ready for role, counts in status.workers.items()}
        if wanted.items() <= ready.items():
            return status
        time.sleep(LOOK_S)


def taken(name: str, where: str) -> str:
    """What to say of a name that a run already has."""
    return (
        f"name={name}: a run of this name is going on {where}; choose another name (name=...), or end that one with "
        f"`rlsys stop {name}`"
    )


def unknown(name: str, others: Iterable[str]) -> str:
    """What to say of a name that no run has."""
    others = sorted(set(others))
    if near := get_close_matches(name, others, n=1):
        return f"no run {name!r} here; did you mean {near[0]!r}?"
    return f"no run {name!r} here; " + (f"there are {', '.join(others)}" if others else "there is none at all")


def _controller(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise NoSuchRun(unknown(name, names())) from None


def _answers(name: str, references: list[Any]) -> list[Any]:
    ready, _ = ray.wait(references, num_returns=len(references), timeout=ANSWER_S)
    if len(ready) < len(references):
        raise ClusterError(f"run {name!r} does not answer for {ANSWER_S:.0f} s; `rlsys logs {name}` may say why")
    try:
        return [unwrap(reference) for reference in references]
    except WorkerLost:
        raise NoSuchRun(f"run {name!r} has just ended; `rlsys status` says how") from None
