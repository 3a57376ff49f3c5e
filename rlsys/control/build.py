"""The composition root: makes every actor of a run and binds them to the control loop."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from rlsys.actors.audit import AuditActor
from rlsys.actors.learner import LearnerActor
from rlsys.actors.probe import ProbeActor
from rlsys.actors.recorder import RecorderActor
from rlsys.actors.reference import ReferenceActor
from rlsys.actors.weight_sync import WeightSyncActor
from rlsys.config.schema import RunConfig
from rlsys.control import remote
from rlsys.control.launch import Launcher, role_resources
from rlsys.control.learner import RemoteLearner
from rlsys.control.loop import TrainingLoop
from rlsys.control.ports import Journal, Parts, WorkerLost
from rlsys.control.preflight import load_prompts
from rlsys.errors import ClusterError
from rlsys.observability.run_directory import RunDirectory
from rlsys.observability.sinks import RunJournal
from rlsys.scheduling.ledger import Ledger
from rlsys.tasks import PromptSource


@dataclass(slots=True)
class Fleet:
    """Handles of the actors that a run starts with, and what starts more."""

    learner: list[ActorHandle]
    weights: ActorHandle
    rollouts: dict[str, ActorHandle]
    rewards: dict[str, ActorHandle]
    recorder: ActorHandle
    launcher: Launcher
    reference: ActorHandle | None = None
    probe: ActorHandle | None = None
    audit: ActorHandle | None = None

    @property
    def roles(self) -> dict[str, ActorHandle]:
        """Every actor, by the name it has in the trace."""
        found = {f"learner-{rank}" if rank else "learner": handle for rank, handle in enumerate(self.learner)}
        found |= {**self.rollouts, **self.rewards}
        optional = {"reference": self.reference, "probe": self.probe, "audit": self.audit}
        return found | {name: h for name, h in optional.items() if h is not None} | {"recorder": self.recorder}


def start_actors(config: RunConfig, path: str, resume: Path | None, version: int) -> Fleet:
    """Create all actors at once; they load in parallel. `path` is the initial model, also the reference."""
    resources, launcher = config.resources, Launcher(config, path)
    serving, beside = str(resume or path), remote.this_node()
    learners = [
        LearnerActor.options(  # type: ignore[attr-defined]
            num_cpus=1, num_gpus=resources.learner_gpus, resources=role_resources(config, "learner")
        ).remote(path, config, resume, rank)
        for rank in range(config.learner.ranks)
    ]
    fleet = Fleet(
        learner=learners,
        weights=WeightSyncActor.options(num_cpus=0, scheduling_strategy=beside).remote(config, learners[0]),  # type: ignore[attr-defined]
        rollouts={
            f"rollout-{i}": launcher.rollout(f"rollout-{i}", i, i, serving=serving, version=version).handle
            for i in range(config.rollout.workers)
        },
        rewards={f"reward-{i}": launcher.reward(f"reward-{i}").handle for i in range(config.reward.workers)},
        recorder=RecorderActor.options(num_cpus=0, scheduling_strategy=beside).remote(config),  # type: ignore[attr-defined]
        launcher=launcher,
    )
    if config.kl.reference:
        fleet.reference = ReferenceActor.options(num_cpus=0, num_gpus=resources.reference_gpus).remote(path, config)  # type: ignore[attr-defined]
    if config.probe.fraction:
        fleet.probe = ProbeActor.options(num_cpus=0, num_gpus=resources.reference_gpus).remote(path, config)  # type: ignore[attr-defined]
    if config.audit.every:
        fleet.audit = AuditActor.options(num_cpus=0).remote(path, config)  # type: ignore[attr-defined]
    return fleet


async def build(config: RunConfig, path: str, resume: Path | None) -> tuple[TrainingLoop, Fleet, RunJournal]:
    """A loop ready to run. Returns when the learner, the reference and every worker have loaded.

    Raises `ClusterError` when one of them dies of it.
    """
    trainer_state = read_extra(resume) if resume else {}
    version = int(trainer_state.get("version", 0))
    fleet = start_actors(config, path, resume, version)
    prompts = await asyncio.to_thread(load_prompts, config, path)
    ready = [RemoteLearner(fleet.learner).load(), *(worker.stats.remote() for worker in fleet.rollouts.values())]
    ready += [worker.__ray_ready__.remote() for worker in fleet.rewards.values()]
    ready += [handle.ready.remote() for handle in (fleet.reference, fleet.probe, fleet.audit) if handle is not None]
    try:
        await remote.all_ready(ready)
    except WorkerLost as error:
        raise ClusterError(f"a part of the run could not be started: {error}") from error
    for name, handle in fleet.rollouts.items():
        await remote.call(fleet.weights.add.remote(name, handle))

    extra: dict[str, Any] = trainer_state.get("extra", {})
    if extra:
        prompts.source.restore(extra["source"])
    journal = RunJournal(RunDirectory(config.path), config)
    ledger = Ledger(
        capacity=config.slots,
        window=config.staleness.window,
        on_close=journal.closed,
        first_id=int(extra.get("next_slot", 0)),
    )
    loop = TrainingLoop(
        config,
        connect(fleet, prompts.source, journal),
        ledger=ledger,
        eval_prompts=prompts.held_out,
        version=version,
        reopened=[prompts.source.prompt(epoch, index) for epoch, index in extra.get("open", [])],
        window=extra.get("window"),
    )
    return loop, fleet, journal


def connect(fleet: Fleet, prompts: PromptSource, journal: Journal) -> Parts:
    """The control loop's ports over a fleet."""
    return Parts(
        prompts=prompts,
        rollouts={name: remote.RemoteRollout(handle) for name, handle in fleet.rollouts.items()},
        rewards=remote.RemoteRewards(fleet.rewards),
        reference=remote.RemoteReference(fleet.reference) if fleet.reference is not None else None,
        learner=RemoteLearner(fleet.learner),
        weights=remote.RemoteWeights(fleet.weights),
        recorder=remote.RemoteRecorder(fleet.recorder),
        journal=journal,
        probe=remote.RemoteProbe(fleet.probe) if fleet.probe is not None else None,
        audit=remote.RemoteAudit(fleet.audit) if fleet.audit is not None else None,
        launcher=fleet.launcher,
        roles={name: remote.RemoteRole(handle) for name, handle in fleet.roles.items()},
    )


def read_extra(checkpoint: Path) -> dict[str, Any]:
    """What the loop stored with a checkpoint: its version, the prompt cursor and the open prompts."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer" / "state.json").read_text())
    return state
