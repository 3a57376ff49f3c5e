"""Every held-out prompt is answered once, by whichever worker still lives."""

import asyncio
from typing import Any

import pytest

from rlsys.control.evaluation import CHUNK, evaluate
from rlsys.control.ports import WorkerLost
from rlsys.errors import RewardError
from tests.fakes import FakeRewards, FakeRollout, make_prompt, now, run

PROMPTS = [make_prompt(n) for n in range(2 * CHUNK + 3)]


class OneByOne(FakeRollout):
    """Counts the prompts it was asked; answers a chunk in `token_s` seconds a prompt."""

    asked: int = 0

    async def greedy(self, prompts: Any) -> Any:
        self.asked += len(prompts)
        return await super().greedy(prompts)


def test_prompts_are_spread_over_the_workers_in_chunks() -> None:
    a, b = OneByOne("a", version=3), OneByOne("b", version=5)
    result = run(evaluate(PROMPTS, [a, b], FakeRewards()))
    assert (a.asked, b.asked) == (CHUNK + 3, CHUNK)
    assert result.prompts == len(PROMPTS)
    assert (result.oldest_version, result.newest_version) == (3, 5)
    assert result.response_tokens == 2 * 4.0  # the fake answers twice
    assert result.accuracy == 1.0


def test_the_accuracy_is_the_mean_reward() -> None:
    class Rewards(FakeRewards):
        async def score(self, payload: Any) -> Any:
            score = await super().score(payload)
            score.rewards[:] = payload.prompt.index % 4 == 0
            return score

    assert run(evaluate(PROMPTS[:10], [FakeRollout("a")], Rewards())).accuracy == 0.3


@pytest.mark.parametrize("dead", [0, 1])
def test_another_worker_takes_the_part_of_a_dead_one(dead: int) -> None:
    workers = [OneByOne("a"), OneByOne("b")]
    workers[dead].kill()
    assert run(evaluate(PROMPTS, workers, FakeRewards())).prompts == len(PROMPTS)
    assert workers[1 - dead].asked == len(PROMPTS)


def test_without_any_worker_it_says_so() -> None:
    a = FakeRollout("a", alive=False)
    with pytest.raises(WorkerLost, match="a was killed"):
        run(evaluate(PROMPTS, [a], FakeRewards()))
    with pytest.raises(WorkerLost, match="there is no rollout worker"):
        run(evaluate(PROMPTS, [], FakeRewards()))


def test_a_failure_is_told_when_nothing_runs_any_more() -> None:
    async def main() -> None:
        quick, slow = FakeRollout("a", token_s=0.001), FakeRollout("b", token_s=1.0)
        rewards = FakeRewards(fail=lambda group: RewardError("no reward") if group.worker == "a" else None)
        with pytest.raises(RewardError, match="no reward"):
            await evaluate(PROMPTS, [quick, slow], rewards)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert now() == pytest.approx(4.0 * CHUNK)

    run(main())
