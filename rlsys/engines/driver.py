"""Runs an engine in one thread, beside an asyncio loop that submits prompts and swaps weights.

    start() ─────┐                      ┌── futures resolve
                 ├─ inbox ─► [thread: apply? → add → step → deliver] ─┘
    apply() ─────┘

The thread takes commands only between two decode steps, so a new version never changes in the middle
of one, and running requests keep running. It sleeps when there is nothing to decode.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any, TypeVar

from rlsys.engines.protocol import ApplyReport, Buffer, Engine, Sampled, Sampling
from rlsys.errors import EngineError, PromptRefused, WeightSyncError
from rlsys.observability.spans import SpanLog
from rlsys.versions import PolicyVersion, WeightManifest

T = TypeVar("T")
Command = tuple[Future[Any], Callable[[], None]]


class EngineDriver:
    """Owns the engine and its thread. All methods are called from the asyncio side."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._pending: dict[str, Future[list[Sampled]]] = {}
        self._unresolved: set[Future[Any]] = set()
        self._keys = count()
        self._lock = threading.Lock()
        self._ended = False
        self._failure: BaseException | None = None
        self._version = engine.serving_version
        self.generated_tokens = 0
        self.busy_s = 0.0
        self.paused_s = 0.0
        self.spans = SpanLog()
        self._stretch: tuple[float, int] | None = None  # when decoding began without a break since, and tokens by then
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def serving_version(self) -> PolicyVersion:
        """Version new tokens are sampled from."""
        return self._version

    @property
    def thread(self) -> int:
        """The operating system's id of the thread that decodes."""
        thread = self._thread.native_id
        assert thread is not None  # it was started
        return thread

    @property
    def pending(self) -> int:
        """Groups submitted and not finished."""
        return len(self._pending)

    def start(self, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling) -> Future[list[Sampled]]:
        """All responses to one prompt, in time. Its callbacks run in the engine's thread, between decode steps.

        It fails with `PromptRefused`, or with `EngineError` when the engine has stopped.
        """
        future: Future[list[Sampled]] = Future()
        key = str(next(self._keys))

        def submit() -> None:
            try:
                self._engine.add(key, prompt_ids, samples, sampling)
            except EngineError as error:
                future.set_exception(PromptRefused(str(error)))
            else:
                self._pending[key] = future

        self._put(future, submit)
        return future

    async def generate(self, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling) -> list[Sampled]:
        """`start`, awaited."""
        return await asyncio.wrap_future(self.start(prompt_ids, samples, sampling))

    async def apply(self, manifest: WeightManifest, buffer: Buffer) -> ApplyReport:
        """Serve a new version after the decode step that runs now.

        Raises `WeightSyncError` when the engine refuses it and goes on with the old one. Any other failure stops the
        engine, which nobody may sample from any more, and arrives as `EngineError`.
        """
        future: Future[ApplyReport] = Future()

        def swap() -> None:
            self._end_stretch()
            begun, start = time.time(), time.perf_counter()
            try:
                self._engine.apply(manifest, buffer)
            except WeightSyncError as error:
                future.set_exception(error)
                return
            pause = time.perf_counter() - start
            self._version = self._engine.serving_version
            self.spans.add("pause", begun, begun + pause, version=self._version)
            self.paused_s += pause
            future.set_result(ApplyReport(version=self._version, pause_s=pause))

        self._put(future, swap)
        return await asyncio.wrap_future(future)

    async def ended(self) -> None:
        """Never returns: raises `EngineError` when the engine has stopped or is closed."""
        future: Future[None] = Future()
        self._put(future, lambda: None)
        await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the thread and the engine; unfinished requests fail with `EngineError`."""
        self._inbox.put(None)
        self._thread.join(timeout=30)
        self._engine.shutdown()

    def _put(self, future: Future[T], command: Callable[[], None]) -> None:
        """Let the thread run `command`, which resolves `future` sooner or later; its end resolves it too."""
        with self._lock:
            if self._ended:
                future.set_exception(self._end())
                return
            self._unresolved.add(future)
            self._inbox.put((future, command))
        future.add_done_callback(self._unresolved.discard)

    def _end(self) -> EngineError:
        error = EngineError("the engine is closed" if self._failure is None else f"the engine stopped: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._stretch = self._stretch or (time.time(), self.generated_tokens)
                start = time.perf_counter()
                for key, responses in self._engine.step():
                    self.generated_tokens += sum(len(r.response_ids) for r in responses)
                    self._pending.pop(key).set_result(responses)
                self.busy_s += time.perf_counter() - start
        except BaseException as error:
            self._failure = error
        with self._lock:
            self._ended = True
        self._pending.clear()  # before those who wait for it learn that it failed
        for future in tuple(self._unresolved):  # running, queued, or the one whose command brought us here
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(self._end())

    def _take_commands(self) -> bool:
        """Run queued commands; wait for one when idle. False: close."""
        while True:
            if idle := not self._engine.busy:
                self._end_stretch()
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            future, command = item
            if future.set_running_or_notify_cancel():  # from here on its caller can leave, but not cancel it
                start, paused = time.perf_counter(), self.paused_s
                command()
                self.busy_s += time.perf_counter() - start - (self.paused_s - paused)

    def _end_stretch(self) -> None:
        """Decoding stops here, for want of prompts or for a new version."""
        if self._stretch is not None:
            start, tokens = self._stretch
            self.spans.add("generate", start, time.time(), tokens=self.generated_tokens - tokens)
            self._stretch = None
