"""Versions that arrive through vLLM's weight-transfer backends: what is served is the learner's, whole or not at all.

The collective path runs for real over gloo: sender, receiver, groups and the served model are those of `nccl`; only
the communicator is another. What is left for a GPU is exercised by `python -m benchmarks.gpu_transport`.
"""

import asyncio
import dataclasses
import inspect
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config.schema import TinyModelConfig
from rlsys.errors import ChecksumMismatch, ConfigError, EngineError, WeightSyncError
from rlsys.learning.tiny import make_tiny
from rlsys.versions import WeightManifest
from rlsys.weights.buffer import checksum, verify
from rlsys.weights.collective import CollectiveSync, Group
from rlsys.weights.transport import WeightTicket
from tests.integration.served import Engines

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::FutureWarning:vllm.*")]

EXACT = 1e-4
"""Nats. Both sides are float32 and differ only in the order of additions."""

DIFFERENT = 1e-2
"""Nats. What a change of the weights must show at least, on the largest of many tokens."""


def group(*workers: str, epoch: int = 1, port: int = 0, timeout_s: float = 60) -> Group:
    return Group(epoch=epoch, workers=workers, address="127.0.0.1", port=port, timeout_s=timeout_s)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Collectives need everybody at the same time."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


# -- one engine, and a learner in the same process ---------------------------------------------------------------------

KEPT: list[Engines] = []


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny = TinyModelConfig(hidden_size=64, layers=2, heads=2, kv_heads=1, intermediate_size=160)
    make_tiny(tiny, "".join(map(chr, range(33, 127))), path, seed=1)
    KEPT.append(Engines(path))  # an engine ends with the process
    return KEPT[-1]


@dataclass
class Link:
    """Both ends of a gloo group of two."""

    sender: Any
    receiver: Any

    def send(self, manifest: WeightManifest, buffer: Any) -> Any:
        """The bytes as they arrive, verified."""
        mine = buffer.copy()  # what was published is read-only here
        payload = self.sender.send(mine)
        arrived, _ = together(lambda: self.receiver.receive(payload), lambda: self.sender.broadcast(mine))
        verify(manifest, arrived)
        return arrived


@pytest.fixture(scope="module")
def link(serve: Engines) -> Iterator[Link]:
    from rlsys.engines.transfer import CollectiveSender

    found = Link(CollectiveSender("gloo", "127.0.0.1"), serve().engine.backend_receiver("gloo"))
    _, port = found.sender.listen()
    meeting = group("worker", port=port)
    together(lambda: found.sender.join(meeting), lambda: found.receiver.join(meeting, 1))
    yield found
    found.sender.leave(1)
    found.receiver.leave(1)


def test_what_arrives_by_broadcast_is_served_exactly_under_every_version(serve: Engines, link: Link) -> None:
    served = serve()
    for _ in range(3):
        served.learner.change(scale=0.2)
        manifest, buffer = served.learner.published()
        served.engine.apply(manifest, link.send(manifest, buffer))
        sampled = served.sample()
        assert served.engine.serving_version == served.learner.version
        assert served.gap(sampled) < EXACT
        assert served.gap(sampled, age=1) > DIFFERENT, "the old version would pass as well"
    assert served.points, "the engine copied what it could have pointed at"


