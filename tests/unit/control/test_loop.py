"""The control loop against plain fakes in virtual time: what it trains, in which order, and how it ends."""

import asyncio
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.control.history import AHEAD
from rlsys.control.loop import MAX_ATTEMPTS, MAX_FAILED_IN_A_ROW, TrainingLoop
from rlsys.control.ports import PayloadLost, WorkerLost
from rlsys.errors import (
    EngineError,
    NonFiniteError,
    PromptRefused,
    RewardError,
    StalenessViolation,
    WeightSyncError,
)
from tests.fakes import (
    FakeLearner,
    FakePrompts,
    FakeRecorder,
    FakeReference,
    FakeRewards,
    FakeRollout,
    Rig,
    broken_reward,
    make_config,
    make_prompt,
    now,
    run,
)

DIRECTORY = Path("/nowhere")


def rig(*overrides: str, **parts: Any) -> Rig:
    return Rig(make_config(DIRECTORY, *overrides), **parts)


def ages(rig: Rig) -> list[int]:
    return [age for batch in rig.learner.batches for age in batch.ages]


def kinds(rig: Rig) -> list[str]:
    return [kind for kind, _ in rig.journal.events]


def two_workers(**second: Any) -> list[FakeRollout]:
    return [FakeRollout("a"), FakeRollout("b", **second)]


async def at(seconds: float) -> None:
    await asyncio.sleep(seconds - now())


# Steps, order, versions


def test_it_trains_the_configured_steps_in_order_of_admission_and_accounts_for_every_prompt() -> None:
    r = rig()
    loop = r.run()
    assert loop.version == 6
    assert r.trained == list(range(12))
    assert [batch.version for batch in r.learner.batches] == [0, 1, 2, 3, 4, 5]
    assert r.ends == {"trained": 12}
    counts = r.ledger.counts()
    assert counts["lost"] == 0
    assert counts["admitted"] == r.prompts.index == 12 + len(r.ledger.open)
    assert r.journal.steps == [1, 2, 3, 4, 5, 6]
    assert r.journal.events == []


def test_a_finished_prompt_waits_for_older_ones_with_window_1_and_overtakes_with_a_wider_one() -> None:
    def slow_first(slot: int) -> int:
        return 30 if slot == 0 else 3

    strict = rig(workers=[FakeRollout("a", tokens=slow_first)])
    strict.run()
    assert strict.trained == list(range(12))
    loose = rig("staleness.window=3", workers=[FakeRollout("a", tokens=slow_first)])
    loose.run()
    assert loose.trained[:4] == [1, 2, 0, 3]  # 1 and 2 pass slot 0, nobody else may


def test_staleness_0_alternates_strictly_and_every_token_is_fresh() -> None:
    r = rig("staleness.max=0", workers=two_workers(token_s=0.013), learner=FakeLearner(step_s=0.05))
    r.run()
    assert set(ages(r)) == {0}
    assert r.ledger.counts()["admitted"] == 12 + 2  # the last commit let the next two in
    started = {slot: worker.name for worker in r.workers for slot, _ in worker.begun}
    assert set(started.values()) == {"a", "b"}
    for before, after in pairwise(r.learner.batches):
        assert after.at - before.at >= 0.05 + 4 * 0.01  # a whole step, then whole responses


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_the_default_never_exceeds_the_bound_and_uses_it(bound: int) -> None:
    r = rig(f"staleness.max={bound}", "learner.steps=20", workers=two_workers(token_s=0.037, apply_s=0.02))
    r.run()
    assert bound - 1 <= max(ages(r)) <= bound
    assert len({batch.version for batch in r.learner.batches}) == 20


@pytest.mark.parametrize("backlog", [0, 1, 3])
def test_a_backlog_ages_every_token_by_as_many_versions(backlog: int) -> None:
    r = rig(f"staleness.max={backlog}", "staleness.serving_lag=0", f"staleness.backlog={backlog}", "learner.steps=20")
    r.run()
    assert r.trained == list(range(40))
    assert [set(batch.ages) for batch in r.learner.batches] == [{min(step, backlog)} for step in range(20)]


