"""Transports made of vLLM's weight-transfer backends: a version travels as one tensor, from memory to memory.

    nccl   broadcast from the learner's GPU to the workers', each with a GPU of its own
    ipc    workers on the learner's GPU map its memory and copy what lies there
    gloo   nccl's protocol over TCP, between hosts' memory: for processes without GPUs

What these backends load into they call a model: something with `load_weights`. Here that is an `Inbox`, which only
keeps what came. So a version arrives beside decoding and is verified as a whole; one that was lost half-way, or
damaged, never touches the model that is served. `receiver` swaps it in like any other.
"""

import contextlib
import math
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)
from torch.multiprocessing.reductions import reduce_tensor
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.utils.nccl import unpinned_nccl_env

from rlsys.errors import ConfigError, EngineError, WeightSyncError

T = TypeVar("T")

BACKENDS = {"nccl": "nccl", "ipc": "ipc", "gloo": "rlsys_gloo"}
"""Transport -> its name in vLLM's factory. The first two are vLLM's own."""


class Meeting(Protocol):
    """What is asked of a `weights.collective.Group`."""

    @property
    def epoch(self) -> int:
        """Its number."""

    @property
    def address(self) -> str:
        """Of rank 0, the learner."""

    @property
    def port(self) -> int:
        """Where rank 0 waits for the others."""

    @property
    def size(self) -> int:
        """Ranks."""

    @property
    def timeout_s(self) -> float:
        """How long one waits for another."""


class Inbox:
    """Stands where vLLM's backends expect a model; keeps the one tensor that arrives."""

    def __init__(self, *, copy: bool) -> None:
        """`copy`: what arrives is somebody else's memory and will not stay as it is."""
        self._copy = copy
        self._arrived: Tensor | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Called by vLLM's backend."""
        ((name, tensor),) = weights
        self._arrived = tensor.clone() if self._copy else tensor
        return {name}

    def take(self) -> Tensor:
        """What arrived since the last call."""
        arrived, self._arrived = self._arrived, None
        if arrived is None:
            raise WeightSyncError("the transfer ended and nothing arrived")
        return arrived


def update_info(nbytes: int, **handles: Any) -> dict[str, Any]:
    """A version as vLLM's backends are told of it: one parameter, as many bytes."""
    return {"names": ["version"], "dtype_names": ["uint8"], "shapes": [[nbytes]], **handles}


class Seat(Generic[T]):
    """This process's place in the newest group. One that was given up while it was being formed is closed at once."""

    def __init__(self, close: Callable[[T], None]) -> None:
        self._close = close
        self._epoch: int | None = None
        self._group: T | None = None
        self._lock = threading.Lock()

    @property
    def group(self) -> T:
        """Raises `WeightSyncError` when there is none."""
        group = self._group
        if group is None:
            raise WeightSyncError("this process is in no group")
        return group

    def take(self, epoch: int, connect: Callable[[], T]) -> None:
        """`connect` waits for the others."""
        self.leave(self._epoch)
        self._epoch = epoch
        group = connect()
        with self._lock:
            if self._epoch == epoch:
                self._group = group
                return
        self._close(group)
        raise WeightSyncError(f"group {epoch} was given up while it was formed")

    def leave(self, epoch: int | None) -> None:
        """Give up the group of that epoch, if it is still the newest."""
        with self._lock:
            if self._epoch != epoch:
                return
            group, self._group, self._epoch = self._group, None, None
        if group is not None:
            self._close(group)


# The learner's ends.


class IpcSender:
    """Shows a buffer to processes that use the same GPU. It has to stay as it is while they may look.

    vLLM's own sender would gather handles over the default process group, where only rank 0 of a learner would come.
    """

    def __init__(self) -> None:
        _require_gpu("ipc")
        self._shown: dict[int, bytes] = {}  # by address: showing memory again would wrap it again, each time

    def send(self, buffer: Tensor) -> bytes:
        """The payload of a ticket: the handle, by the GPU's UUID. The buffer lives as long as this process."""
        address = buffer.data_ptr()
        if address not in self._shown:
            _, handle = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
            uuid = str(torch.cuda.get_device_properties(buffer.device).uuid)
            self._shown[address] = pickle.dumps(update_info(buffer.numel(), ipc_handles=[{uuid: handle}]))
        return self._shown[address]


