"""Makes the actors whose number changes while a run goes on, at its start and later."""

from rlsys.actors.reward import RewardActor
from rlsys.actors.rollout import RolloutActor
from rlsys.config.schema import RunConfig
from rlsys.control.remote import RemoteRollout, RemoteWorker
from rlsys.versions import PolicyVersion


def role_resources(config: RunConfig, role: str) -> dict[str, float]:
    """The custom resource that places an actor, where the configuration asks for it."""
    return {role: 1.0} if config.resources.roles else {}


class Launcher:
    """Actors that demand what their role needs; Ray waits until a node has it.

    `path`: the initial model. A worker that joins later begins with it, as version 0, and gets the current version
    before it gets a prompt: the checkpoint that the run was resumed from may be pruned by then.
    """

    def __init__(self, config: RunConfig, path: str) -> None:
        self._config, self._path = config, path

    def rollout(
        self, name: str, number: int, seat: int, *, serving: str | None = None, version: PolicyVersion = 0
    ) -> RemoteRollout:
        """See `LauncherPort`. `serving`: a directory that holds `version`; None: the initial model."""
        config = self._config
        actor = RolloutActor.options(  # type: ignore[attr-defined]
            num_cpus=1, num_gpus=config.resources.rollout_gpus, resources=role_resources(config, "rollout")
        )
        return RemoteRollout(actor.remote(name, number, seat, serving or self._path, config, version))

    def reward(self, name: str) -> RemoteWorker:
        """See `LauncherPort`."""
        actor = RewardActor.options(num_cpus=0, resources=role_resources(self._config, "reward"))  # type: ignore[attr-defined]
        return RemoteWorker(actor.remote(self._config))