@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from([0.01, 0.03]), st.sampled_from([0, 0.02, 0.2])), min_size=1, max_size=3),
    st.sampled_from([0.001, 0.02, 0.1]),
    st.lists(st.integers(1, 12), min_size=7, max_size=7),
)
def test_whatever_the_speeds_the_run_ends_within_its_bound(bound, window, speeds, step_s, lengths) -> None:
    window = 1 if bound < 2 else window
    r = rig(
        f"staleness.max={bound}",
        f"staleness.window={window}",
        "learner.steps=8",
        workers=[
            FakeRollout(f"w{i}", token_s=token_s, apply_s=apply_s, tokens=lambda slot: lengths[slot % 7])
            for i, (token_s, apply_s) in enumerate(speeds)
        ],
        learner=FakeLearner(step_s=step_s),
    )
    assert r.run().version == 8
    assert max(ages(r)) <= bound
    assert sorted(r.trained) == sorted(set(r.trained))
    assert r.ledger.counts()["lost"] == 0


def test_a_response_is_continued_under_the_version_that_arrives_in_its_middle() -> None:
    r = rig("learner.steps=8", workers=[FakeRollout("a", tokens=lambda slot: 10)])
    r.run()
    mixed = [batch for batch in r.learner.batches if len(set(batch.ages)) > 1]
    assert mixed


def test_a_worker_too_far_behind_gets_no_prompts_until_it_has_caught_up() -> None:
    """b takes 1 s for a version, the first at t=1: by then many steps are done, and b is beyond its lag."""
    r = rig("learner.steps=40", workers=two_workers(apply_s=1.0), learner=FakeLearner(step_s=0.05))
    r.run()
    fast, slow = r.workers
    assert len(fast.begun) > 60
    assert max(ages(r)) <= 4
    assert len(slow.begun) < 20
    assert slow.served == sorted(set(slow.served))
    assert len(slow.served) < 5


def test_a_worker_holds_no_more_groups_than_it_has_room_for() -> None:
    holding: list[int] = []

    class Worker(FakeRollout):
        async def generate(self, slot: int, attempt: int, prompt: Any) -> Any:
            self.holds = getattr(self, "holds", 0) + 1
            holding.append(self.holds)
            try:
                return await super().generate(slot, attempt, prompt)
            finally:
                self.holds -= 1

    r = rig("rollout.max_concurrent_sequences=4", workers=[Worker("a", refuse=poison), Worker("b")])
    assert r.run().version == 6
    assert max(holding) == 4  # twice 4 sequences, in groups of 2
    assert [worker.in_flight for worker in r.loop.router.workers.values()] == [0, 0]


def poison(prompt: Any) -> Exception | None:
    return PromptRefused("no") if prompt.index % 5 == 0 else None


def test_a_commit_lets_new_prompts_in_without_waiting_for_the_workers() -> None:
    """Version 0 is served at 1 s, the first batch trained at 1.05 s, the next at 1.1 s; version 1 is served at 2.05."""
    r = rig("staleness.max=1", workers=[FakeRollout("a", apply_s=1.0)])

    async def look(loop: TrainingLoop) -> None:
        await at(1.5)
        assert (loop.version, r.workers[0].version) == (2, 0)
        assert [slot for slot, _ in r.workers[0].begun] == [0, 1, 2, 3]
        r.journal.event("looked", "")

    r.run(look)
    assert kinds(r) == ["looked"]


def test_the_reference_scores_the_very_batch_that_is_trained() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    class Learner(FakeLearner):
        async def update(self, batch: Any, reference: Any) -> Any:
            seen.append(([group.summary.slot for group in batch], reference))
            return await super().update(batch, reference)

    rig(learner=Learner(), reference=FakeReference()).run()
    assert len(seen) == 6
    assert all(slots == scored for slots, scored in seen)


# Ending


def test_stop_ends_after_the_step_in_progress() -> None:
    r = rig("learner.steps=100", learner=FakeLearner(step_s=1.0))

    async def stop(loop: TrainingLoop) -> None:
        await at(2.5)
        loop.stop()
        await at(2.6)
        assert len(r.learner.batches) == 3  # it began before, and is still running

    assert r.run(stop).version == 3
    assert r.journal.steps == [1, 2, 3]
    assert r.workers[0].version == 3
    assert len(r.trained) == 6
    assert r.ledger.counts()["learning"] == 2  # assembled and not trained: open, so a checkpoint names them