def test_bytes_that_are_not_the_versions_never_reach_the_engine(serve: Engines, link: Link) -> None:
    served = serve()
    before = served.learner.version
    served.learner.change(scale=0.2)
    manifest, buffer = served.learner.published()
    torn = buffer.copy()
    torn[len(torn) // 2 :] = 0
    with pytest.raises(ChecksumMismatch, match=f"version {before + 1}"):
        link.send(manifest, torn)
    assert served.engine.serving_version == before
    assert served.gap(served.sample(), age=1) < EXACT
    served.engine.apply(manifest, link.send(manifest, buffer))
    assert served.gap(served.sample()) < EXACT


def test_who_is_in_no_group_says_so(serve: Engines) -> None:
    from rlsys.engines.transfer import CollectiveSender

    with pytest.raises(WeightSyncError, match="in no group"):
        CollectiveSender("gloo", "127.0.0.1").broadcast(np.zeros(8, dtype=np.uint8))
    with pytest.raises(WeightSyncError, match="in no group"):
        serve().engine.backend_receiver("gloo").receive({})


def test_a_group_that_never_meets_fails_in_time() -> None:
    from rlsys.engines.transfer import CollectiveSender

    sender = CollectiveSender("gloo", "127.0.0.1")
    _, port = sender.listen()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        sender.join(group("absent", port=port, timeout_s=1))


def test_a_group_that_was_given_up_while_it_was_formed_is_not_entered(serve: Engines) -> None:
    from rlsys.engines.transfer import CollectiveSender

    sender, receiver = CollectiveSender("gloo", "127.0.0.1"), serve().engine.backend_receiver("gloo")
    _, port = sender.listen()
    meeting = group("late", epoch=5, port=port)
    with ThreadPoolExecutor(2) as threads:
        joining = threads.submit(sender.join, meeting)
        while sender._seat._epoch != 5:
            time.sleep(0.01)
        sender.leave(5)
        late = threads.submit(receiver.join, meeting, 1)
        with pytest.raises(WeightSyncError, match="group 5 was given up"):
            joining.result()
        assert late.exception() is None or "clos" in str(late.exception())
    with pytest.raises(WeightSyncError, match="in no group"):
        sender.broadcast(np.zeros(8, dtype=np.uint8))


# -- processes that live and die ---------------------------------------------------------------------------------------

LARGE = 64 << 20
"""Bytes of a version, more than what the sockets between two processes hold."""


def worker_process(pipe: Connection) -> None:
    """A worker without an engine: what arrives is verified, and that is all."""
    from rlsys.engines.transfer import BackendReceiver

    receiver = BackendReceiver("gloo", SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None))

    def apply(ticket: WeightTicket) -> float:
        verify(ticket.manifest, receiver.receive(ticket.payload))
        return 0.0

    calls: dict[str, Callable[..., Any]] = {
        "join": receiver.join,
        "leave": receiver.leave,
        "ready": lambda: None,
        "apply": apply,
    }

    def answer(key: int, name: str, arguments: tuple[Any, ...]) -> None:
        result: tuple[int, Exception | None, Any]
        try:
            result = (key, None, calls[name](*arguments))
        except Exception as error:
            result = (key, error if isinstance(error, ChecksumMismatch) else RuntimeError(str(error)), None)
        with writing:
            pipe.send(result)

    writing = threading.Lock()
    pipe.send("ready")
    while True:
        threading.Thread(target=answer, args=pipe.recv(), daemon=True).start()


@dataclass
class Remote:
    """A worker process as the service sees it; who waits for one that died learns it."""

    process: Any
    pipe: Connection
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    keys: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def start(cls) -> "Remote":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker_process, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def listen(self) -> None:
        """Deliver answers to the event loop, until the process ends."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            try:
                key, error, result = self.pipe.recv()
            except (EOFError, ConnectionError):
                loop.remove_reader(self.pipe.fileno())
                for future in self.waiting.values():
                    future.set_exception(ConnectionError("the worker process died"))
                self.waiting.clear()
                return
            future = self.waiting.pop(key)
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        loop.add_reader(self.pipe.fileno(), read)

    async def call(self, name: str, *arguments: Any) -> Any:
        key = next(self.keys)
        future = self.waiting[key] = asyncio.get_running_loop().create_future()
        try:
            self.pipe.send((key, name, arguments))
        except OSError:
            raise ConnectionError("the worker process died") from None
        return await future

    async def apply(self, ticket: WeightTicket) -> float:
        return await self.call("apply", ticket)

    async def ready(self) -> None:
        await self.call("ready")

    async def join(self, meeting: Group, rank: int) -> None:
        await self.call("join", meeting, rank)

    async def leave(self, epoch: int) -> None:
        await self.call("leave", epoch)


class Learner:
    """The learner's end in this process, its blocking calls in threads."""

    def __init__(self) -> None:
        from rlsys.engines.transfer import CollectiveSender

        self.sender = CollectiveSender("gloo", "127.0.0.1")
        self.formed: list[tuple[str, ...]] = []
        self.broadcasting = asyncio.Event()

    def ticket(self, version: int) -> WeightTicket:
        self.bytes = np.random.default_rng(version).integers(0, 256, LARGE, dtype=np.uint8)
        manifest = WeightManifest(version=version, layout=(), nbytes=LARGE, checksum=checksum(self.bytes))
        return WeightTicket(manifest=manifest, payload=self.sender.send(self.bytes))

    async def listen(self) -> tuple[str, int]:
        return self.sender.listen()

    async def join(self, meeting: Group) -> None:
        self.formed.append(meeting.workers)
        await asyncio.to_thread(self.sender.join, meeting)

    async def broadcast(self, version: int) -> None:
        self.broadcasting.set()
        await asyncio.to_thread(self.sender.broadcast, self.bytes)

    async def leave(self, epoch: int) -> None:
        await asyncio.to_thread(self.sender.leave, epoch)


