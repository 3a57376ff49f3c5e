"""The control loop among its fakes, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig
from rlsys.control.loop import TrainingLoop
from rlsys.control.ports import Parts
from rlsys.records import Prompt
from rlsys.scheduling.ledger import Ledger
from rlsys.weights.sync import WeightSync
from tests.fakes import (
    FakeAudit,
    FakeJournal,
    FakeLauncher,
    FakeLearner,
    FakeProbe,
    FakePrompts,
    FakeRecorder,
    FakeReference,
    FakeRewards,
    FakeRollout,
    make_config,
    now,
    run,
)


@dataclass
class Rig:
    """A control loop and the fakes it works with; change them before `run`."""

    config: RunConfig
    workers: list[FakeRollout] = field(default_factory=lambda: [FakeRollout("a")])
    rewards: FakeRewards = field(default_factory=FakeRewards)
    learner: FakeLearner = field(default_factory=FakeLearner)
    recorder: FakeRecorder = field(default_factory=FakeRecorder)
    journal: FakeJournal = field(default_factory=FakeJournal)
    prompts: FakePrompts = field(default_factory=FakePrompts)
    launcher: FakeLauncher = field(default_factory=FakeLauncher)
    reference: FakeReference | None = None
    probe: FakeProbe | None = None
    audit: FakeAudit = field(default_factory=FakeAudit)
    roles: dict[str, Any] = field(default_factory=dict)
    reopened: Sequence[Prompt] = ()
    eval_prompts: Sequence[Prompt] = ()
    first_id: int = 0
    window: float | None = None
    served: set[str] = field(default_factory=set)
    """Workers that new versions were sent to when the run ended."""

    def __post_init__(self) -> None:
        self.weights: WeightSync = WeightSync(timeout_s=self.config.weights.timeout_s)
        self.ledger = Ledger(
            capacity=self.config.slots,
            window=self.config.staleness.window,
            on_close=self.journal.closed.append,
            first_id=self.first_id,
        )

    def make(self) -> TrainingLoop:
        parts = Parts(
            prompts=self.prompts,
            rollouts={worker.name: worker for worker in self.workers},
            rewards=self.rewards,
            reference=self.reference,
            learner=self.learner,
            weights=self.weights,
            recorder=self.recorder,
            journal=self.journal,
            launcher=self.launcher,
            probe=self.probe,
            roles=self.roles,
            audit=self.audit if self.config.audit.every else None,
        )
        return TrainingLoop(
            self.config,
            parts,
            ledger=self.ledger,
            eval_prompts=self.eval_prompts,
            version=self.learner.version,
            reopened=self.reopened,
            window=self.window,
        )

    def run(self, during: Callable[[TrainingLoop], Coroutine[Any, Any, None]] | None = None) -> TrainingLoop:
        """Run to the end beside `during(loop)`, which must end first; no task of the loop may outlive it, ever."""

        async def main() -> TrainingLoop:
            for worker in self.workers:
                await self.weights.add(worker.name, worker)
            self.loop = self.make()
            beside = asyncio.create_task(during(self.loop)) if during else None
            mine = asyncio.all_tasks()
            try:
                await self.loop.run()
                if beside is not None:
                    assert beside.done(), "the run ended before what was to happen during it"
                    beside.result()
            finally:
                senders = self.weights._senders
                left, self.served = asyncio.all_tasks() - mine - set(senders.values()), set(senders)
                assert not left, f"left behind: {left}"
                if beside is not None:
                    beside.cancel()
                for name in list(self.weights._senders):
                    await self.weights.remove(name)
            return self.loop

        return run(main())

    @property
    def ages(self) -> list[int]:
        """Versions between sampling and training, of every group that was trained."""
        return [age for batch in self.learner.batches for age in batch.ages]

    @property
    def kinds(self) -> list[str]:
        """Of the events, in order."""
        return [kind for kind, _ in self.journal.events]

    @property
    def trained(self) -> list[int]:
        """Slots in the order of the batches that held them."""
        return [slot for batch in self.learner.batches for slot in batch.slots]

    @property
    def ends(self) -> dict[str, int]:
        """Ended slots by reason, without the reasons nobody had."""
        return {end.value: count for end, count in self.ledger.ended.items() if count}


def rig(*overrides: str, **parts: Any) -> Rig:
    """A loop of `make_config` with these overrides, and these parts in the place of the plain ones."""
    return Rig(make_config(Path("/nowhere"), *overrides), **parts)


def two_workers(**second: Any) -> list[FakeRollout]:
    """a, and b which is as said."""
    return [FakeRollout("a"), FakeRollout("b", **second)]


async def at(seconds: float) -> None:
    """Wait until so many virtual seconds after the start."""
    await asyncio.sleep(seconds - now())