def test_stop_while_no_batch_comes_ends_the_run() -> None:
    r = rig(workers=[FakeRollout("a", tokens=lambda slot: 10**6)])

    async def stop(loop: TrainingLoop) -> None:
        await at(3.0)
        loop.stop()

    assert r.run(stop).version == 0
    assert r.trained == []


def test_stop_before_the_first_step_ends_the_run() -> None:
    r = rig()

    async def stop(loop: TrainingLoop) -> None:
        loop.stop()

    assert r.run(stop).version == 0


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    r = rig("learner.steps=10000")

    async def main() -> None:
        for worker in r.workers:
            await r.weights.add(worker.name, worker)
        running = asyncio.create_task(r.make().run())
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for worker in r.workers:
            await r.weights.remove(worker.name)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


# Workers that go


@pytest.mark.parametrize("seconds", [0.001, 0.025, 0.055, 0.2])
def test_the_slots_of_a_lost_worker_are_sampled_again_and_trained_once(seconds: float) -> None:
    r = rig("learner.steps=20", workers=two_workers())

    async def kill(loop: TrainingLoop) -> None:
        await at(seconds)
        r.workers[1].kill()

    loop = r.run(kill)
    a, b = r.workers
    assert loop.version == 20
    assert r.trained == list(range(40))
    assert r.ends == {"trained": 40}
    assert ("worker_lost", "b: b was killed") in r.journal.events
    assert kinds(r).count("worker_lost") == 1
    assert "sync_failed" not in kinds(r)
    assert r.served == {"a"}
    again = {slot for slot, attempt in a.begun if attempt == 2}
    assert again
    assert again <= {slot for slot, _ in b.begun}
    attempts = {row.slot: row.attempts for row in r.journal.closed}
    assert {slot for slot, count in attempts.items() if count == 2} == {slot for slot in again if slot in attempts}
    assert list(loop.progress.acks) == ["a"]
    assert [metrics["workers/rollout/ready"] for _, metrics in r.journal.rows][-1] == 1


def test_the_rates_of_a_step_do_not_fall_below_zero_when_a_worker_is_lost() -> None:
    r = rig("learner.steps=20", workers=two_workers())

    async def kill(loop: TrainingLoop) -> None:
        await at(0.2)
        r.workers[1].kill()

    r.run(kill)
    rates = [metrics["throughput/generated_tokens_per_s"] for _, metrics in r.journal.rows]
    assert len(rates) == 20
    assert all(rate is not None and rate >= 0 for rate in rates)


def test_an_engine_that_stopped_counts_as_a_lost_worker() -> None:
    r = rig(workers=two_workers(refuse=lambda prompt: EngineError("the engine stopped: out of memory")))
    assert r.run().version == 6
    assert r.trained == list(range(12))
    assert r.journal.events == [("worker_lost", "b: the engine stopped: out of memory")]


def test_a_prompt_that_kills_its_workers_is_given_up_before_it_killed_them_all() -> None:
    workers = [FakeRollout(f"w{i}") for i in range(MAX_ATTEMPTS + 1)]
    for worker in workers:
        worker.refuse = lambda prompt: EngineError("the engine stopped: bang") if prompt.index == 3 else None
    r = rig(workers=workers)
    assert r.run().version == 6
    assert r.ends == {"trained": 12, "failed_rollout": 1}
    assert kinds(r).count("worker_lost") == MAX_ATTEMPTS
    (message,) = [message for kind, message in r.journal.events if kind == "failed_rollout"]
    assert message.startswith(f"slot 3, prompt 0/3: {MAX_ATTEMPTS} workers were lost on it")
    assert 3 not in r.trained


