"""What was ready together leaves together; nothing is lost or repeated."""

import asyncio
import threading

from rlsys.actors.outbox import Outbox


def test_a_take_empties_it() -> None:
    outbox = Outbox[int]()
    for item in (1, 2, 3):
        outbox.put(item)

    async def main() -> list[list[int]]:
        first = await outbox.take()
        waiting = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox.put(4)
        return [first, await waiting]

    assert asyncio.run(main()) == [[1, 2, 3], [4]]


def test_items_of_many_threads_arrive_once_and_in_each_threads_order() -> None:
    outbox = Outbox[tuple[int, int]]()

    def fill(thread: int) -> None:
        for i in range(500):
            outbox.put((thread, i))

    async def main() -> list[tuple[int, int]]:
        threads = [threading.Thread(target=fill, args=(t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        taken: list[tuple[int, int]] = []
        async with asyncio.timeout(20):
            while len(taken) < 2000:
                taken += await outbox.take()
        for thread in threads:
            thread.join()
        return taken

    taken = asyncio.run(main())
    assert [[i for t, i in taken if t == thread] for thread in range(4)] == [list(range(500))] * 4
