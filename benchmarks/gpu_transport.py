"""What does each weight transport cost, and is what it brings served exactly? For a machine with a GPU.

    python -m benchmarks.gpu_transport [--rounds 7] [--size 500M] [--model DIRECTORY]
    python -m benchmarks.gpu_transport --cpu         # object_store against gloo, on a machine without

A learner process and vLLM engines, moved from version to version in turn by every transport that works here:
  object_store  learner -> host -> Ray's shared memory -> engine
  gloo          learner -> host -> TCP -> host -> engine
  ipc           learner and engine on one GPU
  nccl          an engine on a second GPU, if there is one
Under load: the engines go on decoding. publish: packing and handing over; apply: until the worker acknowledges; pause:
decoding stood still. gap: largest |log mu - log pi| over sampled tokens, engine against learner at the same version,
and `old` the same against the version before: were it as small, nothing would have been updated.
"""

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import keep, say, summary
from rlsys.config import parse_config
from rlsys.config.schema import RunConfig, TinyModelConfig

SIZES = {
    "0.8M": TinyModelConfig(),
    "50M": TinyModelConfig(hidden_size=640, layers=8, heads=8, kv_heads=8, intermediate_size=2432),
    "500M": TinyModelConfig(hidden_size=1536, layers=18, heads=12, kv_heads=12, intermediate_size=5632),
}
PROMPT = tuple(range(5, 37))
NOISE = 0.02
"""Of a version, relative to the spread of each parameter."""

Lane = tuple[str, str]
"""A transport, and the engine that it brings versions to: `near` shares the learner's GPU, `far` has its own."""


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, default=None)
    parser.add_argument("--model", type=Path, default=None, help="a model directory instead of random parameters")
    parser.add_argument("--cpu", action="store_true", help="measure what needs no GPU")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds: at least 5, whose median is kept")
    from rlsys.control.doctor import PACKAGES, gpus, installed
    from rlsys.control.transports import why_not

    devices, versions = gpus(), installed(PACKAGES)
    if not arguments.cpu and (lacks := why_not("ipc", devices, versions)):
        say(f"nothing to measure: {lacks}. nccl and ipc need CUDA; --cpu measures object_store and gloo")
        return
    count = 0 if arguments.cpu else len(devices)
    size = arguments.size or ("0.8M" if arguments.cpu else "500M")
    scratch = Path(tempfile.mkdtemp(prefix="rlsys-bench-"))
    try:
        result = measure(count, arguments.model or random_model(scratch / "model", size), arguments.rounds)
    finally:
        shutil.rmtree(scratch)
    name = arguments.model.name if arguments.model else size
    where = f"{count}gpu" if count else "cpu"
    command = f"python -m benchmarks.gpu_transport --rounds {arguments.rounds}" + (" --cpu" if arguments.cpu else "")
    keep(f"transport_{where}_{name}", command, {**result, "devices": devices[:count]})


def random_model(path: Path, size: str) -> Path:
    """A model of that size, in a directory."""
    from rlsys.learning.tiny import make_tiny

    make_tiny(SIZES[size], "".join(map(chr, range(33, 127))), path, seed=0)
    return path


def lanes(gpus: int) -> list[Lane]:
    """What works with so many GPUs."""
    anywhere: list[Lane] = [("object_store", "near"), ("gloo", "near")]
    return anywhere + ([("ipc", "near")] if gpus else []) + ([("nccl", "far")] if gpus > 1 else [])


def configure(transport: str, gpus: int, model: Path) -> RunConfig:
    """A run by that transport."""
    shares = {"nccl": (1.0, 1.0), "ipc": (0.5, 0.4)}.get(transport, (0.5, 0.4) if gpus else (0.0, 0.0))
    dtype = "bfloat16" if gpus else "float32"
    options = {"gpu_memory_utilization": 0.3} if gpus else {}
    return parse_config(
        {
            "task": {"name": "arithmetic"},
            "model": {"path": str(model), "dtype": dtype, "max_context": 256},
            "rollout": {"dtype": dtype, "max_new_tokens": 64, "engine_options": options},
            "weights": {"transport": transport},
            "probe": {"fraction": 0.0},
            "resources": {
                "learner_gpus": shares[0],
                "rollout_gpus": shares[1],
                "pin_cores": False,
                "object_store_gib": 4.0,
            },
        }
    )


