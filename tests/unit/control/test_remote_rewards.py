"""Reward workers come and go between calls, and no call is lost over it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rlsys.control.ports import WorkerLost
from rlsys.control.remote import Part, RemoteRewards, RemoteWorker
from tests.fakes import run


class Method:
    """An actor's method: `remote` gives something to wait for."""

    def __init__(self, work: Callable[..., Awaitable[Any]]) -> None:
        self.remote = work


class Actor:
    """Scores a group with its own name, after `takes_s`."""

    def __init__(self, name: str, takes_s: float = 0.0, alive: bool = True) -> None:
        self.name, self.takes_s, self.alive, self.calls = name, takes_s, alive, 0
        self.score, self.score_all = Method(self._score), Method(self._score_all)

    async def _score(self, places: Any, *bundles: Any) -> list[str]:
        self.calls += 1
        await asyncio.sleep(self.takes_s)
        if not self.alive:
            raise ActorDiedError
        return [self.name] * len(places)

    async def _score_all(self, payload: Any) -> list[str]:
        return await self._score(payload)


def rewards(*actors: Actor) -> Any:
    """The port over these; its scores are names here."""
    return RemoteRewards({actor.name: actor for actor in actors})


def part(place: int = 0) -> Part:
    return Part("bundle", place)


def test_workers_take_turns_and_one_that_joins_takes_its_own() -> None:
    async def work() -> None:
        pool = rewards(Actor("a"), Actor("b"))
        assert [await pool.score(part()) for _ in range(4)] == ["a", "b", "a", "b"]
        pool.add("c", RemoteWorker(Actor("c")))
        assert sorted([str(await pool.score(part())) for _ in range(3)]) == ["a", "b", "c"]
        assert list(pool.workers) == ["a", "b", "c"]

    run(work())


def test_what_is_handed_over_at_one_moment_is_one_call() -> None:
    async def work() -> None:
        actor = Actor("a")
        pool = rewards(actor)
        assert await asyncio.gather(*(pool.score(part(i)) for i in range(5))) == ["a"] * 5
        assert actor.calls == 1

    run(work())


def test_a_removed_worker_finishes_its_calls_and_gets_no_further_one() -> None:
    async def work() -> None:
        leaving, staying = Actor("a", takes_s=1.0), Actor("b")
        pool = rewards(leaving, staying)
        call = asyncio.create_task(pool.score(part()))
        await asyncio.sleep(0.5)
        pool.remove("a")
        idle = asyncio.create_task(pool.idle("a"))
        await asyncio.sleep(0.1)
        assert not idle.done()
        assert [await pool.score(part()) for _ in range(3)] == ["b"] * 3
        assert await call == "a"
        await idle
        assert leaving.calls == 1

    run(work())


def test_calls_wait_while_there_is_no_worker() -> None:
    async def work() -> None:
        pool = rewards(Actor("a"))
        pool.remove("a")
        calls = [asyncio.create_task(pool.score(part())), asyncio.create_task(pool.score_all([1, 2]))]
        await asyncio.sleep(10)
        assert not any(call.done() for call in calls)
        pool.add("b", RemoteWorker(Actor("b")))
        assert await asyncio.gather(*calls) == ["b", ["b", "b"]]

    run(work())


def test_one_that_died_is_reported_once_it_is_noticed_and_its_caller_told() -> None:
    async def work() -> None:
        dead, reported = Actor("a", alive=False), list[str]()
        pool = rewards(dead, Actor("b"))

        def report(name: str, error: WorkerLost) -> None:
            reported.append(name)
            pool.remove(name)

        pool.report_lost(report)
        with pytest.raises(WorkerLost, match="The actor died"):
            await pool.score(part())
        assert reported == ["a"]
        assert [await pool.score(part()) for _ in range(3)] == ["b"] * 3
        assert dead.calls == 1

    run(work())
