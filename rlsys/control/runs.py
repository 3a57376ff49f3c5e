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
    references = _ask(name)
    return _live(name, references, _ready(references))


def look_at_all() -> tuple[dict[str, Live], dict[str, ClusterError]]:
    """Where every run stands, and what is wrong with those that do not answer, each by name; all are asked at once.

    One that ends while it is asked is in neither.
    """
    asked: dict[str, list[Any]] = {}
    for name in names():
        with contextlib.suppress(NoSuchRun):
            asked[name] = _ask(name)
    ready = _ready([reference for references in asked.values() for reference in references])
    found, silent = dict[str, Live](), dict[str, ClusterError]()
    for name, references in asked.items():
        try:
            found[name] = _live(name, references, ready)
        except ClusterError as error:
            if not isinstance(error, NoSuchRun):  # that one has ended
                silent[name] = error
    return found, silent


def stop(name: str) -> None:
    """Ask a run to finish its step, write a checkpoint and end."""
    asked = [_controller(name).stop.remote()]
    _answers(name, asked, _ready(asked))


def kill(name: str) -> None:
    """End a run at once: without a checkpoint, and its actors with it."""
    ray.kill(_controller(name))


def scale(name: str, *, rollout: int | None, reward: int | None) -> None:
    """Set how many workers a run should have. Raises what the run says against it."""
    asked = [_controller(name).scale.remote(rollout=rollout, reward=reward)]
    _answers(name, asked, _ready(asked))


def wait_for_workers(
    name: str,
    wanted: Mapping[str, int],
    on_status: Callable[[Status], None] = lambda status: None,
    *,
    within_s: float | None = None,
) -> Status:
    """Wait until so many workers of each role are ready. None: however long it takes.

    Raises `ClusterError` when the run stops training before, when it wants another number by now, or in time.
    """
    deadline = None if within_s is None else time.monotonic() + within_s
    while True:
        status = look(name).status
        on_status(status)
        if status.phase not in ("starting", "training"):
            raise ClusterError(f"run {name!r} is {status.phase}: its workers do not change any more")
        ready = {role: counts.ready for role, counts in status.workers.items()}
        if wanted.items() <= ready.items():
            return status
        for role, count in wanted.items():
            if role in status.workers and (desired := status.workers[role].desired) != count:
                raise ClusterError(
                    f"run {name!r} wants {desired} {role} workers by now, not {count}: too many of them died young, "
                    "scaling.policy=queue decided so, or somebody else did; events.jsonl in its directory says which"
                )
        if deadline is not None and time.monotonic() > deadline:
            missing = ", ".join(f"{role} {ready.get(role, 0)}/{count}" for role, count in sorted(wanted.items()))
            raise ClusterError(
                f"run {name!r} has not got its workers ready within {within_s:g} s: {missing} ready. The run goes on "
                "and takes them when they come; `ray status` lists demands that no node meets"
            )
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


def _ask(name: str) -> list[Any]:
    controller = _controller(name)
    return [controller.status.remote(), controller.configuration.remote()]


def _live(name: str, references: list[Any], ready: list[Any]) -> Live:
    status, config = _answers(name, references, ready)
    return Live(config=config, status=status)


def _ready(references: list[Any]) -> list[Any]:
    """Those that are answered in time."""
    return ray.wait(references, num_returns=len(references), timeout=ANSWER_S)[0] if references else []


def _answers(name: str, references: list[Any], ready: list[Any]) -> list[Any]:
    if not all(reference in ready for reference in references):
        raise ClusterError(f"run {name!r} does not answer for {ANSWER_S:.0f} s; `rlsys logs {name}` may say why")
    try:
        return [unwrap(reference) for reference in references]
    except WorkerLost:
        raise NoSuchRun(f"run {name!r} has just ended; `rlsys status` says how") from None
