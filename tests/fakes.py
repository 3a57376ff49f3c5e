"""In-process stand-ins for every part the control loop calls, and an event loop whose time costs nothing.

A `Rig` binds them as `control/build.py` binds the actors. Weights travel through the real `WeightSync`.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlsys.config import RunConfig, parse_config
from rlsys.control.ports import FinishedGroup, FleetStats, Update, WorkerLost
from rlsys.errors import RewardError
from rlsys.observability.alarms import Alarm
from rlsys.observability.catalogue import CATALOGUE, definition
from rlsys.observability.spans import Span
from rlsys.records import GroupScore, GroupSummary, LearnerStep, Prompt, Response, Rollout, RolloutGroup
from rlsys.scheduling.ledger import Closed
from rlsys.versions import VersionSpan, WeightManifest
from rlsys.weights.transport import WeightTicket

T = TypeVar("T")


class Deadlock(Exception):
    """Every task waits for another one: in a real run, a hang."""


class _InstantSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise Deadlock("every task waits for another one")
        self.now += 0.0 if events else timeout or 0.0
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sleeping takes no time, only advances `time()`; what can never wake up raises `Deadlock`."""

    def __init__(self) -> None:
        self._instant = _InstantSelector()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


def make_prompt(index: int, epoch: int = 0) -> Prompt:
    return Prompt(epoch=epoch, index=index, text=f"{index}", token_ids=(index,), answer="")


def make_ticket(version: int) -> WeightTicket:
    return WeightTicket(manifest=WeightManifest(version=version, layout=(), nbytes=0, checksum=""), payload=version)


def make_rollout(versions: Sequence[int], sample: int = 0) -> Rollout:
    """A response whose token i was sampled by versions[i]."""
    spans, start = [], 0
    for version, tokens in groupby(versions):
        stop = start + len(list(tokens))
        spans.append(VersionSpan(start=start, stop=stop, version=version))
        start = stop
    return Rollout(
        sample=sample,
        response_ids=np.arange(len(versions), dtype=np.int32),
        behavior_logprobs=np.full(len(versions), -1.0, dtype=np.float32),
        loss_mask=np.ones(len(versions), dtype=np.bool_),
        version_spans=tuple(spans),
        finish_reason="stop",
        text="",
    )


@dataclass
class FakeRollout:
    """Samples one token per `token_s` from the version it serves; takes `apply_s` to serve another one."""

    name: str
    token_s: float = 0.01
    tokens: Callable[[int], int] = lambda slot: 4
    samples: int = 2
    apply_s: float = 0.0
    version: int = 0
    refuse: Callable[[Prompt], Exception | None] = lambda prompt: None
    silent: bool = False
    """Whether it no longer answers health calls."""
    alive: bool = True
    load_s: float | None = 0.0
    """Seconds until it has loaded; None: never."""
    begun: list[tuple[int, int]] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    generated: int = 0
    died: asyncio.Event = field(default_factory=asyncio.Event)

    def kill(self) -> None:
        self.alive = False
        self.died.set()

    async def loaded(self) -> None:
        await (asyncio.Event().wait() if self.load_s is None else asyncio.sleep(self.load_s))
        self._require_alive()

    async def lost(self) -> None:
        await self.died.wait()
        self._require_alive()

    async def spans(self) -> list[Span]:
        self._require_alive()
        return []

    def _require_alive(self) -> None:
        if not self.alive:
            raise WorkerLost(f"{self.name} was killed")

    async def generate(self, slot: int, attempt: int, prompt: Prompt) -> tuple[GroupSummary, RolloutGroup]:
        self.begun.append((slot, attempt))
        self._require_alive()
        if error := self.refuse(prompt):
            raise error
        started, versions = now(), list[int]()
        for _ in range(self.tokens(slot)):
            await asyncio.sleep(self.token_s)
            self._require_alive()
            versions.append(self.version)
            self.generated += self.samples
        group = RolloutGroup(
            slot=slot,
            attempt=attempt,
            worker=self.name,
            prompt=prompt,
            rollouts=tuple(make_rollout(versions, sample) for sample in range(self.samples)),
            started_at=started,
            finished_at=now(),
        )
        return group.summary(), group

    async def greedy(self, prompts: Sequence[Prompt]) -> tuple[list[GroupSummary], list[RolloutGroup]]:
        results = [await self.generate(-1, 0, prompt) for prompt in prompts]
        return [summary for summary, _ in results], [group for _, group in results]

    async def stats(self) -> FleetStats:
        self._require_alive()
        if self.silent:
            await asyncio.Event().wait()
        return FleetStats(generated_tokens=self.generated, busy_s=now(), paused_s=0.0, workers=1)

    async def apply(self, ticket: WeightTicket) -> float:
        """As `weights.sync.Applier`."""
        await asyncio.sleep(self.apply_s)
        self._require_alive()
        self.version = ticket.manifest.version
        self.served.append(self.version)
        return 0.0