def test_a_refused_prompt_ends_alone_and_its_worker_goes_on() -> None:
    refuse = FakeRollout("a", refuse=lambda prompt: PromptRefused("too long") if prompt.index == 4 else None)
    r = rig(workers=[refuse])
    assert r.run().version == 6
    assert r.ends == {"trained": 12, "failed_rollout": 1}
    assert r.journal.events == [("failed_rollout", "slot 4, prompt 0/4: too long")]
    assert r.trained == [0, 1, 2, 3, *range(5, 13)]


def test_a_worker_that_answers_no_health_call_does_not_stop_the_records() -> None:
    r = rig("learner.steps=3", workers=two_workers(silent=True))
    assert r.run().version == 3
    assert r.journal.steps == [1, 2, 3]


# Responses that go with a node


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_a_batch_lost_on_its_way_to_the_learner_is_sampled_again_and_trained_once(bound: int) -> None:
    r = rig(f"staleness.max={bound}", "learner.steps=20", learner=FakeLearner(fail={3: PayloadLost("its node died")}))
    assert r.run().version == 20
    lost = r.learner.batches.pop(3)
    assert r.ends == {"trained": 40}
    assert sorted(r.trained) == list(range(40))
    assert max(ages(r)) <= bound
    assert r.journal.steps == list(range(1, 21))
    first, last = lost.slots
    assert r.journal.events == [("batch_lost", f"slots {first}..{last}: its node died")]
    assert {row.slot for row in r.journal.closed if row.attempts == 2} == set(lost.slots)


def test_responses_lost_on_their_way_to_the_reward_are_sampled_again() -> None:
    lost = {3, 4}

    def once(group: Any) -> Exception | None:
        return PayloadLost("its node died") if group.slot in lost and group.attempt == 1 else None

    r = rig(rewards=FakeRewards(fail=once))
    assert r.run().version == 6
    assert r.trained == list(range(12))
    assert {row.slot for row in r.journal.closed if row.attempts == 2} == lost
    assert r.journal.events == []


def test_an_evaluation_whose_responses_are_lost_is_an_event() -> None:
    r = rig(
        rewards=FakeRewards(fail=lambda group: PayloadLost("its node died") if group.slot < 0 else None),
        eval_prompts=[make_prompt(i) for i in range(4)],
    )
    assert r.run().version == 6
    assert set(kinds(r)) == {"evaluation_failed"}


# Rewards


def test_groups_without_a_reward_end_by_name_and_the_run_goes_on() -> None:
    r = rig(rewards=FakeRewards(fail=broken_reward(0, 5, 6)))
    assert r.run().version == 6
    assert r.ends == {"trained": 12, "failed_reward": 3}
    assert not {0, 5, 6} & set(r.trained)
    assert r.journal.events[0] == ("failed_reward", "slot 0, prompt 0/0: no reward for 0")
    assert kinds(r) == ["failed_reward"] * 3


def test_too_many_failures_in_a_row_stop_the_run_with_the_last_one() -> None:
    r = rig("learner.steps=1000", rewards=FakeRewards(fail=broken_reward(*range(20, 1000))))
    with pytest.raises(RewardError, match=f"{MAX_FAILED_IN_A_ROW} groups in a row failed; the last one: no reward for"):
        r.run()
    assert r.ends["failed_reward"] < 2 * MAX_FAILED_IN_A_ROW


def test_failures_with_successes_between_them_do_not_add_up() -> None:
    r = rig("learner.steps=30", rewards=FakeRewards(fail=lambda g: broken_reward()(g) if g.slot % 2 else None))
    assert r.run().version == 30
    assert r.ends["failed_reward"] > MAX_FAILED_IN_A_ROW


def test_a_dead_reward_worker_is_no_dead_rollout_worker() -> None:
    asked: Counter[int] = Counter()

    def flaky(group: Any) -> Exception | None:
        asked[group.slot] += 1
        return WorkerLost("reward actor died") if asked[group.slot] < 3 else None

    r = rig(rewards=FakeRewards(fail=flaky))
    assert r.run().version == 6
    assert r.ends == {"trained": 12}
    assert r.journal.events == []

    dead = rig(rewards=FakeRewards(fail=lambda group: WorkerLost("reward actor died")))
    with pytest.raises(RewardError, match="3 reward workers died over it; the last one: reward actor died"):
        dead.run()
    assert set(kinds(dead)) == {"failed_reward"}


