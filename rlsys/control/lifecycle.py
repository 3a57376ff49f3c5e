"""From a configuration to a trained checkpoint: `train` is what `rlsys train` runs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.load import dump_config
from rlsys.config.schema import JsonlTask, RunConfig
from rlsys.control.ports import WorkerLost
from rlsys.control.preflight import check_config, load_prompts
from rlsys.control.service import NAMESPACE, ControllerActor, Status
from rlsys.control.transports import require_transport
from rlsys.errors import CheckpointError, ClusterError, ConfigError
from rlsys.observability.run_directory import RunDirectory
from rlsys.versions import PolicyVersion

log = logging.getLogger(__name__)

POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run came to. `accuracy` is the held-out greedy reward by learner version."""

    directory: Path
    checkpoint: Path
    version: PolicyVersion
    accuracy: dict[PolicyVersion, float]
    ledger: dict[str, int]
    seconds: float
    plot: Path

    @property
    def before(self) -> float | None:
        """Accuracy at the first evaluated version."""
        return self.accuracy[min(self.accuracy)] if self.accuracy else None

    @property
    def after(self) -> float | None:
        """Accuracy at the last evaluated version."""
        return self.accuracy[max(self.accuracy)] if self.accuracy else None


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    on_status: Callable[[Status], None] = lambda status: None,
    on_warmstart: Callable[[int, int, float], None] | None = None,
    on_dashboard: Callable[[str], None] = lambda url: None,
) -> TrainResult:
    """Train to `learner.steps`; the same as `rlsys train`.

    With `resume` it goes on from the run's last checkpoint, from the beginning where the run ended before its first.
    `on_status` sees the run about twice a second; `on_warmstart` sees (step, steps, loss) of the supervised phase of
    a tiny model; `on_dashboard` gets the address when `observability.dashboard` is set.
    Ctrl-C finishes the current step, writes a checkpoint and returns.
    Raises `RlsysError`s: before anything starts for bad input, later for what stopped the run.
    """
    from rlsys.control.cluster import cluster
    from rlsys.control.runs import require_free

    check_config(config)
    require_transport(config)
    config = from_anywhere(config)
    directory = RunDirectory(config.path)
    _start_from(directory, config, resume)  # refused before the warm start, which may take minutes
    path = initial_model(config, on_warmstart)
    load_prompts(config, path)
    started = time.perf_counter()
    control = Control()
    with directory.held(), cluster(config):
        require_free(config.name)
        checkpoint = _start_from(directory, config, resume)
        if resume:
            _rewind(directory, checkpoint)
        directory.write_config(dump_config(config))
        with _dashboard(config, directory, control, on_dashboard):
            status = _run(config, path, checkpoint, control, on_status)
    from rlsys.observability.plots import plot_run

    return TrainResult(
        directory=directory.root,
        checkpoint=directory.checkpoints / f"step-{status.version:06d}",
        version=status.version,
        accuracy=evaluations(directory),
        ledger=status.ledger,
        seconds=time.perf_counter() - started,
        plot=plot_run(directory),
    )


class Control:
    """What the dashboard beside a run may do to it."""

    def __init__(self) -> None:
        self.controller: Any = None

    def scale(self, workers: Mapping[str, int]) -> None:
        """Ask for so many workers of each role. Raises ConfigError, and ClusterError while there is nobody to ask."""
        from rlsys.control.remote import unwrap

        if self.controller is None:
            raise ClusterError("the run has not started yet")
        unwrap(self.controller.scale.remote(**workers))


@contextmanager
def _dashboard(
    config: RunConfig, directory: RunDirectory, control: Control, on_dashboard: Callable[[str], None]
) -> Iterator[None]:
    """The dashboard beside the run, on loopback, for as long as the run lasts."""
    if not config.observability.dashboard:
        yield
        return
    from rlsys.dashboard import serve_in_thread

    served = serve_in_thread(directory.root, config.observability.port, scale=control.scale)
    try:
        on_dashboard(served.url)
        yield
    finally:
        served.stop()


