"""The control loop against plain fakes in virtual time: what it trains, in which order, and how it ends."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.control.loop import TrainingLoop
from rlsys.errors import (
    PromptRefused,
    WeightSyncError,
)
from tests.fakes import (
    FakeLearner,
    FakeReference,
    FakeRollout,
    run,
)
from tests.rig import at, rig, two_workers

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
    assert set(r.ages) == {0}
    assert r.ledger.counts()["admitted"] == 12 + 2  # the last commit let the next two in
    started = {slot: worker.name for worker in r.workers for slot, _ in worker.begun}
    assert set(started.values()) == {"a", "b"}
    for before, after in pairwise(r.learner.batches):
        assert after.at - before.at >= 0.05 + 4 * 0.01  # a whole step, then whole responses


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_the_default_never_exceeds_the_bound_and_uses_it(bound: int) -> None:
    r = rig(f"staleness.max={bound}", "learner.steps=20", workers=two_workers(token_s=0.037, apply_s=0.02))
    r.run()
    assert bound - 1 <= max(r.ages) <= bound
    assert len({batch.version for batch in r.learner.batches}) == 20


@pytest.mark.parametrize("backlog", [0, 1, 3])
def test_a_backlog_ages_every_token_by_as_many_versions(backlog: int) -> None:
    r = rig(f"staleness.max={backlog}", "staleness.serving_lag=0", f"staleness.backlog={backlog}", "learner.steps=20")
    r.run()
    assert r.trained == list(range(40))
    assert [set(batch.ages) for batch in r.learner.batches] == [{min(step, backlog)} for step in range(20)]


@settings(max_examples=40)
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
    assert max(r.ages) <= bound
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
    assert max(r.ages) <= 4
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
    assert r.kinds == ["looked"]


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
    assert max(r.ages) <= 4


def test_the_learner_is_at_most_one_unserved_version_ahead() -> None:
    r = rig(workers=[FakeRollout("a", apply_s=1.0)], learner=FakeLearner(step_s=0.01))
    r.run()
    for batch in r.learner.batches:
        assert batch.at >= batch.version * 1.0  # version v was made after v-1 had been served, 1 s each
