"""Desired and actual workers: starts the missing ones, lets surplus ones go, replaces the dead.

    asked for, or a policy's decision ─► desired ─► [crew: what is off] ─► start ─► load ─► current weights ─► work
                                                                       └─► no new work ─► drain ─► gone

Nothing here is waited for by the loops or the learner: they see workers appear in, and vanish from, the router.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from rlsys.config.scaling import most_workers
from rlsys.config.schema import RunConfig
from rlsys.control.ports import Parts, RolloutPort, WorkerLost, WorkerPort
from rlsys.control.progress import Progress
from rlsys.control.watch import ANSWER_S
from rlsys.errors import ClusterError, EngineError, first_failure
from rlsys.scheduling.crew import Crew, Dismiss, Start, require_count
from rlsys.scheduling.ledger import Ledger
from rlsys.scheduling.routing import Router, Worker
from rlsys.scheduling.scaling import ManualPolicy, Observation, QueuePolicy, Resize, ScalingPolicy
from rlsys.scheduling.signal import Signal

PATIENCE_S = 60.0
"""A worker that has not joined by then is an event: it may wait for a node that nobody will bring."""

Spawn = Callable[[Coroutine[Any, Any, None], str], Any]


class Role(Protocol):
    """What it means for a worker of a role to come and to go."""

    def start(self, start: Start) -> WorkerPort:
        """Have it started; returns at once."""

    async def join(self, name: str, port: Any) -> str:
        """Give it its share of the work, once it has loaded; returns what to say about that."""

    def release(self, name: str) -> None:
        """No new work for it, from this moment."""

    async def idle(self, name: str) -> None:
        """Returns when it has finished what it had."""

    async def forget(self, name: str) -> None:
        """It is gone."""


class RolloutRole:
    """A rollout worker gets prompts from its first acknowledgement on: it serves the current weights then."""

    def __init__(self, parts: Parts, router: Router, progress: Progress, signal: Signal) -> None:
        self._parts, self._router, self._progress, self._signal = parts, router, progress, signal
        self._joining: dict[str, RolloutPort] = {}
        self._leaving: dict[str, Worker] = {}

    def start(self, start: Start) -> RolloutPort:
        """See `Role`."""
        return self._parts.launcher.rollout(start.name, start.number, start.seat)

    async def join(self, name: str, port: RolloutPort) -> str:
        """See `Role`."""
        self._joining[name] = port
        await self._parts.weights.add(name, port)
        await self._signal.until(lambda: name in self._progress.acks)
        return f"serves version {self._progress.acks[name].version}"

    def expects(self, name: str) -> bool:
        """Whether a worker is to serve versions: it joins, or works."""
        return name in self._joining or name in self._parts.rollouts

    def serves(self, name: str) -> None:
        """A worker acknowledged a version: if it is the first one, it gets prompts from now on."""
        port = self._joining.pop(name, None)
        if port is not None:
            self._parts.rollouts[name] = port
            self._router.add(name)

    def release(self, name: str) -> None:
        """See `Role`."""
        self._joining.pop(name, None)
        self._parts.rollouts.pop(name, None)
        self._progress.acks.pop(name, None)
        if worker := self._router.remove(name):
            self._leaving[name] = worker

    async def idle(self, name: str) -> None:
        """See `Role`. Until then it goes on to serve new versions, so that what it finishes is as fresh as can be."""
        worker = self._leaving.get(name)
        await self._signal.until(lambda: worker is None or not worker.in_flight)

    async def forget(self, name: str) -> None:
        """See `Role`."""
        self._leaving.pop(name, None)
        await self._parts.weights.remove(name)


class RewardRole:
    """A reward worker takes its turn as soon as it has loaded."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def start(self, start: Start) -> WorkerPort:
        """See `Role`."""
        return self._parts.launcher.reward(start.name)

    async def join(self, name: str, port: WorkerPort) -> str:
        """See `Role`."""
        self._parts.rewards.add(name, port)
        return "scores"

    def release(self, name: str) -> None:
        """See `Role`."""
        self._parts.rewards.remove(name)

    async def idle(self, name: str) -> None:
        """See `Role`."""
        await self._parts.rewards.idle(name)

    async def forget(self, name: str) -> None:
        """See `Role`."""


