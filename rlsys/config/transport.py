"""How versions travel, and what each way asks of the run's resources."""

from typing import TYPE_CHECKING, Literal

from rlsys.config.section import PositiveFloat, Section, refusal

if TYPE_CHECKING:
    from rlsys.config.schema import RunConfig

Transport = Literal["object_store", "gloo", "nccl", "ipc"]

COLLECTIVE = frozenset({"gloo", "nccl"})
"""Transports in which the learner and all workers take part at the same time."""

ON_GPU = frozenset({"nccl", "ipc"})
"""Transports whose bytes never leave the GPUs."""

SPLITTING = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""Engine options that spread one engine over several processes."""


class WeightsConfig(Section):
    """How versions reach the rollout workers."""

    transport: Transport = "object_store"
    """object_store: Ray's shared memory, one copy a node. gloo: broadcast from the learner over TCP. nccl: broadcast
    from GPU to GPU, each of them one process's own. ipc: learner and workers share one GPU, and its memory."""
    timeout_s: PositiveFloat = 60.0
    """A version that no worker acknowledges within this time stops the run."""


def require_fitting_transport(config: "RunConfig") -> None:
    """Refuse a transport that the run's resources cannot serve."""
    transport, resources, rollout = config.weights.transport, config.resources, config.rollout
    if transport == "object_store":
        return
    for option in SPLITTING:
        if rollout.engine_options.get(option, 1) != 1:
            raise refusal(
                f"rollout.engine_options.{option}",
                rollout.engine_options[option],
                f"must be 1 with weights.transport={transport}, which reaches one process a worker; "
                "weights.transport=object_store serves engines that are spread over several",
            )
    least = {"nccl": 1.0, "ipc": 0.0}.get(transport)
    if least is None:
        return
    for field in ("learner_gpus", "rollout_gpus"):
        share = getattr(resources, field)
        if share < least or share == 0:
            needs = "a whole GPU each, at least 1" if transport == "nccl" else "a share of one GPU, more than 0"
            raise refusal(
                f"resources.{field}",
                share,
                f"weights.transport={transport} needs {needs}; without GPUs allowed are object_store and gloo",
            )
    together = resources.learner_gpus + rollout.workers * resources.rollout_gpus
    if transport == "ipc" and together > 1:
        raise refusal(
            "weights.transport",
            transport,
            f"learner and workers must share one GPU, and resources.learner_gpus + rollout.workers x "
            f"resources.rollout_gpus is {together:g}; allowed for several GPUs are nccl and object_store",
        )
