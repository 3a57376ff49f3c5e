"""The watch over a run: every role's spans reach the trace, a stalled role is announced, a silent one waited for."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlsys.control.ports import WorkerLost
from rlsys.control.watch import EVERY_S, watch
from rlsys.observability.spans import Span
from tests.fakes import make_config, now, run
from tests.rig import Rig


@dataclass
class FakeRole:
    """Notes one span a second; does not answer before `answers_s`, and not at all once it died."""

    answers_s: float = 0.0
    dead: bool = False
    asked: int = 0
    taken: list[Span] = field(default_factory=list)

    async def spans(self) -> list[Span]:
        self.asked += 1
        if self.dead:
            raise WorkerLost("gone")
        await asyncio.sleep(self.answers_s)
        span = Span(name="step", start=now(), end=now() + 0.5)
        self.taken.append(span)
        return [span]


def watched(rig: Rig, seconds: float) -> None:
    """Watch `rig`'s run for so long, without the run."""

    async def main() -> None:
        loop = rig.make()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await watch(loop.parts, loop.progress, loop.history)

    run(main())


def make_rig(**roles: FakeRole) -> Rig:
    return Rig(make_config(Path("/nowhere"), "alarms.stalled_s=60"), roles=dict(roles))


def test_the_spans_of_every_role_reach_the_trace_once() -> None:
    rig = make_rig(learner=FakeRole(), reward=FakeRole())
    watched(rig, 5.5 * EVERY_S)
    assert len(rig.journal.traced["learner"]) == 5
    for name, role in rig.roles.items():
        assert rig.journal.traced[name] == role.taken


def test_a_role_that_is_dead_or_silent_keeps_nobody_else_from_the_trace() -> None:
    rig = make_rig(learner=FakeRole(), rollout=FakeRole(dead=True), reward=FakeRole(answers_s=1000))
    watched(rig, 20)
    assert len(rig.journal.traced["learner"]) >= 3
    assert rig.journal.traced["rollout"] == rig.journal.traced["reward"] == []
    assert rig.roles["reward"].asked >= 3


def test_a_stalled_role_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(learner=FakeRole())
    monkeypatch.setattr("rlsys.control.progress.Activity.idle_s", lambda self: {"reward": 61.0, "learner": 0.0})
    watched(rig, 5)
    assert [(alarm.name, alarm.state) for alarm in rig.journal.alarms] == [("stalled_reward", "raised")]