def test_processes_take_versions_and_one_that_is_killed_in_mid_broadcast_stops_nobody() -> None:
    remotes = {name: Remote.start() for name in ("a", "b", "killed")}
    for remote in remotes.values():
        assert remote.pipe.recv() == "ready"

    async def scenario() -> tuple[Learner, CollectiveSync]:
        learner = Learner()
        sync = CollectiveSync(learner, timeout_s=60)
        for remote in remotes.values():
            remote.listen()
        await sync.add("a", remotes["a"])
        await sync.publish(learner.ticket(1))
        await sync.add("b", remotes["b"])
        await sync.add("killed", remotes["killed"])
        while len(sync._serving) < 3:  # both joined and were caught up
            await sync.acks(len(sync._acks))
        await sync.publish(learner.ticket(2))
        while set(sync._serving.values()) != {2}:
            await sync.acks(len(sync._acks))
        learner.broadcasting.clear()
        os.kill(remotes["killed"].process.pid, signal.SIGSTOP)  # takes no more bytes: the broadcast is under way
        publication = asyncio.create_task(sync.publish(learner.ticket(3)))
        await learner.broadcasting.wait()
        await asyncio.sleep(0.5)
        assert "killed" not in {name for name, version in sync._serving.items() if version == 3}
        remotes["killed"].process.kill()
        await publication
        while [sync._serving[name] for name in "ab"] != [3, 3]:
            await sync.acks(len(sync._acks))
        await sync.remove("killed")
        await sync.publish(learner.ticket(4))
        while [sync._serving[name] for name in "ab"] != [4, 4]:
            await sync.acks(len(sync._acks))
        for name in "ab":
            await sync.remove(name)
        return learner, sync

    try:
        learner, sync = asyncio.run(asyncio.wait_for(scenario(), timeout=240))
    finally:
        for remote in remotes.values():
            remote.process.kill()
            remote.process.join()
    assert ("a", "b", "killed") in learner.formed
    assert learner.formed[-1] == ("a", "b")
    for name in "ab":
        assert [ack.version for ack in sync._acks if ack.worker == name and ack.error is None] == [1, 2, 3, 4]


# -- what of vLLM the GPU transports rely on, as far as it can be seen without one -------------------------------------


def fields(of: Any) -> set[str]:
    return {found.name for found in dataclasses.fields(of)}