# The learner


def test_a_staleness_violation_of_the_learner_surfaces_as_itself() -> None:
    r = rig(learner=FakeLearner(fail={3: StalenessViolation("a token is 9 versions old")}))
    with pytest.raises(StalenessViolation, match="9 versions old") as caught:
        r.run()
    assert type(caught.value) is StalenessViolation
    assert r.journal.steps == [1, 2, 3]
    assert r.ends == {"trained": 6}


def test_a_group_older_than_the_bound_never_reaches_the_learner() -> None:
    r = rig("learner.steps=20", learner=FakeLearner(version=9), workers=[FakeRollout("a", version=3)])
    r.workers[0].apply = lambda ticket: asyncio.sleep(0, 0.0)  # type: ignore[method-assign] # says so, and is not
    with pytest.raises(StalenessViolation, match=r"slot 0 holds a token 6 versions old; staleness\.max=4"):
        r.run()
    assert r.trained == []


def test_a_refused_batch_is_rejected_by_name_written_out_and_makes_no_version() -> None:
    r = rig(learner=FakeLearner(refuse=[2, 3]))
    published: list[int] = []
    publish = r.weights.publish

    async def spy(ticket: Any) -> None:
        published.append(ticket.manifest.version)
        await publish(ticket)

    r.weights.publish = spy  # type: ignore[method-assign]
    loop = r.run()
    assert loop.version == 6
    assert len(r.learner.batches) == 8
    assert [batch.version for batch in r.learner.batches] == [0, 1, 2, 2, 2, 3, 4, 5]
    assert published == [0, 1, 2, 3, 4, 5, 6]
    assert r.ends == {"trained": 12, "rejected_nonfinite": 4}
    refused = [row.slot for row in r.journal.closed if row.end == "rejected_nonfinite"]
    assert refused == [4, 5, 6, 7]
    assert r.journal.steps == [1, 2, 3, 4, 5, 6]  # a refused batch is not a step
    assert kinds(r) == ["rejected_nonfinite"] * 2
    names = [name for name, _, _ in r.recorder.files]
    assert names[1:5] == ["step-000002", "refused-000002-000004", "refused-000002-000006", "step-000003"]
    assert r.recorder.files[2] == ("refused-000002-000004", 2, [4, 5])
    assert r.journal.rows[-1][1]["ledger/rejected"] == 4


def test_refused_batches_are_written_out_before_the_run_stops_over_them() -> None:
    learner = FakeLearner(refuse=[2, 3], fail={4: NonFiniteError("3 learner batches in a row")})
    r = rig("records.rollouts_every=0", learner=learner, recorder=FakeRecorder(write_s=5.0))
    with pytest.raises(NonFiniteError, match="3 learner batches in a row"):
        r.run()
    assert [name for name, _, _ in r.recorder.files] == ["refused-000002-000004", "refused-000002-000006"]
    assert r.journal.steps == [1, 2]


# Publication


def test_a_publication_that_fails_while_the_learner_waits_for_a_batch_ends_the_run() -> None:
    """The only worker never takes version 1, and at staleness 0 gets no prompts without it: nothing else would end."""
    r = rig("staleness.max=0", "weights.timeout_s=7")
    apply = r.workers[0].apply

    async def stuck(ticket: Any) -> float:
        if ticket.manifest.version == 1:
            await asyncio.sleep(1e9)
        return await apply(ticket)

    r.workers[0].apply = stuck  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="no worker served version 1 within 7 s"):
        r.run()


def test_a_version_that_one_worker_refuses_is_an_event() -> None:
    r = rig("learner.steps=20", workers=two_workers())
    apply = r.workers[1].apply

    async def torn(ticket: Any) -> float:
        if ticket.manifest.version == 2:
            raise OSError("torn")
        return await apply(ticket)

    r.workers[1].apply = torn  # type: ignore[method-assign]
    assert r.run().version == 20
    assert ("sync_failed", "b, version 2: OSError: torn") in r.journal.events
    assert 2 not in r.workers[1].served
    assert max(ages(r)) <= 4


