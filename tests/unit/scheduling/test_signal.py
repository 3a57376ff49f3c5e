"""Who waits for a condition wakes up when it holds, however the changes fall."""

import asyncio
import random
from functools import partial

import pytest

from rlsys.scheduling.signal import Signal
from tests.fakes import Deadlock, run


def test_a_condition_that_holds_already_is_not_waited_for() -> None:
    run(Signal().until(lambda: True))


def test_a_change_between_two_looks_is_not_lost() -> None:
    async def main() -> list[int]:
        signal, state, seen = Signal(), [0], list[int]()

        def reached(wanted: int) -> bool:
            return state[0] >= wanted

        async def consumer() -> None:
            for wanted in range(1, 4):
                await signal.until(partial(reached, wanted))
                seen.append(state[0])

        task = asyncio.create_task(consumer())
        await asyncio.sleep(0)
        for _ in range(3):  # all three before the consumer can run again
            state[0] += 1
            signal.notify()
        await task
        return seen

    assert run(main()) == [3, 3, 3]


def test_everyone_whose_condition_holds_wakes_and_nobody_else() -> None:
    async def main() -> None:
        signal, state = Signal(), {"a": False, "b": False}
        tasks = [asyncio.create_task(signal.until(partial(state.__getitem__, key))) for key in ("a", "a", "b")]
        await asyncio.sleep(0)
        state["a"] = True
        signal.notify()
        await asyncio.sleep(1)
        assert [task.done() for task in tasks] == [True, True, False]
        state["b"] = True
        signal.notify()
        await asyncio.gather(*tasks)

    run(main())


def test_one_who_stops_waiting_does_not_disturb_the_others() -> None:
    async def main() -> None:
        signal, state = Signal(), [False]
        first, second = (asyncio.create_task(signal.until(lambda: state[0])) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        state[0] = True
        signal.notify()
        await second
        assert first.cancelled()

    run(main())


def test_a_condition_that_fails_fails_its_waiter_only() -> None:
    async def main() -> None:
        signal, state = Signal(), [1]
        failing = asyncio.create_task(signal.until(lambda: 1 // state[0] == 7))
        waiting = asyncio.create_task(signal.until(lambda: state[0] == 0))
        await asyncio.sleep(0)
        state[0] = 0
        signal.notify()
        await waiting
        with pytest.raises(ZeroDivisionError):
            await failing

    run(main())


@pytest.mark.parametrize("seed", range(10))
def test_a_chain_of_producers_and_consumers_always_comes_to_its_end(seed: int) -> None:
    """Ten stages hand 50 items on, each after a random wait; a lost wake-up would stop them, as a Deadlock."""

    async def main() -> int:
        chance, signal, done = random.Random(seed), Signal(), [50] + [0] * 10

        async def stage(number: int) -> None:
            while done[number] < 50:
                await signal.until(lambda: done[number - 1] > done[number])
                if chance.random() < 0.5:
                    await asyncio.sleep(chance.choice([0, 0.01, 0.02]))
                done[number] += 1
                signal.notify()

        async with asyncio.TaskGroup() as tasks:
            for number in range(1, 11):
                tasks.create_task(stage(number))
        return done[-1]

    assert run(main()) == 50


def test_the_test_above_can_fail() -> None:
    async def main() -> None:
        signal, state = Signal(), [False]
        task = asyncio.create_task(signal.until(lambda: state[0]))
        await asyncio.sleep(0)
        state[0] = True  # and nobody is told
        await task

    with pytest.raises(Deadlock):
        run(main())
