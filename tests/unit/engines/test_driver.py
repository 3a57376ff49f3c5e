"""The engine is touched between two steps only, and whoever waits for it gets an answer or an error.

The fake engine takes every step when the test lets it, so that commands fall where the test wants them.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from rlsys.engines.driver import EngineDriver
from rlsys.engines.protocol import ApplyReport, Buffer, Sampled, Sampling
from rlsys.errors import EngineError, PromptRefused, WeightSyncError
from rlsys.versions import VersionSpan, WeightManifest
from tests.fakes import make_rollout

NOTHING = np.zeros(0, dtype=np.uint8)


class FakeEngine:
    """A prompt of n tokens gets responses of n tokens. Each step waits for a permit; `free()` gives endlessly many."""

    def __init__(self) -> None:
        self._version = 0
        self._running: dict[str, tuple[int, int, list[int]]] = {}
        self.permits = threading.Semaphore(0)
        self.free_running = False
        self.in_step = False
        self.steps = 0
        self.log: list[str] = []
        self.fail_at: int | None = None
        self.add_error: Exception | None = None
        self.add_s = 0.0
        self.threads: set[int] = set()
        self.shut = 0

    def free(self) -> None:
        self.free_running = True
        self.permits.release()

    def _enter(self, what: str) -> None:
        assert not self.in_step, f"{what} in the middle of a step"
        self.threads.add(threading.get_ident())
        self.log.append(what)

    @property
    def serving_version(self) -> int:
        return self._version

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def add(self, key: str, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling) -> None:
        self._enter("add")
        time.sleep(self.add_s)
        if self.add_error:
            raise self.add_error
        if len(prompt_ids) > 10:
            raise EngineError(f"prompt of {len(prompt_ids)} tokens refused")
        self._running[key] = (len(prompt_ids), samples, [])

    def step(self) -> list[tuple[str, list[Sampled]]]:
        self._enter("step")
        self.in_step = True
        if not self.free_running:
            assert self.permits.acquire(timeout=20)
        self.in_step = False
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("out of memory")
        finished = []
        for key, (length, samples, versions) in list(self._running.items()):
            versions.append(self._version)
            if len(versions) == length:
                del self._running[key]
                finished.append((key, [sampled(versions) for _ in range(samples)]))
        return finished

    def apply(self, manifest: WeightManifest, buffer: Buffer) -> None:
        self._enter(f"apply {manifest.version}")
        if manifest.version < 0:
            raise WeightSyncError(f"version {manifest.version} was not applied")
        if manifest.version > 99:
            raise EngineError(f"version {manifest.version} was applied in part")
        self._version = manifest.version

    def shutdown(self) -> None:
        self.shut += 1


def sampled(versions: list[int]) -> Sampled:
    rollout = make_rollout(versions)
    return Sampled(
        response_ids=rollout.response_ids,
        logprobs=rollout.behavior_logprobs,
        version_spans=rollout.version_spans,
        finish_reason="stop",
        text="",
    )


def manifest(version: int) -> WeightManifest:
    return WeightManifest(version=version, layout=(), nbytes=0, checksum="")


def drive(work: Callable[[EngineDriver, FakeEngine], Coroutine[Any, Any, None]]) -> FakeEngine:
    """Run `work`, then close; nothing may take longer than 20 s."""
    engine = FakeEngine()
    driver = EngineDriver(engine)

    async def main() -> None:
        async with asyncio.timeout(20):
            await work(driver, engine)

    try:
        asyncio.run(main())
    finally:
        engine.free()
        driver.close()
    assert not driver._thread.is_alive()
    return engine


def generate(driver: EngineDriver, tokens: int, samples: int = 1) -> asyncio.Task[list[Sampled]]:
    sampling = Sampling(max_new_tokens=tokens, temperature=1.0)
    return asyncio.create_task(driver.generate(tuple(range(tokens)), samples, sampling))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- the other side is a thread
        await asyncio.sleep(0.001)


async def step(engine: FakeEngine, steps: int = 1) -> None:
    """Let the engine take that many steps and reach the middle of the next one, if there is something to decode."""
    target = engine.steps + steps
    for _ in range(steps):
        engine.permits.release()
    await until(lambda: engine.steps >= target and (engine.in_step or not engine.busy))


def spans(responses: list[Sampled]) -> list[tuple[int, int, int]]:
    return [(span.start, span.stop, span.version) for span in responses[0].version_spans]


# Decoding


def test_every_prompt_gets_its_own_responses() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.free()
        results = await asyncio.gather(*(generate(driver, n, samples=n) for n in (3, 1, 5)))
        assert [[len(r.response_ids) for r in responses] for responses in results] == [[3] * 3, [1], [5] * 5]
        assert driver.generated_tokens == 9 + 1 + 25
        assert driver.pending == 0

    engine = drive(work)
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_prompts_join_while_others_are_being_decoded() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        long = generate(driver, 6)
        await step(engine, 2)
        short = generate(driver, 2)
        await asyncio.sleep(0.01)
        await step(engine, 3)
        assert len((await short)[0].response_ids) == 2
        assert not long.done()
        engine.free()
        await long

    assert drive(work).steps == 6


def test_an_idle_engine_takes_no_step() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.free()
        await asyncio.sleep(0.05)
        await driver.apply(manifest(1), NOTHING)
        await asyncio.sleep(0.05)

    engine = drive(work)
    assert (engine.steps, engine.log) == (0, ["apply 1"])


def test_adding_a_prompt_is_work() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.free()
        engine.add_s = 0.05
        await generate(driver, 1)
        assert driver.busy_s >= 0.05
        assert driver.paused_s == 0

    drive(work)


# Updates


def test_a_running_response_continues_under_the_new_version_from_the_next_step_on() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        response = generate(driver, 5)
        await step(engine, 2)  # the third step is running now
        update = asyncio.create_task(driver.apply(manifest(7), NOTHING))
        await asyncio.sleep(0.05)
        assert not update.done()  # the fake asserts that nothing but a step happens during a step
        assert driver.serving_version == 0
        engine.free()
        report = await update
        assert isinstance(report, ApplyReport)
        assert (report.version, driver.serving_version) == (7, 7)
        assert report.pause_s == driver.paused_s > 0
        assert spans(await response) == [(0, 3, 0), (3, 5, 7)]

    engine = drive(work)
    assert engine.log == ["add", "step", "step", "step", "apply 7", "step", "step"]


def test_updates_and_prompts_happen_in_the_order_they_were_asked_for() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        first = generate(driver, 2)
        await step(engine, 1)
        updates = [asyncio.create_task(driver.apply(manifest(version), NOTHING)) for version in (1, 2)]
        last = generate(driver, 1)
        await asyncio.sleep(0.01)
        engine.free()
        await asyncio.gather(*updates)
        assert spans(await first) == [(0, 2, 0)]
        assert spans(await last) == [(0, 1, 2)]

    assert drive(work).log == ["add", "step", "step", "apply 1", "apply 2", "add", "step"]


def test_a_refused_version_leaves_the_old_one_serving_and_the_requests_running() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        response = generate(driver, 3)
        await step(engine, 1)
        update = asyncio.create_task(driver.apply(manifest(-1), NOTHING))
        await asyncio.sleep(0.01)
        engine.free()
        with pytest.raises(WeightSyncError, match="version -1 was not applied"):
            await update
        assert driver.serving_version == 0
        assert driver.paused_s == 0
        assert spans(await response) == [(0, 3, 0)]

    drive(work)


def test_a_version_that_fails_half_way_stops_the_engine_and_no_token_is_sampled_from_it() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        response = generate(driver, 3)
        await step(engine, 1)
        update = asyncio.create_task(driver.apply(manifest(100), NOTHING))
        behind = asyncio.create_task(driver.apply(manifest(1), NOTHING))
        await asyncio.sleep(0.01)
        engine.free()
        for waiting in (update, response, behind, asyncio.create_task(driver.apply(manifest(2), NOTHING))):
            with pytest.raises(EngineError, match="the engine stopped: version 100 was applied in part"):
                await waiting

    assert drive(work).log == ["add", "step", "step", "apply 100"]


# Failures


def test_the_end_of_the_engine_is_told_to_all_who_wait_for_it_and_to_nobody_before() -> None:
    """An idle worker has nobody else to fail; one that left waiting takes nothing with it."""

    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.free()
        left, *waiting = (asyncio.create_task(driver.ended()) for _ in range(3))
        await generate(driver, 2)
        left.cancel()
        await driver.apply(manifest(1), NOTHING)
        assert not any(task.done() for task in waiting)
        with pytest.raises(EngineError):
            await driver.apply(manifest(100), NOTHING)
        for task in (*waiting, asyncio.create_task(driver.ended())):
            with pytest.raises(EngineError, match="the engine stopped: version 100"):
                await task

    drive(work)


def test_a_refused_prompt_fails_only_itself() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.free()
        good, bad, later = generate(driver, 4), generate(driver, 11), generate(driver, 2)
        with pytest.raises(PromptRefused, match="prompt of 11 tokens refused"):
            await bad
        assert len((await good)[0].response_ids) == 4
        assert len((await later)[0].response_ids) == 2

    drive(work)


def test_a_failing_engine_fails_all_that_wait_and_all_that_come() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.fail_at = 2
        waiting = [generate(driver, 5), generate(driver, 9)]
        await step(engine, 1)
        queued = generate(driver, 5), asyncio.create_task(driver.apply(manifest(1), NOTHING))
        await asyncio.sleep(0.01)
        engine.free()
        errors = await asyncio.gather(*waiting, *queued, return_exceptions=True)
        for error in errors:
            assert isinstance(error, EngineError)
            assert not isinstance(error, PromptRefused)
            assert str(error) == "the engine stopped: out of memory"
            assert isinstance(error.__cause__, RuntimeError)
        assert len({id(error) for error in errors}) == 4
        assert driver.pending == 0
        for late in (generate(driver, 1), asyncio.create_task(driver.apply(manifest(1), NOTHING))):
            with pytest.raises(EngineError, match="the engine stopped: out of memory"):
                await late

    drive(work)


def test_an_unexpected_error_while_a_prompt_is_added_reaches_its_caller() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        engine.add_error = TypeError("unhashable")
        with pytest.raises(EngineError, match="the engine stopped: unhashable"):
            await generate(driver, 1)

    drive(work)


def test_a_caller_that_leaves_takes_nobody_with_it() -> None:
    """One cancelled while its response is decoded, one before its prompt reached the engine."""

    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        leaving, staying = generate(driver, 3), generate(driver, 4)
        await step(engine, 1)
        never = generate(driver, 5)
        update = asyncio.create_task(driver.apply(manifest(1), NOTHING))
        await asyncio.sleep(0.01)
        for task in (leaving, never, update):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        engine.free()
        assert spans(await staying) == [(0, 4, 0)]
        assert spans(await generate(driver, 1)) == [(0, 1, 0)]

    assert drive(work).log.count("add") == 3


def test_closing_fails_what_is_unfinished_and_refuses_what_comes() -> None:
    async def work(driver: EngineDriver, engine: FakeEngine) -> None:
        running = generate(driver, 9)
        await step(engine, 1)
        queued = generate(driver, 2)
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(asyncio.to_thread(driver.close))
        await asyncio.sleep(0.01)
        behind = generate(driver, 2)  # asked for while the last step is running
        await asyncio.sleep(0.01)
        engine.permits.release()
        await closing
        for task in (running, queued, behind, generate(driver, 1)):
            with pytest.raises(EngineError, match="the engine is closed"):
                await task

    assert drive(work).shut == 2  # here, and in `drive`


def test_spans_of_the_fake_tile_the_response() -> None:
    assert sampled([3, 3, 4]).version_spans == (
        VersionSpan(start=0, stop=2, version=3),
        VersionSpan(start=2, stop=3, version=4),
    )