@dataclass
class FakeRewardWorker(FakeRollout):
    """Comes and goes; the scoring is `FakeRewards`'."""


@dataclass
class FakeRewards:
    """One point for everything; `fail` names what goes wrong with a group instead."""

    fail: Callable[[RolloutGroup], Exception | None] = lambda group: None
    score_s: float = 0.0
    workers: dict[str, Any] = field(default_factory=lambda: {"reward-0": FakeRewardWorker("reward-0")})
    busy: set[str] = field(default_factory=set)

    def add(self, name: str, worker: Any) -> None:
        self.workers[name] = worker

    def remove(self, name: str) -> None:
        self.workers.pop(name, None)

    async def idle(self, name: str) -> None:
        while name in self.busy:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def report_lost(self, to: Callable[[str, WorkerLost], None]) -> None:
        """They are noticed by their `lost`."""

    async def score(self, payload: RolloutGroup) -> GroupScore:
        await asyncio.sleep(self.score_s)
        if error := self.fail(payload):
            raise error
        rewards = np.ones(len(payload.rollouts), dtype=np.float32)
        return GroupScore(slot=payload.slot, attempt=payload.attempt, rewards=rewards, scored_at=now())

    async def score_all(self, payload: Sequence[RolloutGroup]) -> list[GroupScore]:
        return [await self.score(group) for group in payload]


@dataclass(frozen=True)
class Consumed:
    """A batch as the learner got it: its own version then, and the age of every token."""

    version: int
    slots: list[int]
    ages: list[int]
    at: float


@dataclass
class FakeLearner:
    """Counts versions. `refuse`: calls (from 0) whose batch it does not apply; `fail`: call -> error."""

    version: int = 0
    step_s: float = 0.01
    refuse: Iterable[int] = ()
    fail: Mapping[int, Exception] = field(default_factory=dict)
    metrics: Callable[[int], dict[str, float | None]] = lambda version: {}
    """What a step reports besides its reward."""
    batches: list[Consumed] = field(default_factory=list)
    saved: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)

    async def update(self, batch: Sequence[FinishedGroup], reference: Any) -> Update:
        call = len(self.batches)
        groups: list[RolloutGroup] = [group.payload for group in batch]
        versions = [v for group in groups for r in group.rollouts for v in r.token_versions().tolist()]
        ages = [self.version - version for version in versions]
        self.batches.append(Consumed(self.version, [group.slot for group in groups], ages, now()))
        await asyncio.sleep(self.step_s)
        if call in self.fail:
            raise self.fail[call]
        applied = call not in self.refuse
        self.version += applied
        step = LearnerStep(
            version=self.version,
            applied=applied,
            metrics={"reward/mean": 1.0, **self.metrics(self.version)},
            trained_tokens=len(ages),
            seconds=1.0,
        )
        return Update(step=step, ticket=make_ticket(self.version), arrays=None)

    async def publish(self) -> WeightTicket:
        return make_ticket(self.version)

    async def save(self, directory: Path, extra: Mapping[str, Any]) -> None:
        await asyncio.sleep(self.step_s)
        self.saved.append((directory, dict(extra)))


class FakeReference:
    """Scores at once; the payload is the slots it scored."""

    def score(self, payloads: Sequence[RolloutGroup]) -> list[int]:
        return [group.slot for group in payloads]


@dataclass
class FakeRecorder:
    """Remembers what it was to write; `fail`: name of a file -> error."""

    write_s: float = 0.0
    fail: Mapping[str, Exception] = field(default_factory=dict)
    files: list[tuple[str, int, list[int]]] = field(default_factory=list)

    async def write(self, name: str, version: int, batch: Sequence[FinishedGroup], arrays: Any) -> None:
        await asyncio.sleep(self.write_s)
        if name in self.fail:
            raise self.fail[name]
        self.files.append((name, version, [group.summary.slot for group in batch]))


