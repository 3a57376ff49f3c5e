"""How much does the system cost? The parts alone and together.

    python -m benchmarks.throughput [--rounds 5]

Four measurements, alternating on one Ray cluster, pinned as a run pins them:
  bare      the engine driven by a plain loop on the rollout core, no actor; generated tokens per second
            (here as in the next, a finished group makes room for the next prompt, as in a run)
  rollout   the same work through a rollout actor; generated tokens per second
  learner   the learner actor fed one recorded batch over and over; responses per second
  pipeline  the whole control loop: admission, rollout, rewards, reference, learner, weight sync, records;
            responses per second
"""

import argparse
import asyncio
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import interleave, keep, ratios, say, summary
from rlsys.config import load_config
from rlsys.config.schema import RunConfig
from rlsys.scheduling.routing import groups_per_worker

STEPS = 24
GROUPS = 768


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--name", default="throughput")
    arguments, overrides = parser.parse_known_args()
    scratch = Path(tempfile.mkdtemp())
    config = load_config(
        arguments.config, [f"run_dir={scratch}", "checkpoint.every=0", "eval.max_prompts=8", *overrides]
    )
    try:
        result = measure(config, arguments.rounds)
    finally:
        shutil.rmtree(scratch)
    named = f" --name {arguments.name}" if arguments.name != "throughput" else ""
    extra = "".join(f" {o}" for o in overrides)
    keep(arguments.name, f"python -m benchmarks.throughput --rounds {arguments.rounds}{named}{extra}", result)


def measure(config: RunConfig, rounds: int) -> dict[str, Any]:
    """All measurements of one configuration."""
    from rlsys.control.cluster import cluster
    from rlsys.control.lifecycle import initial_model

    path = initial_model(config)
    with cluster(config):
        bench = Bench(config, path)
        samples = interleave(
            {"bare": bench.bare, "rollout": bench.rollout, "learner": bench.learner, "pipeline": bench.pipeline}, rounds
        )
    limits = [min(r, t) for r, t in zip(bench.sampled[1:], samples["learner"], strict=True)]
    found = {
        "rollout_over_bare": ratios(samples["rollout"], samples["bare"]),
        "pipeline_over_limit": ratios(samples["pipeline"], limits),
        "sampled_over_learned": ratios(bench.sampled[1:], samples["learner"]),
        "learner_idle_fraction": bench.idle[1:],
        "learner_between_steps": bench.between[1:],
        "pause_fraction": bench.paused[1:],
    }
    for name, values in {**samples, **found}.items():
        say(f"{name:<24} {summary(values)}")
    return {"samples": samples, "ratios": found, "summary": {n: summary(v) for n, v in {**samples, **found}.items()}}