def initial_model(config: RunConfig, on_warmstart: Callable[[int, int, float], None] | None = None) -> str:
    """The initial policy: `model.path`, or the directory of the warm-started tiny model (made once, then cached).

    Directories are absolute: a cluster that was there before works elsewhere.
    """
    if config.model.path is not None:
        directory = Path(config.model.path)
        return str(directory.absolute()) if directory.is_dir() else config.model.path
    import torch

    from rlsys.learning.warmstart import ensure_warmstart
    from rlsys.tasks import build_task

    torch.set_num_threads(config.resources.learner_threads)  # a tiny model is slower on more
    task = build_task(config.task, config.seed)
    return str(ensure_warmstart(config.model, task, config.seed, on_warmstart).absolute())


def evaluations(directory: RunDirectory) -> dict[PolicyVersion, float]:
    """Held-out accuracy by version, from the run's own metrics."""
    return {row["step"]: row["eval/accuracy"] for row in directory.rows() if "eval/accuracy" in row}


def from_anywhere(config: RunConfig) -> RunConfig:
    """The same with absolute paths: actors of a cluster that was there before work in another directory."""
    update: dict[str, Any] = {"run_dir": config.run_dir.absolute()}
    if isinstance(config.task, JsonlTask):
        paths = {field: getattr(config.task, field) for field in ("path", "eval_path")}
        absolute = {field: path.absolute() for field, path in paths.items() if path is not None}
        update["task"] = config.task.model_copy(update=absolute)
    return config.model_copy(update=update)


def _start_from(directory: RunDirectory, config: RunConfig, resume: bool) -> Path | None:
    """The checkpoint to resume from; None: from the beginning. Raises when the run cannot be started so."""
    if not resume:
        directory.require_new()
        return None
    from rlsys.control.build import read_extra
    from rlsys.learning.checkpoint import latest

    checkpoint = latest(directory.root)
    if checkpoint is None:
        if directory.has_checkpoints:
            raise CheckpointError(
                f"--resume: {directory.checkpoints} holds no complete checkpoint; remove what is there to start from "
                "the beginning, or choose another name (name=...)"
            )
        if not directory.metrics.exists():
            raise CheckpointError(
                f"--resume: {directory.root} holds no run; look at name and run_dir, or start it without --resume"
            )
        return None
    version = int(read_extra(checkpoint)["version"])
    if version >= config.learner.steps:
        raise ConfigError(
            f"learner.steps={config.learner.steps}: the run is already at step {version}; raise it to go on"
        )
    return checkpoint


def _rewind(directory: RunDirectory, checkpoint: Path | None) -> None:
    """Forget what the run recorded after its checkpoint, or all, where it ended before the first."""
    from rlsys.control.build import read_extra

    if checkpoint is None:
        log.warning("%s ended before its first checkpoint: starting from the beginning", directory.root)
        directory.rewind(0, cursor=(0, 0))
        return
    state = read_extra(checkpoint)
    version, extra = int(state["version"]), state["extra"]
    cursor = (extra["source"]["epoch"], extra["source"]["index"])
    directory.rewind(version, cursor=cursor, reopened={(epoch, index) for epoch, index in extra["open"]})


def _run(
    config: RunConfig, path: str, checkpoint: Path | None, control: Control, on_status: Callable[[Status], None]
) -> Status:
    import ray

    from rlsys.control.remote import this_node, unwrap

    options = {"name": config.name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 16}
    controller = ControllerActor.options(**options, scheduling_strategy=this_node()).remote(config, path, checkpoint)  # type: ignore[attr-defined]
    control.controller = controller
    finished = controller.run.remote()
    stopping = False
    while True:
        try:
            done, _ = ray.wait([finished], timeout=POLL_S)
            status: Status = unwrap(finished if done else controller.status.remote())
            on_status(status)
            if done:
                return status
        except WorkerLost as error:
            raise ClusterError(
                f"run {config.name} was ended from outside, by `rlsys stop --now` or with its process; --resume goes "
                f"on from its last checkpoint: {error}"
            ) from error
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            log.warning("stopping after the current step; press Ctrl-C again to leave without a checkpoint")
            unwrap(controller.stop.remote())
