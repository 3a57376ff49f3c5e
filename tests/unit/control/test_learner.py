"""Several ranks answer as one learner, and fail as one."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rlsys.control.learner import GRACE_S, RemoteLearner
from rlsys.errors import ClusterError, NonFiniteError
from tests.fakes import make_ticket, now, run

Answer = Callable[[], Coroutine[Any, Any, Any]]

WITHOUT_INPUT = RayTaskError("update", "Traceback ...", ActorDiedError()).as_instanceof_cause()
"""As Ray raises it of a task whose input was to come from a dead actor."""


def learner(*answers: Answer) -> RemoteLearner:
    """Ranks that answer `publish` and `save` like this."""
    return RemoteLearner([SimpleNamespace(publish=remote(a), save=remote(a)) for a in answers])


def remote(answer: Answer) -> SimpleNamespace:
    return SimpleNamespace(remote=lambda *_: answer())


def after(seconds: float, outcome: Any) -> Answer:
    """Returns `outcome`, or raises it, after a while."""

    async def answer() -> Any:
        await asyncio.sleep(seconds)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return answer


def never() -> Answer:
    return after(1e9, None)


async def seconds_until(work: Coroutine[Any, Any, Any], error: type[Exception], match: str) -> float:
    started = now()
    with pytest.raises(error, match=match):
        await work
    return now() - started


def test_the_first_rank_answers_when_all_are_done() -> None:
    async def main() -> None:
        started = now()
        assert await learner(after(1, make_ticket(3)), after(5, None)).publish() == make_ticket(3)
        assert now() - started == 5

    run(main())


def test_a_dead_rank_is_named_whoever_waits_for_it() -> None:
    async def main() -> None:
        port = learner(never(), after(2, ActorDiedError()))
        assert await seconds_until(port.publish(), ClusterError, r"rank 1 of 2 died; --resume") <= 2 + GRACE_S

    run(main())


def test_a_rank_that_lost_touch_is_not_blamed() -> None:
    async def main() -> None:
        port = learner(after(2, RuntimeError("Connection closed by peer")), after(5, ActorDiedError()))
        assert await seconds_until(port.publish(), ClusterError, r"rank 1 of 2 died") == 5

    run(main())


def test_the_death_of_who_makes_the_input_is_not_the_learners() -> None:
    async def main() -> None:
        port = learner(after(1, WITHOUT_INPUT), after(1, WITHOUT_INPUT))
        await seconds_until(port.publish(), ClusterError, r"^the process that made this call's input died")

    run(main())


def test_a_rank_that_got_no_input_from_a_dead_rank_is_not_blamed() -> None:
    async def main() -> None:
        port = learner(after(2, ActorDiedError()), after(1, WITHOUT_INPUT))
        await seconds_until(port.publish(), ClusterError, r"rank 0 of 2 died")

    run(main())


def test_an_error_of_ours_arrives_as_itself() -> None:
    async def main() -> None:
        port = learner(after(1, RuntimeError("timed out")), after(1, NonFiniteError("3 learner batches in a row")))
        await seconds_until(port.save(Path(), {}), NonFiniteError, "3 learner batches in a row")

    run(main())


def test_one_rank_that_fails_alone_ends_the_call_though_the_other_waits_for_it() -> None:
    async def main() -> None:
        port = learner(after(1, RuntimeError("out of memory")), never())
        assert await seconds_until(port.publish(), RuntimeError, "out of memory") == 1 + GRACE_S

    run(main())


def test_a_call_that_is_given_up_leaves_nothing_behind() -> None:
    async def main() -> None:
        waiting = asyncio.create_task(learner(never(), never()).publish())
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
