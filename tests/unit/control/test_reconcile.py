"""Workers that come and go while a loop trains: nothing is lost, the bound holds, nobody waits for them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.loop import MAX_ATTEMPTS, TrainingLoop
from rlsys.control.reconcile import PATIENCE_S
from rlsys.errors import ClusterError, ConfigError, EngineError
from tests.fakes import (
    FakeLauncher,
    FakeLearner,
    FakeRewardWorker,
    FakeRollout,
    make_config,
    now,
)
from tests.rig import Rig, at

DIRECTORY = Path("/nowhere")


def watched(loop: TrainingLoop) -> TrainingLoop:
    """Fails as soon as a worker is chosen that has acknowledged nothing, or was told to go, or is dead."""
    choose = loop.router.choose

    def checked(learner_version: int) -> Any:
        worker = choose(learner_version)
        if worker is not None:
            assert worker.name in loop.progress.acks, f"{worker.name} acknowledged no version"
            assert not loop.workers.dismissed(worker.name), f"{worker.name} was told to go"
            assert worker.name in loop.workers.crews["rollout"].members, f"{worker.name} is dead"
        return worker

    loop.router.choose = checked  # type: ignore[method-assign]
    return loop


class WatchedRig(Rig):
    def make(self) -> TrainingLoop:
        return watched(super().make())


def rig(*overrides: str, workers: int = 1, load_s: float = 0.1, steps: int = 200, **parts: Any) -> Rig:
    """Workers, and as many more as are asked for, each ready after `load_s`."""

    def make(name: str) -> FakeRollout:
        return FakeRollout(name, load_s=load_s)

    parts.setdefault("launcher", FakeLauncher(make, lambda name: FakeRewardWorker(name, load_s=load_s)))
    r = WatchedRig(make_config(DIRECTORY, f"learner.steps={steps}", *overrides), **parts)
    r.workers = [make(f"rollout-{i}") for i in range(workers)]
    return r


def counts(loop: TrainingLoop, role: str = "rollout") -> tuple[int, int, int]:
    found = loop.progress.workers[role]
    return found.desired, found.ready, found.restarts


def said(rig: Rig, kind: str) -> list[str]:
    return [message for found, message in rig.journal.events if found == kind]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)  # of virtual time, but every look costs real time


def require_sound(rig: Rig) -> None:
    """Nothing lost, nothing twice, in order, within the bound."""
    assert rig.ledger.counts()["lost"] == 0
    assert rig.trained == list(range(len(rig.trained)))
    assert len(rig.trained) == 2 * len(rig.learner.batches)
    assert max(age for batch in rig.learner.batches for age in batch.ages) <= rig.config.staleness.max
    assert set(rig.ends) == {"trained"}


# Scaling


def test_a_run_scaled_up_and_down_again_loses_nothing_and_shows_it_in_its_metrics() -> None:
    r = rig()

    async def scale(loop: TrainingLoop) -> None:
        await at(0.5)
        before = loop.version
        loop.workers.scale("asked for", rollout=3)
        assert counts(loop) == (3, 1, 0)
        await at(0.59)  # they load for 0.1 s
        assert counts(loop) == (3, 1, 0)
        assert loop.version > before, "the learner waited for the joining workers"
        await until(lambda: counts(loop) == (3, 3, 0))
        await at(1.0)
        loop.workers.scale("asked for", rollout=1)
        await until(lambda: "worker_left" in r.kinds)

    loop = r.run(scale)
    require_sound(r)
    assert counts(loop) == (1, 1, 0)
    assert r.launcher.started == [("rollout-1", 1), ("rollout-2", 2)]
    assert all(worker.begun and not worker.alive for worker in r.launcher.made.values())
    assert r.served == {"rollout-0"}, "versions are still sent to workers that left"
    shown = [(m["workers/rollout/desired"], m["workers/rollout/ready"]) for _, m in r.journal.rows]
    assert {(1, 1), (3, 1), (3, 3)} <= set(shown)
    assert shown[-1:] == [(1, 1)]
    assert said(r, "scaled") == ["rollout workers 1 → 3: asked for", "rollout workers 3 → 1: asked for"]
    assert sorted(message.split(":")[0] for message in said(r, "worker_joined")) == ["rollout-1", "rollout-2"]
    assert sorted(message.split(",")[0] for message in said(r, "worker_left")) == [
        "rollout-1: finished what it had",
        "rollout-2: finished what it had",
    ]
    spans = [(span.name, span.facts["worker"]) for span in r.journal.traced["controller"] if "worker" in span.facts]
    assert set(spans) == {(what, f"rollout-{i}") for what in ("join", "leave") for i in (1, 2)}


def test_a_joining_worker_gets_the_newest_version_first_and_no_prompt_until_it_serves_it() -> None:
    """It takes 0.35 s for a version, in which the learner makes two or three: they are skipped, and the bound holds."""
    r = rig("staleness.max=6", "staleness.serving_lag=6", steps=40, learner=FakeLearner(step_s=0.1))
    usual = r.launcher.rollout_worker

    def slow(name: str) -> FakeRollout:
        worker = usual(name)
        worker.apply_s = 0.35
        return worker

    r.launcher.rollout_worker = slow

    async def scale(loop: TrainingLoop) -> None:
        await at(0.5)
        loop.workers.scale("asked for", rollout=2)
        await at(0.55)
        joined = r.launcher.made["rollout-1"]
        await at(0.6)  # it has loaded
        newest = loop.version
        await at(0.94)
        assert loop.version >= newest + 2
        assert (joined.begun, joined.served) == ([], [])
        await until(lambda: counts(loop) == (2, 2, 0))
        assert joined.served == [newest]
        await until(lambda: len(joined.begun) > 4)

    r.run(scale)
    require_sound(r)


def test_a_worker_that_cannot_finish_in_time_hands_its_slots_back_and_they_are_trained_once() -> None:
    r = rig("scaling.grace_s=0.5", workers=2)
    r.workers[1].tokens = lambda slot: 10**6

    async def scale(loop: TrainingLoop) -> None:
        await until(lambda: len(r.workers[1].begun) > 0)
        held = {slot for slot, _ in r.workers[1].begun}
        before = loop.version
        loop.workers.scale("asked for", rollout=1)
        await at(now() + 0.4)
        assert r.workers[1].alive, "it may finish within the grace period"
        await until(lambda: not r.workers[1].alive)
        assert {slot for slot, attempt in r.workers[0].begun if attempt == 2} <= held
        await until(lambda: loop.version > before + 10)

    r.run(scale)
    require_sound(r)
    assert [message.split(",")[0] for message in said(r, "worker_left")] == ["rollout-1: handed back what it had"]
    assert "worker_lost" not in r.kinds


def test_a_prompt_is_not_blamed_for_the_workers_that_were_told_to_go() -> None:
    """More of them than a prompt may cost: its slot waits again each time, and is trained in the end."""
    r = rig("scaling.grace_s=0.01", "staleness.max=1")
    stuck = {0}
    usual = r.launcher.rollout_worker

    def make(name: str) -> FakeRollout:
        worker = usual(name)
        worker.tokens = lambda slot: 10**6 if slot in stuck else 4
        return worker

    r.workers[0].tokens = lambda slot: 10**6 if slot in stuck else 4
    r.launcher.rollout_worker = make

    async def scale(loop: TrainingLoop) -> None:
        for turn in range(MAX_ATTEMPTS + 2):
            holder = await holding(r, 0, turn + 1)
            others = {name for name in loop.parts.rollouts if name != holder}
            loop.workers.scale("asked for", rollout=len(others) + 2)
            await until(lambda: loop.progress.workers["rollout"].ready == loop.progress.workers["rollout"].desired)
            loop.workers._execute(loop.workers.crews["rollout"], dismiss(loop, holder))
            loop.workers.scale("asked for", rollout=len(loop.workers.crews["rollout"].present))
        stuck.clear()
        await holding(r, 0, MAX_ATTEMPTS + 3)

    r.run(scale)
    require_sound(r)
    assert max(row.attempts for row in r.journal.closed) == MAX_ATTEMPTS + 3


async def holding(rig: Rig, slot: int, attempt: int) -> str:
    workers = lambda: [*rig.workers, *rig.launcher.made.values()]  # noqa: E731
    await until(lambda: any((slot, attempt) in worker.begun for worker in workers()))
    return next(worker.name for worker in workers() if (slot, attempt) in worker.begun)


def dismiss(loop: TrainingLoop, name: str) -> Any:
    crew = loop.workers.crews["rollout"]
    return crew._dismiss(crew.members[name])


def test_one_that_has_not_joined_is_let_go_at_once_and_its_demand_with_it() -> None:
    r = rig(launcher=FakeLauncher())  # no room: they wait for a place

    async def scale(loop: TrainingLoop) -> None:
        await at(0.5)
        loop.workers.scale("asked for", rollout=3)
        await at(0.6)
        assert [worker.alive for worker in r.launcher.made.values()] == [True, True]
        loop.workers.scale("asked for", rollout=1)
        await at(0.61)
        assert [worker.alive for worker in r.launcher.made.values()] == [False, False]
        assert counts(loop) == (1, 1, 0)

    r.run(scale)
    require_sound(r)
    assert said(r, "worker_left") == ["rollout-2: had not joined yet", "rollout-1: had not joined yet"]


def test_a_worker_without_a_place_is_an_event_and_the_run_goes_on() -> None:
    r = rig(launcher=FakeLauncher(), steps=20, learner=FakeLearner(step_s=10.0))

    async def scale(loop: TrainingLoop) -> None:
        await at(1.0)
        loop.workers.scale("asked for", rollout=2)

    loop = r.run(scale)
    assert counts(loop) == (2, 1, 0)
    (message,) = said(r, "worker_waits")
    assert message.startswith(f"rollout-1 has not joined for {PATIENCE_S:g} s")


def test_an_impossible_number_is_refused_and_changes_nothing() -> None:
    r = rig("scaling.rollout_max=4")

    async def scale(loop: TrainingLoop) -> None:
        await at(0.1)
        for asked in ({"rollout": 5}, {"rollout": 0}, {"rollout": 2, "reward": 0}):
            with pytest.raises(ConfigError, match="must be a whole number from 1 to"):
                loop.workers.scale("asked for", **asked)
        assert counts(loop) == (1, 1, 0)

    r.run(scale)
    assert r.journal.events == []


def test_reward_workers_come_and_go_and_may_finish_their_calls() -> None:
    r = rig()

    async def scale(loop: TrainingLoop) -> None:
        await at(0.5)
        loop.workers.scale("asked for", reward=2)
        await until(lambda: counts(loop, "reward") == (2, 2, 0))
        assert set(r.rewards.workers) == {"reward-0", "reward-1"}
        r.rewards.busy.add("reward-1")
        loop.workers.scale("asked for", reward=1)
        await at(1.0)
        assert set(r.rewards.workers) == {"reward-0"}
        assert r.launcher.made["reward-1"].alive, "it was killed over a call"
        r.rewards.busy.clear()
        await until(lambda: not r.launcher.made["reward-1"].alive)

    r.run(scale)
    require_sound(r)
    assert r.journal.rows[-1][1]["workers/reward/desired"] == 1


# Replacing the dead


def test_the_only_worker_is_replaced_and_the_run_goes_on() -> None:
    r = rig()

    async def kill(loop: TrainingLoop) -> None:
        await at(0.5)
        version = loop.version
        r.workers[0].kill()
        await until(lambda: counts(loop) == (1, 1, 1))
        assert r.launcher.made["rollout-1"].served[0] >= version, "it rejoined at an old version"
        await until(lambda: loop.version > version + 10)

    loop = r.run(kill)
    require_sound(r)
    assert r.launcher.started == [("rollout-1", 0)]
    assert loop.version == 200
    assert r.kinds == ["worker_lost", "worker_joined"]
    assert r.journal.rows[-1][1]["workers/rollout/restarts"] == 1


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_noticed_and_replaced() -> None:
    r = rig("staleness.max=0", workers=2, learner=FakeLearner(step_s=5.0), steps=4)

    async def kill(loop: TrainingLoop) -> None:
        await at(2.0)
        assert not any(worker.in_flight for worker in loop.router.workers.values())
        r.workers[1].kill()
        await at(2.5)
        assert counts(loop) == (2, 2, 1)

    r.run(kill)
    require_sound(r)


def test_a_reward_worker_that_dies_is_replaced() -> None:
    r = rig()

    async def kill(loop: TrainingLoop) -> None:
        await at(0.5)
        r.rewards.workers["reward-0"].kill()
        await until(lambda: counts(loop, "reward") == (1, 1, 1))
        assert set(r.rewards.workers) == {"reward-1"}

    r.run(kill)
    require_sound(r)


def broken(name: str) -> FakeRollout:
    worker = FakeRollout(name)
    worker.kill()
    return worker


def test_a_crash_loop_without_any_worker_ends_the_run_with_the_last_words() -> None:
    r = rig("scaling.max_restarts=2", launcher=FakeLauncher(broken))

    async def kill(loop: TrainingLoop) -> None:
        await at(0.5)
        r.workers[0].kill()

    last_words = "3 rollout workers in a row died young; the last one, rollout-3: rollout-3 was killed"
    with pytest.raises(ClusterError, match=f"no rollout worker is left: {last_words}"):
        r.run(kill)
    assert [name for name, _ in r.launcher.started] == ["rollout-1", "rollout-2", "rollout-3"]
    assert r.ledger.counts()["lost"] == 0


def test_a_crash_loop_beside_good_workers_is_given_up_and_the_run_goes_on_with_them() -> None:
    r = rig("scaling.max_restarts=2", "scaling.backoff_s=0.01", launcher=FakeLauncher(broken))

    async def scale(loop: TrainingLoop) -> None:
        await at(0.5)
        loop.workers.scale("asked for", rollout=2)
        await until(lambda: "scaling_gave_up" in r.kinds)
        assert counts(loop) == (1, 1, 2)
        r.launcher.rollout_worker = lambda name: FakeRollout(name)
        loop.workers.scale("asked for", rollout=2)
        await until(lambda: counts(loop) == (2, 2, 2))

    r.run(scale)
    require_sound(r)
    (message,) = said(r, "scaling_gave_up")
    assert message.startswith("rollout workers stay 1: 3 rollout workers in a row died young; the last one, rollout-3")


def test_an_engine_that_stops_is_replaced_and_its_process_ended() -> None:
    r = rig(workers=2)
    r.workers[1].refuse = lambda prompt: EngineError("the engine stopped: out of memory")
    loop = r.run()
    require_sound(r)
    assert not r.workers[1].alive
    assert counts(loop) == (2, 2, 1)
    assert said(r, "worker_lost") == ["rollout-1: the engine stopped: out of memory"]


# Policies


def test_the_queue_policy_grows_a_run_whose_learner_waits_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker takes 0.3 s for its two groups, the learner 0.1 s: three of them keep it busy."""
    r = rig(
        "scaling.policy=queue",
        "scaling.rollout_max=6",
        "scaling.window=4",
        "scaling.cooldown=4",
        "rollout.max_concurrent_sequences=2",
        "staleness.max=2",
        learner=FakeLearner(step_s=0.1),
    )
    monkeypatch.setattr("rlsys.control.progress.time", SimpleNamespace(perf_counter=now, monotonic=now))
    usual = r.launcher.rollout_worker

    def slow(name: str) -> FakeRollout:
        worker = usual(name)
        worker.token_s = 0.15
        return worker

    r.workers[0].token_s = 0.15
    r.launcher.rollout_worker = slow
    loop = r.run()
    require_sound(r)
    assert counts(loop)[0] > 1
    assert "the learner waits" in said(r, "scaled")[0]