def test_the_learner_is_at_most_one_unserved_version_ahead() -> None:
    r = rig(workers=[FakeRollout("a", apply_s=1.0)], learner=FakeLearner(step_s=0.01))
    r.run()
    for batch in r.learner.batches:
        assert batch.at >= batch.version * 1.0  # version v was made after v-1 had been served, 1 s each


# Records, evaluations, checkpoints


def test_records_are_written_in_order_and_the_learner_does_not_wait_for_them() -> None:
    r = rig("learner.steps=8", recorder=FakeRecorder(write_s=10.0))
    r.run()
    assert [name for name, _, _ in r.recorder.files] == [f"step-{v:06d}" for v in range(1, 9)]
    assert [slots for _, _, slots in r.recorder.files] == [batch.slots for batch in r.learner.batches]
    assert r.learner.batches[-1].at < 10.0


def test_the_learner_waits_when_too_many_records_wait() -> None:
    r = rig("learner.steps=30", recorder=FakeRecorder(write_s=10.0))
    r.run()
    ninth, tenth, eleventh = (r.learner.batches[n].at for n in range(AHEAD, AHEAD + 3))
    assert ninth < tenth < 10.0
    assert eleventh > 10.0
    assert len(r.recorder.files) == 30


def test_only_every_nth_batch_is_recorded_when_configured() -> None:
    r = rig("records.rollouts_every=3")
    r.run()
    assert [name for name, _, _ in r.recorder.files] == ["step-000003", "step-000006"]
    assert r.journal.steps == [1, 2, 3, 4, 5, 6]


def test_evaluations_come_before_after_and_in_between_once_each_while_training_goes_on() -> None:
    r = rig("eval.every=2", workers=two_workers(), eval_prompts=[make_prompt(n) for n in range(3)])
    loop = r.run()
    assert r.journal.evaluations == [0, 2, 4, 6]
    assert loop.progress.evaluations[6].accuracy == 1.0
    assert loop.progress.evaluations[6].prompts == 3
    assert loop.progress.evaluations[0].newest_version == 0


def test_an_evaluation_slower_than_the_steps_between_two_is_not_lost() -> None:
    r = rig("eval.every=1", workers=[FakeRollout("a", token_s=0.001)], eval_prompts=[make_prompt(n) for n in range(50)])
    r.run()
    assert r.journal.evaluations == [0, 1, 2, 3, 4, 5, 6]


def test_stopping_at_an_evaluated_version_does_not_evaluate_it_twice() -> None:
    r = rig("eval.every=2", "learner.steps=100", eval_prompts=[make_prompt(0)], learner=FakeLearner(step_s=1.0))

    async def stop(loop: TrainingLoop) -> None:
        await at(3.5)
        loop.stop()

    loop = r.run(stop)
    assert loop.version == 4
    assert r.journal.evaluations == [0, 2, 4]


def test_an_evaluation_survives_a_worker_lost_in_its_middle() -> None:
    r = rig(
        "eval.every=2", "learner.steps=10", workers=two_workers(), eval_prompts=[make_prompt(n) for n in range(300)]
    )

    async def kill(loop: TrainingLoop) -> None:
        await at(1.0)  # in the first evaluation: 5 chunks of 64, the second and fourth with b
        r.workers[1].kill()

    assert r.run(kill).version == 10
    assert r.journal.evaluations == [0, 2, 4, 6, 8, 10]
    assert r.loop.progress.evaluations[0].prompts == 300


def test_an_evaluation_that_fails_is_an_event_and_training_goes_on() -> None:
    def held_out(group: Any) -> Exception | None:
        return RewardError("no reward") if group.slot == -1 else None

    r = rig(eval_prompts=[make_prompt(0)], rewards=FakeRewards(fail=held_out))
    assert r.run().version == 6
    assert r.journal.evaluations == []
    assert r.journal.events == [
        ("evaluation_failed", "version 0: no reward"),
        ("evaluation_failed", "version 6: no reward"),
    ]


