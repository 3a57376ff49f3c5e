"""A queue that any thread fills and one coroutine at a time empties whole."""

import asyncio
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """Wakes its taker once, however much was put in meanwhile: what was ready together leaves together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._taker: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, item: T) -> None:
        """From any thread."""
        with self._lock:
            self._items.append(item)
            taker, self._taker = self._taker, None
        if taker is not None:
            loop, ready = taker
            loop.call_soon_threadsafe(ready.set)

    async def take(self) -> list[T]:
        """Everything that was put in since the last call; waits for something."""
        while True:
            with self._lock:
                if self._items:
                    items, self._items = self._items, []
                    return items
                ready = asyncio.Event()
                self._taker = asyncio.get_running_loop(), ready
            await ready.wait()