def crews(config: RunConfig, parts: Parts) -> dict[str, Crew]:
    """The workers a run begins with."""
    present, scaling = {"rollout": parts.rollouts, "reward": parts.rewards.workers}, config.scaling
    return {
        role: Crew(role, present[role], most=most, max_restarts=scaling.max_restarts, backoff_s=scaling.backoff_s)
        for role, most in most_workers(config).items()
    }


def require_counts(config: RunConfig, asked: Mapping[str, int | None]) -> None:
    """Raise ConfigError unless a run may have so many workers of each role."""
    for role, most in most_workers(config).items():
        if (count := asked.get(role)) is not None:
            require_count(role, count, most)


class Reconciler:
    """Keeps the workers of every role at the number desired, for as long as a run lasts."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        *,
        ledger: Ledger,
        router: Router,
        progress: Progress,
        signal: Signal,
        spawn: Spawn,
    ) -> None:
        self._config, self._parts, self._ledger = config, parts, ledger
        self._progress, self._signal, self._spawn = progress, signal, spawn
        self._policy = make_policy(config)
        self._rollouts = RolloutRole(parts, router, progress, signal)
        self._roles: Mapping[str, Role] = {"rollout": self._rollouts, "reward": RewardRole(parts)}
        self.crews = progress.crews = crews(config, parts)
        self._ports: dict[str, WorkerPort] = {**parts.rollouts, **parts.rewards.workers}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._dismissed: set[str] = set()
        parts.rewards.report_lost(self.lost)

    async def run(self) -> None:
        """Consumes wishes and deaths, produces workers; waits until something is off. A wish or a death unblocks it."""
        for name, port in self._ports.items():
            self._lives[name] = self._spawn(self._watch(name, port), f"watch {name}")
        while True:
            await self._signal.until(lambda: any(crew.is_off(_now()) for crew in self.crews.values()))
            for crew in self.crews.values():
                for action in crew.due(_now()):
                    self._execute(crew, action)

    def scale(self, why: str, **asked: int | None) -> None:
        """There should be so many workers of each role that is named. Raises ConfigError, and then changes none."""
        require_counts(self._config, asked)
        for role, crew in self.crews.items():
            if (count := asked.get(role)) is None:
                continue
            self._parts.journal.event("scaled", f"{role} workers {crew.desired} → {count}: {why}")
            crew.ask(count)
        self._signal.notify()

    def expects(self, name: str) -> bool:
        """Whether a rollout worker is to serve versions: it joins, or works."""
        return self._rollouts.expects(name)

    def serves(self, name: str) -> None:
        """A rollout worker acknowledged a version; the first one lets it work."""
        self._rollouts.serves(name)

    def dismissed(self, name: str) -> bool:
        """Whether a worker was told to go: what it leaves unfinished is not the fault of its prompts."""
        return name in self._dismissed

    def lost(self, name: str, error: WorkerLost | EngineError) -> None:
        """A worker is dead or as good as that; told by anybody, more than once. Raises ClusterError to give up."""
        crew = next((crew for crew in self.crews.values() if name in crew.members), None)
        if crew is None or not crew.died(name, _now()):
            return
        self._parts.journal.event("worker_lost", f"{name}: {error}")
        self._roles[crew.role].release(name)
        self._spawn(self._roles[crew.role].forget(name), f"forget {name}")
        self._end(name)
        if crew.given_up:
            self._give_up(crew, name, error)
        elif wait := crew.wait_s(_now()):
            self._spawn(self._look_again(wait), f"wait to replace {name}")
        self._signal.notify()

    def after_step(self, timing: Mapping[str, float | None]) -> None:
        """Let the policy decide on the learner step that took `timing`."""
        counts, slots = self.crews["rollout"].counts, self._ledger.counts()
        seen = Observation(
            step=self._progress.version,
            desired=counts.desired,
            ready=counts.ready,
            learner_wait=(timing["throughput/learner_idle_s"] or 0.0) / (timing["throughput/step_s"] or 1.0),
            batches_ahead=(slots["finished"] + slots["learning"]) / self._config.rollout.prompts_per_step,
            rollout_idle=self._progress.metrics.get("throughput/rollout_idle_fraction"),
        )
        match self._policy.after_step(seen):
            case Resize(rollout, reason):
                self.scale(reason, rollout=rollout)

    # -- what it is made of ----------------------------------------------------------------------------------------

    def _execute(self, crew: Crew, action: Start | Dismiss) -> None:
        role, name = self._roles[crew.role], action.name
        if isinstance(action, Start):
            port = self._ports[name] = role.start(action)
            self._lives[name] = self._spawn(self._live(crew, name, port), name)
            return
        self._dismissed.add(name)
        role.release(name)
        if action.joined:
            self._spawn(self._leave(crew, name), f"leave {name}")
        else:
            self._spawn(role.forget(name), f"forget {name}")
            self._end(name)
            crew.left(name)
            self._parts.journal.event("worker_left", f"{name}: had not joined yet")

    async def _watch(self, name: str, port: WorkerPort) -> None:
        try:
            await port.lost()
        except (WorkerLost, EngineError) as error:
            self.lost(name, error)

    async def _live(self, crew: Crew, name: str, port: WorkerPort) -> None:
        """A worker from its start to its death; it is cancelled where one is let go."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(port.lost())
                tasks.create_task(self._join(crew, name, port))
        except* (WorkerLost, EngineError) as errors:
            error = first_failure(errors)
            assert isinstance(error, WorkerLost | EngineError)
            self.lost(name, error)

    async def _join(self, crew: Crew, name: str, port: WorkerPort) -> None:
        start = _now()
        late = self._spawn(self._say_late(name), f"wait for {name}")
        try:
            with self._progress.spans.span("join", worker=name):
                await port.loaded()
                how = await self._roles[crew.role].join(name, port) if crew.is_joining(name) else ""
        finally:
            late.cancel()
        if not crew.is_joining(name):
            return  # it was told to go, or died, at this very moment
        crew.joined(name, _now())
        self._parts.roles[name] = port
        self._parts.journal.event("worker_joined", f"{name}: {how}, {_now() - start:.1f} s after its start")
        self._signal.notify()

    async def _leave(self, crew: Crew, name: str) -> None:
        """Drain a worker, within the grace period, and end it: the slots it still has then wait again."""
        role, start, how = self._roles[crew.role], _now(), "finished what it had"
        with self._progress.spans.span("leave", worker=name):
            try:
                async with asyncio.timeout(self._config.scaling.grace_s):
                    await role.idle(name)
            except TimeoutError:
                how = "handed back what it had"
            await role.forget(name)
        await self._last_spans(name)
        self._end(name)
        crew.left(name)
        self._parts.journal.event("worker_left", f"{name}: {how}, {_now() - start:.1f} s after it was to go")
        self._signal.notify()

    async def _last_spans(self, name: str) -> None:
        if port := self._parts.roles.pop(name, None):
            try:
                self._parts.journal.spans(name, await asyncio.wait_for(port.spans(), ANSWER_S))
            except (WorkerLost, TimeoutError) as error:
                self._parts.journal.event("worker_silent", f"{name}: took the end of its trace along: {error!r}")

    def _end(self, name: str) -> None:
        self._parts.roles.pop(name, None)
        life = self._lives.pop(name, None)
        if life not in (None, asyncio.current_task()):
            life.cancel()
        self._ports.pop(name).kill()

    def _give_up(self, crew: Crew, name: str, error: WorkerLost | EngineError) -> None:
        """A crash loop: go on with the workers there are. Raises ClusterError when there is none."""
        said = f"{crew.deaths_in_a_row} {crew.role} workers in a row died young; the last one, {name}: {error}"
        if not crew.present:
            raise ClusterError(f"no {crew.role} worker is left: {said}") from error
        self._parts.journal.event("scaling_gave_up", f"{crew.role} workers stay {len(crew.present)}: {said}")
        crew.settle_for_less()

    async def _look_again(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._signal.notify()

    async def _say_late(self, name: str) -> None:
        await asyncio.sleep(PATIENCE_S)
        self._parts.journal.event(
            "worker_waits",
            f"{name} has not joined for {PATIENCE_S:g} s: it still loads, or no node has the resources it demands "
            "(`ray status` lists demands that nobody meets)",
        )


def make_policy(config: RunConfig) -> ScalingPolicy:
    """The policy of `scaling.policy`."""
    scaling = config.scaling
    if scaling.policy == "manual":
        return ManualPolicy()
    return QueuePolicy(
        least=scaling.rollout_min,
        most=most_workers(config)["rollout"],
        wait_target=scaling.wait_max,
        window=scaling.window,
        cooldown=scaling.cooldown,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