def test_a_checkpoint_holds_the_cursor_and_every_open_prompt() -> None:
    r = rig("checkpoint.every=2", rewards=FakeRewards(fail=broken_reward(41)), first_id=40)
    r.run()
    assert [directory for directory, _ in r.learner.saved] == [
        DIRECTORY / "run" / "checkpoints" / f"step-{version:06d}" for version in (2, 4)
    ]
    for (_, extra), version in zip(r.learner.saved, (2, 4), strict=True):
        cursor = extra["source"]["index"]
        ended = {row.prompt for row in r.journal.closed if row.version <= version}
        assert extra["next_slot"] == 40 + cursor  # so that no slot's number is given twice over resumes
        assert [0, 1] not in extra["open"]
        assert {index for _, index in extra["open"]} == set(range(cursor)) - ended
        assert extra["open"] == sorted(extra["open"])


def test_the_history_up_to_a_checkpoint_is_written_before_it() -> None:
    recorder = FakeRecorder(write_s=1.0)
    rows: list[list[int]] = []

    class Learner(FakeLearner):
        async def save(self, directory: Path, extra: Any) -> None:
            rows.append(list(r.journal.steps))
            await super().save(directory, extra)

    r = rig("checkpoint.every=3", learner=Learner(), recorder=recorder)
    r.run()
    assert rows == [[1, 2, 3]]
    assert recorder.files[2][0] == "step-000003"


def test_a_resumed_run_trains_the_open_prompts_first_and_goes_on_behind_the_cursor() -> None:
    first = rig("learner.steps=100", "checkpoint.every=3")

    async def crash(loop: TrainingLoop) -> None:
        while not first.learner.saved:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(crash)
    (_, extra) = first.learner.saved[0]
    opened = [index for _, index in extra["open"]]
    second = rig(
        "learner.steps=12",
        learner=FakeLearner(version=3),
        prompts=FakePrompts(extra["source"]["index"]),
        reopened=[make_prompt(index) for index in opened],
        first_id=extra["next_slot"],
    )
    second.run()
    trained = [row.prompt for row in second.journal.closed]
    assert trained == [*opened, *range(extra["source"]["index"], 100)][:18]
    before = [row.prompt for row in first.journal.closed if row.version <= 3]
    assert sorted(before + trained) == list(range(24))
    slots = {row.slot for row in first.journal.closed if row.version <= 3} | {row.slot for row in second.journal.closed}
    assert len(slots) == 24


def test_a_resumed_run_admits_no_more_than_its_slots() -> None:
    """Fault 7: at a high version, at most (S+1) batches are open."""
    r = rig(
        "learner.steps=9999", learner=FakeLearner(version=5000), workers=[FakeRollout("a", tokens=lambda slot: 10**6)]
    )

    async def stop(loop: TrainingLoop) -> None:
        await at(1.0)
        assert len(r.ledger.open) == r.config.slots == 8
        assert {slot.admitted_version for slot in r.ledger.open} == {5000}
        loop.stop()

    r.run(stop)


def test_a_checkpoint_after_the_run_names_the_batch_that_stop_left_over() -> None:
    r = rig("learner.steps=100", learner=FakeLearner(step_s=1.0))

    async def stop(loop: TrainingLoop) -> None:
        await at(2.5)
        loop.stop()

    loop = r.run(stop)
    run(loop.checkpoint())
    (_, extra) = r.learner.saved[0]
    assert [index for _, index in extra["open"]] == list(range(6, extra["source"]["index"]))
    run(loop.checkpoint())
    assert len(r.learner.saved) == 1  # once per version


def test_a_step_reports_only_what_the_catalogue_defines_and_all_that_the_loop_knows() -> None:
    r = rig(workers=two_workers())
    r.run()
    _, metrics = r.journal.rows[-1]
    assert metrics["staleness/bound"] == 4
    assert metrics["weight_sync/acked"] in (1, 2)
    assert metrics["workers/rollout/ready"] == 2
    assert metrics["ledger/trained"] == 12
    states = ("waiting", "in_flight", "finished", "learning", "trained", "rejected")
    assert sum(metrics[f"ledger/{name}"] or 0 for name in states) == metrics["ledger/admitted"]
    assert metrics["ledger/lost"] == 0