class Trainer:
    """A policy that makes versions, and one publisher a transport."""

    def __init__(self, configs: dict[str, RunConfig]) -> None:
        import ray

        from rlsys.actors.process import settle
        from rlsys.actors.publishing import Publisher
        from rlsys.learning.policy import load_policy

        config = next(iter(configs.values()))
        on_gpu = config.resources.learner_gpus > 0
        settle("learner", config, on_gpu=on_gpu)
        import torch

        self._policy = load_policy(config.model.path or "", config.model.dtype, device="cuda" if on_gpu else "cpu")
        self._policy.model.requires_grad_(False)
        address = ray.util.get_node_ip_address()
        self._publishers = {
            name: Publisher(
                c,
                self._policy.named_tensors(),
                self._policy.named_tensors,
                vocab_size=self._policy.vocab_size,
                address=address,
            )
            for name, c in configs.items()
        }
        self._random = torch.Generator().manual_seed(0)
        self._before: dict[str, Any] = {}
        self._version = 0

    def change(self) -> int:
        """Make a version; returns its number."""
        import torch

        self._before = {name: tensor.clone() for name, tensor in self._policy.named_tensors()}
        for _, tensor in self._policy.named_tensors():
            noise = torch.randn(tensor.shape, generator=self._random).to(tensor)
            tensor.add_(NOISE * tensor.float().std().nan_to_num(1.0).to(tensor) * noise)
        self._version += 1
        return self._version

    def publish(self, transport: str) -> Any:
        """The newest version's ticket."""
        return self._publishers[transport].publish(self._version)

    def gaps(self, responses: Sequence[Any]) -> tuple[float, float]:
        """Largest |log mu - log pi| under the newest version, and under the one before."""
        new = self._gap(responses)
        after = {name: tensor.clone() for name, tensor in self._policy.named_tensors()}
        self._use(self._before)
        old = self._gap(responses)
        self._use(after)
        return new, old

    def _use(self, tensors: dict[str, Any]) -> None:
        for name, tensor in self._policy.named_tensors():
            tensor.copy_(tensors[name])

    def _gap(self, responses: Sequence[Any]) -> float:
        import numpy as np

        from rlsys.learning.packing import Sequences, pack

        sequences = Sequences(
            prompts=[list(PROMPT)], responses=[r.response_ids for r in responses], prompt_of=[0] * len(responses)
        )
        behavior, worst = np.concatenate([r.logprobs for r in responses]), 0.0
        for micro in pack(sequences, row_tokens=128, micro_batch_tokens=4096).micro_batches:
            found = self._policy.token_logprobs(micro, 1.0).logprobs.float().cpu().numpy()
            worst = max(worst, float(np.abs(found - behavior[micro.token_index.numpy()]).max()))
        return worst

    def listen(self, transport: str) -> Any:
        """See `weights.collective.Source`."""
        return self._publishers[transport].listen()

    def join(self, transport: str, *group: Any) -> None:
        """See `weights.collective.Source`."""
        self._publishers[transport].join(*group)

    def broadcast(self, transport: str, version: int) -> None:
        """See `weights.collective.Source`."""
        self._publishers[transport].broadcast(version)

    def leave(self, transport: str, epoch: int) -> None:
        """See `weights.collective.Source`."""
        self._publishers[transport].leave(epoch)


class Server:
    """An engine that decodes all the time, and the worker's end of every transport that reaches it."""

    def __init__(self, configs: dict[str, RunConfig]) -> None:
        from rlsys.actors.process import settle

        config = next(iter(configs.values()))
        settle("rollout", config, on_gpu=config.resources.rollout_gpus > 0)
        from rlsys.engines.driver import EngineDriver
        from rlsys.engines.protocol import Sampling
        from rlsys.engines.vllm_engine import VllmEngine
        from rlsys.weights.transport import ObjectStoreTransport

        engine = VllmEngine(config.model.path or "", config.model, config.rollout, seed=0)
        self._driver = EngineDriver(engine)
        self._transports: dict[str, Any] = {
            name: ObjectStoreTransport() if name == "object_store" else engine.backend_receiver(name)
            for name in configs
        }
        self._sampling = Sampling(max_new_tokens=64, temperature=1.0)

    async def ready(self, transport: str) -> None:
        """Answers."""

    async def join(self, transport: str, *group: Any) -> None:
        """See `weights.collective.Member`."""
        await asyncio.to_thread(self._transports[transport].join, *group)

    async def leave(self, transport: str, epoch: int) -> None:
        """See `weights.collective.Member`."""
        await asyncio.to_thread(self._transports[transport].leave, epoch)

    async def apply(self, transport: str, ticket: Any) -> float:
        """As the rollout actor does."""
        from rlsys.weights.buffer import verify

        buffer = await asyncio.to_thread(self._transports[transport].receive, ticket.payload)
        await asyncio.to_thread(verify, ticket.manifest, buffer)
        return (await self._driver.apply(ticket.manifest, buffer)).pause_s

    async def load(self, responses: int) -> None:
        """Decode something, however long it takes."""
        self._driver.start(PROMPT, responses, self._sampling)

    async def sample(self, responses: int) -> list[Any]:
        """Responses under the version served now."""
        return await self._driver.generate(PROMPT, responses, self._sampling)