class CollectiveSender:
    """Rank 0 of every group. Threads may wait in `join` and `broadcast` while another one calls `leave`."""

    def __init__(self, backend: str, address: str) -> None:
        """`address`: of this process, as the workers reach it."""
        _require_gpu(backend)
        self._backend, self._address = backend, address
        self._door: socket.socket | None = None
        self._seat: Seat[Any] = Seat(close=lambda group: group.destroy())

    def send(self, buffer: Any) -> dict[str, Any]:
        """The payload of a ticket; the bytes themselves follow by `broadcast`."""
        return update_info(buffer.nbytes)

    def listen(self) -> tuple[str, int]:
        """Open the door through which the next group is entered."""
        if self._door is not None:
            self._door.close()
        self._door = socket.create_server((self._address, 0))
        return self._address, self._door.getsockname()[1]

    def join(self, meeting: Meeting) -> None:
        """Returns when everybody came. Raises when somebody did not in time."""
        door, self._door = self._door, None
        if door is None:
            raise WeightSyncError("the learner does not listen")

        def connect() -> Any:
            timeout = timedelta(seconds=math.ceil(meeting.timeout_s))
            # Not by StatelessProcessGroup.create: when nobody comes it closes a descriptor that is no longer its own.
            store = TCPStore(
                meeting.address,
                meeting.port,
                meeting.size,
                True,
                timeout,
                master_listen_fd=door.detach(),
                use_libuv=False,
            )
            members = StatelessProcessGroup(rank=0, world_size=meeting.size, store=store)
            return _communicator(self._backend, members, meeting.address, meeting.timeout_s)

        self._seat.take(meeting.epoch, connect)

    def broadcast(self, buffer: Any) -> None:
        """Send a buffer to the group; returns when it may be overwritten. Raises when a member is lost."""
        group = self._seat.group
        with _stream(self._backend) as stream:
            group.broadcast(torch.as_tensor(buffer), src=0, stream=stream)

    def leave(self, epoch: int) -> None:
        """Give a group up. With NCCL, whoever waits in it is released."""
        self._seat.leave(epoch)


# A worker's end.


class BackendReceiver:
    """Receives with the backend that vLLM's factory has under a transport's name."""

    def __init__(self, transport: str, vllm_config: VllmConfig) -> None:
        register()
        _require_gpu(transport)
        self._transport, self._vllm_config = transport, vllm_config
        self._device = torch.device("cpu") if transport == "gloo" else torch.device("cuda", torch.cuda.current_device())
        self._seat: Seat[tuple[Any, Inbox]] = Seat(close=lambda link: link[0].shutdown())
        if transport == "ipc":  # the learner's memory can be seen by everybody on its GPU
            self._seat.take(0, self._make)

    def _make(self, **init: Any) -> tuple[Any, Inbox]:
        inbox = Inbox(copy=self._transport == "ipc")
        config = WeightTransferConfig(backend=BACKENDS[self._transport])
        backend = WeightTransferEngineFactory.create_engine(config, self._vllm_config, self._device, inbox)
        backend.init_transfer_engine(backend.parse_init_info(init))
        return backend, inbox

    def join(self, meeting: Meeting, rank: int) -> None:
        """Returns when everybody came. Raises when somebody did not in time."""
        where = {"master_address": meeting.address, "master_port": meeting.port}
        patience = {"timeout_s": meeting.timeout_s} if self._transport == "gloo" else {}  # vLLM's waits 300 s

        def connect() -> tuple[Any, Inbox]:
            link = self._make(**where, rank_offset=rank, world_size=meeting.size, **patience)
            _require_open(link[0].model_update_group)
            return link

        self._seat.take(meeting.epoch, connect)

    def receive(self, payload: Any) -> Any:
        """The bytes of a ticket, in this process's memory or on its GPU; blocks until they are here."""
        backend, inbox = self._seat.group
        update = pickle.loads(payload) if isinstance(payload, bytes) else payload
        try:
            with _stream(self._transport):
                backend.receive_weights(backend.parse_update_info(update))
        except ValueError as error:
            raise WeightSyncError(f"weights.transport={self._transport}: {error}") from error
        arrived = inbox.take()
        return arrived.numpy() if arrived.device.type == "cpu" else arrived

    def leave(self, epoch: int) -> None:
        """Give a group up. With NCCL, whoever waits in it is released."""
        self._seat.leave(epoch)