def test_vllm_has_the_backends_and_what_is_said_to_them() -> None:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from rlsys.engines import transfer

    transfer.register()
    transfer.register()
    registry = {name: load() for name, load in WeightTransferEngineFactory._registry.items() if name in ("nccl", "ipc")}
    assert registry == {"nccl": NCCLWeightTransferEngine, "ipc": IPCWeightTransferEngine}
    assert set(transfer.BACKENDS.values()) <= set(WeightTransferEngineFactory._registry)
    meeting = {"master_address", "master_port", "rank_offset", "world_size"}
    assert meeting <= fields(NCCLWeightTransferEngine.init_info_cls)
    assert fields(NCCLWeightTransferEngine.update_info_cls) == set(transfer.update_info(8))
    assert set(transfer.update_info(8, ipc_handles=[])) <= fields(IPCWeightTransferEngine.update_info_cls)
    # Unpacked is the default of a worker that is told nothing: one tensor, broadcast or mapped as it is.
    assert (
        NCCLWeightTransferEngine.init_info_cls(master_address="::1", master_port=1, rank_offset=1, world_size=2).packed
        is False
    )
    assert IPCWeightTransferEngine.init_info_cls().packed is False
    assert list(inspect.signature(WeightTransferEngineFactory.create_engine).parameters)[-1] == "model"
    for name in ("init_transfer_engine", "receive_weights", "parse_init_info", "parse_update_info", "shutdown"):
        assert callable(getattr(WeightTransferEngine, name))
    assert {"tensor", "src", "stream"} <= set(inspect.signature(PyNcclCommunicator.broadcast).parameters)
    assert callable(PyNcclCommunicator.destroy)
    assert {"store_timeout", "listen_socket"} <= set(inspect.signature(StatelessProcessGroup.create).parameters)


def backend(name: str, inbox: Any) -> Any:
    """vLLM's own worker-side engine, before anything is connected."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None)
    return WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=name), config, torch.device("cpu", 0), inbox
    )


def test_vllms_nccl_backend_receives_a_version_as_one_tensor_into_the_inbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, over a communicator that fills what it is given."""
    from rlsys.engines.transfer import Inbox, update_info

    sent = torch.arange(100, dtype=torch.uint8)
    asked: list[tuple[int, int]] = []

    class Filling:
        def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
            asked.append((tensor.numel(), src))
            tensor.copy_(sent)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    inbox = Inbox(copy=False)
    engine = backend("nccl", inbox)
    engine.model_update_group = Filling()
    engine.receive_weights(engine.parse_update_info(update_info(100)))
    assert torch.equal(inbox.take(), sent)
    assert asked == [(100, 0)]
    with pytest.raises(WeightSyncError, match="nothing arrived"):
        inbox.take()


def test_vllms_ipc_backend_maps_a_version_and_the_inbox_keeps_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, over memory that is rebuilt without CUDA."""
    from vllm.distributed.weight_transfer import ipc_engine

    from rlsys.engines.transfer import Inbox, update_info

    memory = torch.arange(100, dtype=torch.uint8)
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda *handle: memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    inbox = Inbox(copy=True)
    engine = backend("ipc", inbox)
    engine.init_transfer_engine(engine.parse_init_info({}))
    handles = [{"GPU-1": tuple(range(8))}]
    engine.receive_weights(engine.parse_update_info(update_info(100, ipc_handles=handles)))
    arrived = inbox.take()
    memory += 1  # the learner's next version
    assert torch.equal(arrived, torch.arange(100, dtype=torch.uint8))
    elsewhere = update_info(100, ipc_handles=[{"GPU-2": tuple(range(8))}])
    with pytest.raises(ValueError, match="IPC handle not found for GPU UUID GPU-1"):
        engine.receive_weights(engine.parse_update_info(elsewhere))


def test_gpu_transports_are_refused_where_there_is_no_gpu(serve: Engines) -> None:
    from rlsys.engines.transfer import CollectiveSender, IpcSender

    for make in (
        lambda: CollectiveSender("nccl", "127.0.0.1"),
        IpcSender,
        lambda: serve().engine.backend_receiver("nccl"),
        lambda: serve().engine.backend_receiver("ipc"),
    ):
        with pytest.raises(ConfigError, match=r"weights\.transport=(nccl|ipc): this process sees no GPU.*object_store"):
            make()


def test_a_communicator_that_vllm_switched_off_is_an_error() -> None:
    """Without libnccl it would do nothing, silently, at every broadcast."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    from rlsys.engines.transfer import _require_open

    alone = StatelessProcessGroup(rank=0, world_size=2, store=None)
    switched_off = PyNcclCommunicator(alone, device="cpu", library_path="/nowhere/libnccl.so")
    with pytest.raises(EngineError, match="libnccl"):
        _require_open(switched_off)