class Rate:
    """Groups as they finish. Rates are those of the middle half: neither the first requests nor the last stragglers."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._tokens: list[int] = []

    def add(self, tokens: int, at: float | None = None) -> None:
        """A group of that many tokens finished, now or `at` a `perf_counter`."""
        self._times.append(time.perf_counter() if at is None else at)
        self._tokens.append(tokens)

    @property
    def groups_per_s(self) -> float:
        """Of the middle half."""
        first, last = self._middle
        return (last - first) / (self._times[last] - self._times[first])

    @property
    def tokens_per_s(self) -> float:
        """Of the middle half."""
        first, last = self._middle
        return sum(self._tokens[first + 1 : last + 1]) / (self._times[last] - self._times[first])

    @property
    def _middle(self) -> tuple[int, int]:
        n = len(self._times)
        return n // 4, n - n // 4


class Bench:
    """One engine in this process and one fleet of actors, used in turn."""

    def __init__(self, config: RunConfig, path: str) -> None:
        from rlsys.actors.process import assign_cores, settle
        from rlsys.control import remote
        from rlsys.control.build import start_actors
        from rlsys.control.learner import RemoteLearner
        from rlsys.control.preflight import load_prompts
        from rlsys.observability.run_directory import RunDirectory

        self.config, self.path = config, path
        self.fleet = start_actors(config, path, None, 0)
        self.prompts = load_prompts(config, path)
        RunDirectory(config.path).create("")
        settle(
            "rollout", config.model_copy(update={"resources": config.resources.model_copy(update={"pin_cores": False})})
        )
        cores = sorted(os.sched_getaffinity(0))
        self.own_core = assign_cores(cores, "rollout")
        self.shared_cores = assign_cores(cores, "other", rollouts=config.rollout.workers)
        os.sched_setaffinity(0, self.own_core)
        from rlsys.engines.vllm_engine import VllmEngine

        self.engine = VllmEngine(path, config.model, config.rollout, seed=0)
        os.sched_setaffinity(0, self.shared_cores)  # where the controller would be
        self.open_groups = groups_per_worker(config.rollout.max_concurrent_sequences, config.rollout.samples_per_prompt)
        self.batch: list[Any] = []
        self.version = 0
        self.sampled: list[float] = []
        self.idle: list[float] = []
        self.between: list[float] = []
        self.paused: list[float] = []
        fleet = self.fleet
        ready = [RemoteLearner(fleet.learner).load(), *(w.stats.remote() for w in fleet.rollouts.values())]
        asyncio.run(remote.all_ready(ready))
        for name, handle in fleet.rollouts.items():
            asyncio.run(remote.all_ready([fleet.weights.add.remote(name, handle)]))

    def bare(self) -> float:
        """Generated tokens per second of the engine in a plain loop."""
        from rlsys.engines.protocol import Sampling

        rollout = self.config.rollout
        sampling = Sampling(max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature)
        prompts = enumerate([next(self.prompts.source) for _ in range(GROUPS)])
        finished = Rate()

        def add(groups: int) -> None:
            for i, prompt in itertools.islice(prompts, groups):
                self.engine.add(f"{self.version}-{i}", prompt.token_ids, rollout.samples_per_prompt, sampling)

        os.sched_setaffinity(0, self.own_core)
        add(self.open_groups)
        while self.engine.busy:
            for _, responses in self.engine.step():
                finished.add(sum(len(r.response_ids) for r in responses))
                add(1)
        os.sched_setaffinity(0, self.shared_cores)
        return finished.tokens_per_s

    def rollout(self) -> float:
        """Generated tokens per second through the rollout actors."""
        from rlsys.control.remote import RemoteRollout

        ports = [RemoteRollout(handle) for handle in self.fleet.rollouts.values()]
        prompts = [next(self.prompts.source) for _ in range(GROUPS)]
        finished = Rate()

        async def one(index: int, room: asyncio.Semaphore) -> Any:
            async with room:
                summary, payload = await ports[index % len(ports)].generate(index, 1, prompts[index])
            finished.add(summary.tokens)
            return summary, payload

        async def generate() -> list[Any]:
            rooms = [asyncio.Semaphore(self.open_groups) for _ in ports]
            return await asyncio.gather(*(one(i, rooms[i % len(ports)]) for i in range(GROUPS)))

        self.batch = asyncio.run(generate())[: self.config.rollout.prompts_per_step]
        self.sampled.append(finished.groups_per_s * self.config.rollout.samples_per_prompt)
        return finished.tokens_per_s

    def learner(self) -> float:
        """Responses trained per second by the learner alone, on a batch the actors just made."""
        from rlsys.control.learner import RemoteLearner
        from rlsys.control.ports import FinishedGroup
        from rlsys.control.remote import RemoteReference, RemoteRewards

        async def prepare() -> tuple[list[FinishedGroup], Any]:
            rewards = RemoteRewards(self.fleet.rewards)
            scores = await asyncio.gather(*(rewards.score(payload) for _, payload in self.batch))
            batch = [
                FinishedGroup(summary=summary, score=score, payload=payload)
                for (summary, payload), score in zip(self.batch, scores, strict=True)
            ]
            if self.fleet.reference is None:
                return batch, None
            reference = RemoteReference(self.fleet.reference).score([group.payload for group in batch])
            return batch, reference if await reference else None

        batch, reference = asyncio.run(prepare())
        port = RemoteLearner(self.fleet.learner)

        async def train() -> float:
            start = time.perf_counter()
            for _ in range(self.config.staleness.max):  # the batch may not grow staler than that
                update = await port.update(batch, reference)
                self.version = update.step.version
                ticket = update.ticket
            responses = self.config.staleness.max * len(batch) * self.config.rollout.samples_per_prompt
            rate = responses / (time.perf_counter() - start)
            await self.fleet.weights.publish.remote(ticket)
            return rate

        return asyncio.run(train())

    def pipeline(self) -> float:
        """Responses trained per second by the whole loop, over the steps after the first five."""
        from rlsys.control.build import connect
        from rlsys.control.loop import TrainingLoop
        from rlsys.observability.run_directory import RunDirectory
        from rlsys.observability.sinks import RunJournal
        from rlsys.scheduling.ledger import Ledger

        config = self.config.model_copy(
            update={"learner": self.config.learner.model_copy(update={"steps": self.version + STEPS})}
        )
        directory = RunDirectory(config.path)
        journal = RunJournal(directory, config)
        parts = connect(self.fleet, self.prompts.source, journal)

        async def run() -> None:
            ledger = Ledger(capacity=config.slots, window=config.staleness.window)
            loop = TrainingLoop(config, parts, ledger=ledger, eval_prompts=self.prompts.held_out, version=self.version)
            await loop.run()

        first = self.version
        asyncio.run(run())
        self.version = config.learner.steps
        rows = [r for r in directory.rows() if "reward/mean" in r and r["step"] > first + 5]
        seconds = sum(r["throughput/step_s"] for r in rows)
        busy = sum(r["throughput/learner_s"] + r["weight_sync/publish_s"] for r in rows)
        self.idle.append(sum(r["throughput/learner_idle_s"] for r in rows) / seconds)
        self.between.append(1 - busy / seconds)
        self.paused.append(sum(r["weight_sync/pause_s"] for r in rows) / (seconds * len(self.fleet.rollouts)))
        return len(rows) * config.rollout.prompts_per_step * config.rollout.samples_per_prompt / seconds


if __name__ == "__main__":
    main()
