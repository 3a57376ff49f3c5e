"""What a run measures beside training, where it shows it, and when it raises an alarm."""

from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.section import Flag, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

SinkName = Literal["wandb", "mlflow", "trackio"]


class ProbeConfig(Section):
    """The split of the log-ratio into drift, lag and engine mismatch, by scoring under the weights that sampled."""

    fraction: Fraction = 0.05
    """Share of each batch's groups that is scored; 0: no probe, and nothing is kept for it."""


class AuditConfig(Section):
    """The corrected stale gradient against a fresh on-policy one."""

    every: NonNegative = 0
    """Steps between audits; 0: none. One costs about as much as sampling and training its prompts again."""
    prompts: Positive = 16
    """Groups of the batch that are sampled afresh."""


class AlarmsConfig(Section):
    """Limits beyond which a run says what is wrong and what to change. Null: no such alarm."""

    patience: Positive = 3
    """Steps in a row beyond a limit before the alarm is raised, and within it before it is cleared."""
    ess_sequence_min: Fraction | None = 0.3
    """ESS of the sequence weights, in the worst staleness bucket."""
    k3_max: PositiveFloat | None = 0.02
    """k3 between the policy and what sampled, nats per token. The default goes with an ESS of 0.96 a token."""
    engine_k3_max: PositiveFloat | None = None
    """k3 of the engine mismatch. None: 1e-5 when engine and learner are float32, otherwise 3e-3."""
    zero_variance_max: Fraction | None = 0.9
    """Share of groups without a signal."""
    ack_lag_max: Positive | None = 8
    """Versions the slowest worker may serve behind the learner."""
    stalled_s: PositiveFloat | None = 120.0
    """Seconds in which a role with work to do finished none."""


class ObservabilityConfig(Section):
    """Where a run's numbers go beside its own directory."""

    dashboard: Flag = False
    """Serve the dashboard beside the run."""
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = 0
    """Its port on loopback; 0: a free one."""
    prometheus: Flag = True
    """Export every metric through Ray's metrics endpoint."""
    trace: Flag = True
    """Write `trace.json`: what every role did when, for Perfetto and the dashboard's fleet page."""
    sinks: list[SinkName] = []
    """Further trackers, each an extra of this package. They keep their files in the run's directory when offline."""
    project: str = "rlsys"
    """Project name in those trackers."""


class StalenessController(Section):
    """AIMD on the admitted window: add a little while the ESS is above its target, cut when it is below."""

    target: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.7
    """ESS of the sequence weights to hold."""
    increase: NonNegativeFloat = 0.1
    """Versions added to the window after a step above the target."""
    decrease: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    """Factor on the window after a step below it."""
