"""The parts the control loop calls, as it sees them. `build` binds them to Ray actors; tests to plain objects.

Payloads are opaque to the loop: with Ray they are object references, so responses and weights never pass
through the controller.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlsys.errors import ClusterError
from rlsys.observability.alarms import Alarm
from rlsys.observability.spans import Span
from rlsys.records import GroupScore, GroupSummary, LearnerStep, Prompt
from rlsys.versions import PolicyVersion
from rlsys.weights.sync import Ack
from rlsys.weights.transport import WeightTicket

Payload = Any
"""Something heavy held elsewhere."""


class WorkerLost(Exception):
    """The process behind a port died; its work has to be done again elsewhere."""


class PayloadLost(Exception):
    """The node that held a payload is gone; what was in it has to be made again."""


class MakerLost(ClusterError):
    """The process that was to make a payload died before it did; who was to get it lives, and has done nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """A scored group: what the controller knows, and where the responses are."""

    summary: GroupSummary
    score: GroupScore
    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A learner step, the weights it made, and the per-token record of what it did."""

    step: LearnerStep
    ticket: WeightTicket
    arrays: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStats:
    """Sums over rollout workers since their start: tokens, seconds decoding, seconds paused for syncs."""

    generated_tokens: int
    busy_s: float
    paused_s: float
    workers: int


class WorkerPort(Protocol):
    """A worker that may come and go while the run goes on."""

    async def loaded(self) -> None:
        """Returns when it can work, however long it takes to find a place for it. Raises `WorkerLost`."""

    async def lost(self) -> None:
        """Never returns; raises `WorkerLost` when the worker is dead."""

    async def spans(self) -> list[Span]:
        """What it did since the last call. Raises `WorkerLost`."""

    def kill(self) -> None:
        """End it at once, wherever it is in its life; a place it waits for is no longer demanded."""


class RolloutPort(WorkerPort, Protocol):
    """One rollout worker."""

    async def generate(self, slot: int, attempt: int, prompt: Prompt) -> tuple[GroupSummary, Payload]:
        """Sample a group. Raises `WorkerLost` when the worker died."""

    async def greedy(self, prompts: Sequence[Prompt]) -> tuple[list[GroupSummary], Payload]:
        """One greedy response to each prompt, for evaluation."""

    async def stats(self) -> FleetStats:
        """Counters of this worker."""


class RewardPort(Protocol):
    """All reward workers. While there is none, calls wait for one."""

    @property
    def workers(self) -> Mapping[str, WorkerPort]:
        """Those that take calls."""

    def add(self, name: str, worker: Any) -> None:
        """It takes its turn from now on."""

    def remove(self, name: str) -> None:
        """It gets no further call; what it has under way goes on."""

    async def idle(self, name: str) -> None:
        """Returns when a worker has nothing under way."""

    def report_lost(self, to: Callable[[str, WorkerLost], None]) -> None:
        """Whom to tell the name of a worker that died over a call, beside who made the call."""

    async def score(self, payload: Payload) -> GroupScore:
        """Rewards of a group. Raises `RewardError`."""

    async def score_all(self, payload: Payload) -> list[GroupScore]:
        """Rewards of several groups in one payload. Raises `RewardError`."""


class ReferencePort(Protocol):
    """The frozen reference policy."""

    def score(self, payloads: Sequence[Payload]) -> Payload:
        """Start scoring a batch; returns the payload of its log-probs at once."""


class LearnerPort(Protocol):
    """The learner."""

    async def update(self, batch: Sequence[FinishedGroup], reference: Payload | None) -> Update:
        """One optimizer step. Raises `StalenessViolation`, `NonFiniteError`."""

    async def publish(self) -> WeightTicket:
        """The current version, ready to be fetched."""

    async def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically."""


class WeightsPort(Protocol):
    """The weight-sync service."""

    async def publish(self, ticket: WeightTicket) -> None:
        """Returns when a worker serves the version. Raises `WeightSyncError`."""

    async def acks(self, cursor: int) -> list[Ack]:
        """Acknowledgements after the first `cursor` ones; waits for one."""

    async def add(self, name: str, worker: Any) -> None:
        """A worker joins: it is brought to the current version, and acknowledges it."""

    async def remove(self, name: str) -> None:
        """A worker left; nothing is sent to it any more."""


class RecorderPort(Protocol):
    """Writes what happened to every token of a batch."""

    async def write(self, name: str, version: int, batch: Sequence[FinishedGroup], arrays: Payload) -> None:
        """One parquet file, `name` without its suffix."""


class ProbePort(Protocol):
    """Splits the log-ratio under the weights that sampled."""

    def keep(self, ticket: WeightTicket) -> None:
        """Start to hold a version's weights while its tokens may still be trained; what fails, `split` raises."""

    async def split(
        self, version: PolicyVersion, batch: Sequence[FinishedGroup], arrays: Payload
    ) -> dict[str, float | None]:
        """`split/…` of the batch trained at `version`, from a share of its groups."""


class RolePort(Protocol):
    """A role that notes what it does."""

    async def spans(self) -> list[Span]:
        """Since the last call. Raises `WorkerLost` when it died."""


class AuditPort(Protocol):
    """Compares the gradient of a trained batch with on-policy ones."""

    async def audit(self, batch: Sequence[FinishedGroup], ticket: WeightTicket) -> Mapping[str, float | None]:
        """`audit/*` of these groups at the ticket's version, the one their batch was trained from."""


class LauncherPort(Protocol):
    """Starts workers. Returns at once: what they need may still have to be found."""

    def rollout(self, name: str, number: int, seat: int) -> RolloutPort:
        """A rollout worker. No other one ever has its `number`, no other one at this time its `seat`."""

    def reward(self, name: str) -> WorkerPort:
        """A reward worker."""


class Prompts(Protocol):
    """An endless, resumable source of prompts."""

    def __next__(self) -> Prompt:
        """The next prompt."""

    def state(self) -> Mapping[str, object]:
        """Where it stands, for a checkpoint."""


class Journal(Protocol):
    """Where a run's history goes."""

    def step(self, version: PolicyVersion, metrics: Mapping[str, float | None]) -> None:
        """One learner step."""

    def event(self, kind: str, message: str) -> None:
        """Something a person should read."""

    def alarm(self, alarm: Alarm) -> None:
        """An alarm was raised or cleared."""

    def spans(self, role: str, spans: Sequence[Span]) -> None:
        """What a role did, for the trace."""

    def tick(self) -> None:
        """Another second has passed: what has to be said again, is."""


@dataclass(slots=True)
class Parts:
    """What the loop works with; made by `build`."""

    prompts: Prompts
    rollouts: dict[str, RolloutPort]
    rewards: RewardPort
    reference: ReferencePort | None
    learner: LearnerPort
    weights: WeightsPort
    recorder: RecorderPort | None
    journal: Journal
    launcher: LauncherPort
    probe: ProbePort | None = None
    audit: AuditPort | None = None
    roles: dict[str, RolePort] = field(default_factory=dict)
