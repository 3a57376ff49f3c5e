"""Do rollout actors scale as engines do? One and two of them against as many engines with nothing around them.

    python -m benchmarks.scaling [--rounds 5]

Generated tokens per second, alternating on one machine:
  bare_1    one engine in a process of its own, driven by a plain loop
  actors_1  the same work through one rollout actor, as the control loop asks for it
  bare_2    two such processes at once
  actors_2  two rollout actors at once

Process i of either kind is pinned as a run pins rollout worker i; with two cores both share the one that the learner
does not have. A process holds as many groups as a run gives a worker; one that is finished makes room for the next.
Rates are over all processes of a kind together, from the middle half of the groups they finished.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import interleave, keep, ratios, say, summary
from benchmarks.throughput import Rate
from rlsys.config import load_config
from rlsys.config.schema import RunConfig
from rlsys.scheduling.routing import groups_per_worker

GROUPS = 768
"""Per process."""

Finished = list[tuple[float, int]]
"""When a group finished (`perf_counter`, which all processes of a machine share), and its tokens."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    arguments, overrides = parser.parse_known_args()
    scratch = Path(tempfile.mkdtemp())
    config = load_config(arguments.config, [f"run_dir={scratch}", "rollout.workers=2", *overrides])
    try:
        result = measure(config, arguments.rounds)
    finally:
        shutil.rmtree(scratch)
    extra = "".join(f" {o}" for o in overrides)
    keep("scaling", f"python -m benchmarks.scaling --rounds {arguments.rounds}{extra}", result)


def measure(config: RunConfig, rounds: int) -> dict[str, Any]:
    """All four, and how many times a bare engine's rate the actors reach."""
    from rlsys.control.cluster import cluster
    from rlsys.control.lifecycle import initial_model

    path = initial_model(config)
    with cluster(config):
        bench = Bench(config, path)
        try:
            samples = interleave(
                {
                    "bare_1": lambda: bench.bare(1),
                    "actors_1": lambda: bench.actors(1),
                    "bare_2": lambda: bench.bare(2),
                    "actors_2": lambda: bench.actors(2),
                },
                rounds,
            )
        finally:
            bench.close()
    found = {
        "one_over_bare": ratios(samples["actors_1"], samples["bare_1"]),
        "two_over_bare": ratios(samples["actors_2"], samples["bare_2"]),
    }
    for name, values in {**samples, **found}.items():
        say(f"{name:<16} {summary(values)}")
    return {"samples": samples, "ratios": found, "summary": {n: summary(v) for n, v in {**samples, **found}.items()}}


class Bench:
    """Two bare engines and two rollout actors, idle while the others work."""

    def __init__(self, config: RunConfig, path: str) -> None:
        from rlsys.actors.process import assign_cores
        from rlsys.control.launch import Launcher
        from rlsys.control.preflight import load_prompts

        launcher = Launcher(config, path)
        self._prompts = load_prompts(config, path).source
        self._engines = [Bare(config, path, number) for number in range(2)]
        self._ports = [launcher.rollout(f"rollout-{number}", number, number) for number in range(2)]
        self._slots = itertools.count()
        self._room = room(config)
        # where the controller would be
        os.sched_setaffinity(0, assign_cores(sorted(os.sched_getaffinity(0)), "other", rollouts=2))
        asyncio.run(self._ready())

    async def _ready(self) -> None:
        await asyncio.gather(*(port.loaded() for port in self._ports))

    def bare(self, count: int) -> float:
        """Of the first `count` engines."""
        engines = self._engines[:count]
        for engine in engines:
            engine.begin([next(self._prompts).token_ids for _ in range(GROUPS)])
        return tokens_per_s(engine.finished() for engine in engines)

    def actors(self, count: int) -> float:
        """Of the first `count` actors."""
        ports = self._ports[:count]

        async def one(index: int, room: asyncio.Semaphore) -> tuple[float, int]:
            async with room:
                done, _ = await ports[index % count].generate(next(self._slots), 1, next(self._prompts))
            return time.perf_counter(), done.tokens

        async def generate() -> Finished:
            rooms = [asyncio.Semaphore(self._room) for _ in ports]
            return await asyncio.gather(*(one(i, rooms[i % count]) for i in range(GROUPS * count)))

        return tokens_per_s([asyncio.run(generate())])

    def close(self) -> None:
        """End the bare engines; the cluster ends the actors."""
        for engine in self._engines:
            engine.close()


def room(config: RunConfig) -> int:
    """Groups that a process holds at once."""
    return groups_per_worker(config.rollout.max_concurrent_sequences, config.rollout.samples_per_prompt)


def tokens_per_s(parts: Any) -> float:
    """Of groups that several processes finished, in the order of time."""
    rate = Rate()
    for at, tokens in sorted(itertools.chain.from_iterable(list(parts))):
        rate.add(tokens, at)
    return rate.tokens_per_s


class Bare:
    """An engine in a process of its own, driven by a plain loop, pinned as rollout worker `number`."""

    def __init__(self, config: RunConfig, path: str, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=drive, args=(theirs, config, path, number), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def begin(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Start on these prompts."""
        self._pipe.send(prompts)

    def finished(self) -> Finished:
        """All of them, once they are done."""
        done: Finished = self._pipe.recv()
        return done

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def drive(pipe: Connection, config: RunConfig, path: str, number: int) -> None:
    """What runs in the process of a bare engine."""
    from rlsys.actors.process import leave_core_to, settle

    cores = settle("rollout", config, index=number)
    from rlsys.engines.protocol import Sampling
    from rlsys.engines.vllm_engine import VllmEngine

    engine = VllmEngine(path, config.model, config.rollout, seed=number)
    leave_core_to(threading.get_native_id(), cores, config)
    sampling = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=config.rollout.temperature)
    keys = itertools.count()
    pipe.send("ready")
    while prompts := pipe.recv():
        done: Finished = []
        waiting = iter(prompts)

        def add(groups: int, waiting: Iterator[tuple[int, ...]] = waiting) -> None:
            for prompt in itertools.islice(waiting, groups):
                engine.add(str(next(keys)), prompt, config.rollout.samples_per_prompt, sampling)

        add(room(config))
        while engine.busy:
            for _, responses in engine.step():
                done.append((time.perf_counter(), sum(len(r.response_ids) for r in responses)))
                add(1)
        pipe.send(done)
    engine.shutdown()


if __name__ == "__main__":
    main()
