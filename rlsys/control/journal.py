"""A run's journal, as its configuration asks for it."""

from rlsys.config.schema import RunConfig
from rlsys.observability.run_directory import RunDirectory
from rlsys.observability.sinks import RunJournal
from rlsys.observability.trackers import TrackedRun, open_trackers


def open_journal(config: RunConfig) -> RunJournal:
    """The run's history, and the trackers its configuration names."""
    directory = RunDirectory(config.path)
    tracked = TrackedRun(
        directory=directory.trackers.absolute(),
        name=config.name,
        project=config.observability.project,
        config=config.model_dump(mode="json"),
    )
    trackers = open_trackers(config.observability.sinks, tracked)
    return RunJournal(directory, tensorboard=config.records.tensorboard, trackers=trackers)
