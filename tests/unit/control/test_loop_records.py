"""What the control loop writes down: records, evaluations, checkpoints, and what a resumed run makes of them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlsys.control.history import AHEAD
from rlsys.control.loop import TrainingLoop
from rlsys.errors import (
    RewardError,
)
from tests.fakes import (
    FakeLearner,
    FakePrompts,
    FakeRecorder,
    FakeRewards,
    FakeRollout,
    broken_reward,
    make_prompt,
    run,
)
from tests.rig import at, rig, two_workers

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
        r.config.path / "checkpoints" / f"step-{version:06d}" for version in (2, 4)
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