@dataclass
class FakeProbe:
    """Finds 0.1 of everything, after `split_s`."""

    split_s: float = 0.0
    error: Exception | None = None
    kept: list[int] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)

    def keep(self, ticket: WeightTicket) -> None:
        self.kept.append(ticket.manifest.version)

    async def split(self, version: int, batch: Sequence[FinishedGroup], arrays: Any) -> dict[str, float | None]:
        await asyncio.sleep(self.split_s)
        self.probed.append(version)
        if self.error is not None:
            raise self.error
        return {name: 0.1 for name in CATALOGUE if name.startswith("split/")}


@dataclass
class FakeAudit:
    """Remembers what it was asked for; `fail`: version of the ticket -> error."""

    audit_s: float = 0.0
    fail: Mapping[int, Exception] = field(default_factory=dict)
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    async def audit(self, batch: Sequence[FinishedGroup], ticket: WeightTicket) -> dict[str, float | None]:
        version = ticket.manifest.version
        self.asked.append((version, [group.summary.slot for group in batch]))
        await asyncio.sleep(self.audit_s)
        if version in self.fail:
            raise self.fail[version]
        return {"audit/cosine": 0.5, "audit/norm_ratio": 1.0, "audit/cosine_floor": 0.6}


@dataclass
class FakeJournal:
    """Refuses metrics without a definition, as the real one does."""

    rows: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)
    closed: list[Closed] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    traced: dict[str, list[Span]] = field(default_factory=dict)
    ticks: int = 0

    def step(self, version: int, metrics: Mapping[str, float | None]) -> None:
        for name in metrics:
            definition(name)
        self.rows.append((version, dict(metrics)))

    def event(self, kind: str, message: str) -> None:
        self.events.append((kind, message))

    def alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)

    def tick(self) -> None:
        self.ticks += 1

    def spans(self, role: str, spans: Sequence[Span]) -> None:
        self.traced.setdefault(role, []).extend(spans)

    @property
    def steps(self) -> list[int]:
        """Versions of the learner steps' rows, in the order written."""
        return [version for version, metrics in self.rows if "reward/mean" in metrics]

    @property
    def evaluations(self) -> list[int]:
        return [version for version, metrics in self.rows if "eval/accuracy" in metrics]


@dataclass
class FakeLauncher:
    """Makes what `rollout` and `reward` make; by default workers that never find a place."""

    rollout_worker: Callable[[str], FakeRollout] = lambda name: FakeRollout(name, load_s=None)
    reward_worker: Callable[[str], FakeRewardWorker] = lambda name: FakeRewardWorker(name, load_s=None)
    started: list[tuple[str, int]] = field(default_factory=list)
    """Names and seats."""
    made: dict[str, FakeRollout] = field(default_factory=dict)

    def rollout(self, name: str, number: int, seat: int) -> FakeRollout:
        self.started.append((name, seat))
        self.made[name] = self.rollout_worker(name)
        return self.made[name]

    def reward(self, name: str) -> FakeRewardWorker:
        self.started.append((name, -1))
        worker = self.made[name] = self.reward_worker(name)
        return worker


@dataclass
class FakePrompts:
    index: int = 0

    def __next__(self) -> Prompt:
        self.index += 1
        return make_prompt(self.index - 1)

    def state(self) -> dict[str, object]:
        return {"epoch": 0, "index": self.index}


def same_parity(prompt: Prompt, response: Response) -> float:
    """A reward that an untrained model sometimes earns, and that needs the prompt's answer."""
    return float(len(response.text) % 2 == len(prompt.answer) % 2)


def make_config(directory: Path, *overrides: str) -> RunConfig:
    """Two prompts a step, two samples each, and nothing that starts by itself."""
    small = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "learner.steps=6", "eval.every=0")
    return parse_config({"task": {"name": "arithmetic"}, "run_dir": str(directory)}, [*small, *overrides])


def broken_reward(*slots: int) -> Callable[[RolloutGroup], Exception | None]:
    """Rewards that fail for these slots; for all, if none is named."""
    return lambda group: RewardError(f"no reward for {group.slot}") if not slots or group.slot in slots else None
