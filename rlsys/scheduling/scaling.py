"""How many rollout workers a run should have: a policy looks at what the learner saw and decides.

A decision is data. `control/reconcile.py` executes it, or what a person asked for instead.
"""

from collections import deque
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import Protocol

from rlsys.versions import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A run just after learner step `step`, with its rollout workers: `desired` and `ready`.

    `learner_wait`: share of that step's time in which the learner waited for a batch, below 1.
    `batches_ahead`: finished groups that wait for the learner, in batches.
    `rollout_idle`: share of time in which the workers decoded nothing; None: not known yet.
    """

    step: PolicyVersion
    desired: int
    ready: int
    learner_wait: float
    batches_ahead: float
    rollout_idle: float | None = None


@dataclass(frozen=True, slots=True)
class Keep:
    """All is well, or too little is known."""


@dataclass(frozen=True, slots=True)
class Resize:
    """There should be `rollout` workers, for `reason`."""

    rollout: int
    reason: str


Decision = Keep | Resize


class ScalingPolicy(Protocol):
    """Decides after every learner step."""

    def after_step(self, seen: Observation) -> Decision:
        """What to do about it."""


class ManualPolicy:
    """As many as somebody asked for."""

    def after_step(self, seen: Observation) -> Decision:
        """Nothing, whatever is seen."""
        return Keep()


class QueuePolicy:
    """As few workers as keep the learner's wait under `wait_target`, between `least` and `most`.

    Decides on the means of `window` steps, none of them within `cooldown` steps after a change in the workers.

    Grow: a learner step takes L, and with the wait w all of it L/(1 - w), in which n workers make a batch. For a wait
    of t there have to be n' = ⌈n (1 - t)/(1 - w)⌉ of them; at most 2n at once. But not when finished groups pile up
    (the learner waits for a straggler) or the workers idle (for a reward, or for the bound): more would not help.

    Shrink: by one, when every step found another batch finished and the wait is below t/2, which data grows stale in
    the queue for; and n - 1 workers, busy n/(n - 1) times as long, would still idle `SPARE` of the time.
    """

    SPARE = 0.1
    IDLE = 0.5
    """Workers that idle this share of the time are not what the learner waits for."""

    def __init__(self, *, least: int, most: int, wait_target: float, window: int, cooldown: int) -> None:
        self._least, self._most, self._target, self._cooldown = least, most, wait_target, cooldown
        self._recent: deque[Observation] = deque(maxlen=window)
        self._desired: int | None = None
        self._from: PolicyVersion = 0

    def after_step(self, seen: Observation) -> Decision:
        """Keep while workers come or go, and while too little was seen since."""
        if seen.desired != self._desired or seen.ready != seen.desired:
            self._desired, self._from = seen.desired, seen.step + self._cooldown
            self._recent.clear()
        elif seen.step > self._from:
            self._recent.append(seen)
        if len(self._recent) < (self._recent.maxlen or 1):
            return Keep()
        return self._decide(seen.desired)

    def _decide(self, n: int) -> Decision:
        recent = self._recent
        wait = fmean(one.learner_wait for one in recent)
        ahead = [one.batches_ahead for one in recent]
        known = [one.rollout_idle for one in recent if one.rollout_idle is not None]
        idle = fmean(known) if known else None
        wanted = min(self._most, 2 * n, ceil(n * (1 - self._target) / (1 - wait)))
        if wait > self._target and wanted > n and fmean(ahead) < 1 and (idle is None or idle < self.IDLE):
            return Resize(wanted, f"the learner waits {wait:.0%} of the time, more than {self._target:.0%}")
        enough = idle is not None and (1 - idle) * n <= (1 - self.SPARE) * (n - 1)
        if wait <= self._target / 2 and n > self._least and min(ahead) >= 1 and enough:
            return Resize(n - 1, f"a batch always waits, and the workers idle {idle:.0%} of the time")
        return Keep()