class Over:
    """An actor as `weights` sees it, by one transport."""

    def __init__(self, handle: Any, transport: str) -> None:
        self._handle, self._transport = handle, transport

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            return await getattr(self._handle, name).remote(self._transport, *arguments)

        return call


def measure(gpus: int, model: Path, rounds: int) -> dict[str, Any]:
    """Every lane in turn, `rounds` times after one that does not count."""
    from rlsys.control.cluster import cluster

    found = lanes(gpus)
    configs = {transport: configure(transport, gpus, model) for transport, _ in found}
    with cluster(configs["object_store"]):
        return asyncio.run(_measure(found, configs, gpus, rounds))


async def _measure(found: list[Lane], configs: dict[str, RunConfig], gpus: int, rounds: int) -> dict[str, Any]:
    import ray

    from rlsys.config.transport import COLLECTIVE
    from rlsys.weights.collective import CollectiveSync
    from rlsys.weights.sync import WeightSync

    share = {"near": 0.4, "far": 1.0} if gpus else {"near": 0.0}
    learner = ray.remote(Trainer).options(num_cpus=1, num_gpus=0.5 if gpus else 0, max_concurrency=4).remote(configs)
    await learner.change.remote()  # it has its GPU before the others get theirs
    servers = {
        place: ray.remote(Server)
        .options(num_cpus=1, num_gpus=share[place], max_concurrency=8)
        .remote({t: configs[t] for t, at in found if at == place})
        for place in dict.fromkeys(place for _, place in found)
    }
    syncs: dict[Lane, Any] = {}
    for transport, place in found:
        await servers[place].ready.remote(transport)
        timeout_s = configs[transport].weights.timeout_s
        collective = transport in COLLECTIVE
        source: Any = Over(learner, transport)
        sync: Any = CollectiveSync(source, timeout_s=timeout_s) if collective else WeightSync(timeout_s=timeout_s)
        await sync.add(place, Over(servers[place], transport))
        syncs[transport, place] = sync
    names = ("publish_s", "apply_s", "pause_s", "gb_per_s", "gap", "old")
    samples = {f"{transport} {name}": list[float]() for transport, _ in found for name in names}
    nbytes = 0
    for round_ in range(rounds + 1):
        for transport, place in found:
            await learner.change.remote()
            await servers[place].load.remote(8)
            ticket = await learner.publish.remote(transport)
            start = time.perf_counter()
            await syncs[transport, place].publish(ticket)
            apply_s, nbytes = time.perf_counter() - start, ticket.manifest.nbytes
            (ack,) = await syncs[transport, place].acks(round_)
            gap, old = await learner.gaps.remote(await servers[place].sample.remote(16))
            rate = nbytes / 1e9 / (ticket.publish_s + apply_s)
            for name, value in zip(names, (ticket.publish_s, apply_s, ack.pause_s, rate, gap, old), strict=True):
                if round_:
                    samples[f"{transport} {name}"].append(value)
            say(
                f"round {round_}/{rounds} {transport:<12} {place} apply {apply_s:.4f} s  {rate:.2f} GB/s  gap {gap:.2e}"
            )
    for transport, place in found:
        await syncs[transport, place].remove(place)
    await asyncio.sleep(1)  # both ends leave their groups
    for name, values in samples.items():
        say(f"{name:<24} {summary(values)}")
    return {"nbytes": nbytes, "samples": samples, "summary": {name: summary(v) for name, v in samples.items()}}


if __name__ == "__main__":
    main()
