"""Every error rlsys raises on purpose.

RlsysError
├── ConfigError            a field, its value, and what is allowed (before anything starts)
├── DataError              a dataset row or file that cannot be used
├── EngineError            the inference engine failed
│   └── PromptRefused      it can never sample this prompt; others are not touched
├── RewardError            a reward function raised, hung, or returned something unusable
├── StalenessViolation     a token older than `staleness.max` reached the learner
├── NonFiniteError         too many learner steps in a row with a NaN or infinite loss or gradient
├── WeightSyncError        a version could not be published, fetched, verified or applied
│   └── ChecksumMismatch   the bytes that arrived are not the bytes that were sent
├── LedgerError            a slot was moved in a way that would lose or repeat a sample
├── CheckpointError        a checkpoint is missing, partial, or belongs to another run
└── ClusterError           the Ray cluster is unreachable, too small, or refused us
    └── NoSuchRun          no run of this name goes on there
"""


class RlsysError(Exception):
    """Base of all deliberate errors; the CLI prints its message without a traceback."""


class ConfigError(RlsysError, ValueError):
    """A configuration that cannot run. The message names field, value and what is allowed."""


class DataError(RlsysError, ValueError):
    """A dataset that cannot be read, with the place (file and line) where it broke."""


class EngineError(RlsysError, RuntimeError):
    """The inference engine failed while serving a request, or has stopped."""


class PromptRefused(EngineError):
    """The engine can never sample this prompt; others are not touched."""


class RewardError(RlsysError, RuntimeError):
    """A reward that could not be computed; never turned into a silent zero."""


class StalenessViolation(RlsysError, RuntimeError):
    """A token older than the configured bound reached the learner."""


class NonFiniteError(RlsysError, ArithmeticError):
    """Several learner steps in a row produced a non-finite loss or gradient."""


class WeightSyncError(RlsysError, RuntimeError):
    """A weight version could not be published, fetched or applied."""


class ChecksumMismatch(WeightSyncError):
    """Weight bytes differ from what their manifest promises."""


class LedgerError(RlsysError, RuntimeError):
    """A slot transition that would lose a sample or train it twice."""


class CheckpointError(RlsysError, RuntimeError):
    """A checkpoint that is missing, partial, or belongs to another run."""


class ClusterError(RlsysError, RuntimeError):
    """The Ray cluster is unreachable, too small for the run, or refused it."""


class NoSuchRun(ClusterError):
    """No run of this name goes on in the cluster."""


def first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first in a group of tasks: the others fell because it did."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, BaseExceptionGroup) else first
