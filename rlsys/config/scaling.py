"""How many workers a run has, and how that changes while it runs."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from rlsys.config.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, refusal

if TYPE_CHECKING:
    from rlsys.config.schema import RunConfig

ROOM = 8
"""Workers of a role that a run may grow to when nothing else is said."""


class ScalingConfig(Section):
    """A run begins with `rollout.workers` and `reward.workers`; this says what may become of them."""

    policy: Literal["manual", "queue"] = "manual"
    """manual: as many as somebody asks for. queue: as few rollout workers as keep the learner's wait at `wait_max`."""
    rollout_min: Positive = 1
    """Fewest rollout workers that the policy leaves."""
    rollout_max: Positive | None = None
    """Most rollout workers, whoever asks; a cluster of our own has room for them. None: 8, or `rollout.workers`."""
    reward_max: Positive | None = None
    """Most reward workers. None: 8, or `reward.workers`."""
    wait_max: Fraction = 0.1
    """queue: share of a step's time that the learner may wait for a batch."""
    window: Positive = 5
    """queue: learner steps that one decision looks at."""
    cooldown: NonNegative = 10
    """queue: learner steps after a change in the workers that no decision looks at."""
    grace_s: NonNegativeFloat = 30.0
    """A worker that is to go may finish what it has for this long; then it hands its prompts back."""
    max_restarts: NonNegative = 5
    """Workers of a role that may die in a row without having worked for half a minute; another one gives up."""
    backoff_s: PositiveFloat = 1.0
    """Wait before such a worker is started again, doubled with each in a row, up to a minute."""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.rollout_max is not None and self.rollout_min > self.rollout_max:
            raise refusal("rollout_min", self.rollout_min, f"must not exceed rollout_max={self.rollout_max}")
        if self.wait_max >= 1:
            raise refusal("wait_max", self.wait_max, "must be less than 1: the learner would never be missed")
        return self

    def require_room(self, *, rollout: int, reward: int) -> None:
        """Refuse limits below what a run begins with."""
        for role, limit, workers in (("rollout", self.rollout_max, rollout), ("reward", self.reward_max, reward)):
            if limit is not None and limit < workers:
                raise refusal(f"scaling.{role}_max", limit, f"must be at least {role}.workers={workers}")


def most_workers(config: "RunConfig") -> dict[str, int]:
    """Workers of each role that a run may grow to."""
    scaling = config.scaling
    return {
        "rollout": scaling.rollout_max or max(ROOM, config.rollout.workers),
        "reward": scaling.reward_max or max(ROOM, config.reward.workers),
    }
