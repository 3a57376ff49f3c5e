"""What the control loop does when a worker, a node, a reward or the learner fails: nothing is lost, nothing ignored."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from rlsys.control.loop import MAX_ATTEMPTS, MAX_FAILED_IN_A_ROW, TrainingLoop
from rlsys.control.ports import PayloadLost, WorkerLost
from rlsys.errors import (
    EngineError,
    NonFiniteError,
    PromptRefused,
    RewardError,
    StalenessViolation,
)
from tests.fakes import (
    FakeLearner,
    FakeRecorder,
    FakeRewards,
    FakeRollout,
    broken_reward,
    make_prompt,
)
from tests.rig import at, rig, two_workers

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
    assert r.kinds.count("worker_lost") == 1
    assert "sync_failed" not in r.kinds
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
    assert r.kinds.count("worker_lost") == MAX_ATTEMPTS
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
    assert max(r.ages) <= bound
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
    assert set(r.kinds) == {"evaluation_failed"}


# Rewards


def test_groups_without_a_reward_end_by_name_and_the_run_goes_on() -> None:
    r = rig(rewards=FakeRewards(fail=broken_reward(0, 5, 6)))
    assert r.run().version == 6
    assert r.ends == {"trained": 12, "failed_reward": 3}
    assert not {0, 5, 6} & set(r.trained)
    assert r.journal.events[0] == ("failed_reward", "slot 0, prompt 0/0: no reward for 0")
    assert r.kinds == ["failed_reward"] * 3


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
    assert set(dead.kinds) == {"failed_reward"}


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
    assert r.kinds == ["rejected_nonfinite"] * 2
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