# Anything at all

ROLES = ["rollout", "reward"]
MOVES = st.lists(st.tuples(st.floats(0.0, 0.3), st.sampled_from([*ROLES, "kill"]), st.integers(0, 4)), max_size=12)


@settings(max_examples=40)
@given(
    MOVES,
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from([0.0, 0.05, 0.4]), st.sampled_from([0.0, 0.03, 0.2])), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.02, 1.0]),
    st.sampled_from([0.003, 0.02, 0.05]),
)
def test_whoever_comes_goes_or_dies_nothing_is_lost_and_the_bound_holds(
    moves: list[tuple[float, str, int]],
    bound: int,
    speeds: list[tuple[float, float]],
    grace_s: float,
    step_s: float,
) -> None:
    r = rig(
        f"staleness.max={bound}",
        f"scaling.grace_s={grace_s}",
        "scaling.max_restarts=100",
        "scaling.backoff_s=0.01",
        workers=2,
        steps=10**6,
        learner=FakeLearner(step_s=step_s),
    )
    usual = r.launcher.rollout_worker

    def make(name: str) -> FakeRollout:
        worker = usual(name)
        worker.load_s, worker.apply_s = speeds[int(name.split("-")[1]) % 5]
        return worker

    r.launcher.rollout_worker = make

    async def disturb(loop: TrainingLoop) -> None:
        for pause, move, number in moves:
            await asyncio.sleep(pause)
            if move == "kill":
                everybody = [*r.workers, *r.launcher.made.values()]
                everybody[number % len(everybody)].kill()
            else:
                loop.workers.scale("asked for", **{move: number + 1})
        version = loop.version
        await until(lambda: loop.version > version + 10)
        await until(lambda: all(counts(loop, role)[0] == counts(loop, role)[1] for role in ROLES))
        loop.stop()

    loop = r.run(disturb)
    require_sound(r)
    assert {name for name, _ in r.launcher.started}.isdisjoint({"rollout-0", "rollout-1", "reward-0"})
    gone = {message.split(":")[0] for kind in ("worker_left", "worker_lost") for message in said(r, kind)}
    assert not gone & set(loop.parts.rollouts)
    assert not gone & set(loop.router.workers)
    assert r.served <= {worker.name for worker in (*r.workers, *r.launcher.made.values())} - gone