# What both ends are made of.


def _communicator(backend: str, members: StatelessProcessGroup, address: str, timeout_s: float) -> Any:
    """`address`: this process's own, on the network that the members share."""
    if backend == "gloo":
        return GlooCommunicator(members, address, timeout_s)
    with unpinned_nccl_env():
        group = PyNcclCommunicator(members, device=torch.cuda.current_device())
    _require_open(group)
    return group


def _require_gpu(transport: str) -> None:
    if transport != "gloo" and not torch.cuda.is_available():
        raise ConfigError(
            f"weights.transport={transport}: this process sees no GPU (torch {torch.__version__}, "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); allowed without: object_store, gloo"
        )


def _require_open(group: Any) -> None:
    """vLLM only switches a communicator off when it finds no NCCL: every broadcast would do nothing."""
    if getattr(group, "disabled", False):
        raise EngineError("weights.transport=nccl: libnccl.so.2 cannot be loaded; VLLM_NCCL_SO_PATH may name it")


@contextlib.contextmanager
def _stream(transport: str) -> Iterator[torch.cuda.Stream | None]:
    """A CUDA stream of its own, so that nothing waits behind a transfer that waits for others; drained at the end."""
    if transport == "gloo":
        yield None
        return
    stream = _own_stream(torch.cuda.current_device())
    with torch.cuda.stream(stream):
        yield stream
    stream.synchronize()


@cache
def _own_stream(device: int) -> torch.cuda.Stream:
    """Always the same one: freed memory waits for the stream that it was taken on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class GlooCommunicator:
    """What vLLM's NCCL backend asks of a communicator, over TCP. An operation fails after `timeout_s`."""

    def __init__(self, members: StatelessProcessGroup, address: str, timeout_s: float) -> None:
        gloo: Any = ProcessGroupGloo  # torch's types know little of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [gloo.create_device(hostname=address)]
        self._members = members  # its store serves the others
        self._group: Any = gloo(PrefixStore("weights", members.store), members.rank, members.world_size, options)

    def broadcast(self, tensor: Tensor, src: int, stream: None = None) -> None:
        """Returns when the tensor is there, or when it was handed to the next ones."""
        if self._group is None:
            raise WeightSyncError("the group was given up")
        self._group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        """Close the connections, unless somebody waits in one: then its own timeout does."""
        self._group = None


def _way_to(address: str, port: int) -> str:
    """This process's own address on the network that leads there: gloo would take the host name's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


@dataclass(kw_only=True)
class GlooInit(NCCLWeightTransferInitInfo):
    """As NCCL's. An operation in which a member waits longer than `timeout_s` fails."""

    timeout_s: float


class GlooTransferEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL backend with another communicator."""

    init_info_cls = GlooInit

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the group."""
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        address, port = init_info.master_address, init_info.master_port
        members = StatelessProcessGroup.create(
            address,
            port,
            init_info.rank_offset + self.parallel_config.rank,
            init_info.world_size,
            store_timeout=math.ceil(init_info.timeout_s),
        )
        self.model_update_group = _communicator("gloo", members, _way_to(address, port), init_info.timeout_s)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """As NCCL's unpacked branch, without CUDA streams."""
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self.model_update_group.broadcast(tensor, src=0)
            self.model.load_weights([(name, tensor)])


def register() -> None:
    """Make the gloo backend known to vLLM; harmless when repeated."""
    if BACKENDS["gloo"] not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKENDS["gloo"], GlooTransferEngine)
