"""Learner processes that share every batch and remain one learner.

    everywhere the same     the batch ─ staleness, advantages, normalisers, mini-batches, masks
    each rank its share     rows ─ forward, backward
    together                Σ gradients ─ norm, clip, AdamW;   Σ of what was noted of each token

Gradients are summed, not averaged: the normalisers in the loss are those of the whole batch already. A token is
computed by one rank and 0 on the others, so that a sum puts results together without rounding. Whatever decides (is
the loss finite, is the norm?) is decided from sums, and so alike on every rank.

`replicated`: every rank holds all parameters and takes the same step. `fsdp`: parameters, gradients and optimizer
state are divided among the ranks by FSDP2 and whole only while a layer computes, is published or saved.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlsys.config.schema import Sharding
from rlsys.errors import ClusterError
from rlsys.learning.policy import Policy


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process and those it learns with. Alone, nothing here does anything, and no process group is made.

    All but `share` are collective: every rank has to make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    sharding: Sharding = "replicated"
    device: str = "cpu"

    @property
    def sharded(self) -> bool:
        """Whether parameters are divided among the ranks."""
        return self.sharding == "fsdp"

    def shard(self, policy: Policy) -> None:
        """Divide the parameters, layer by layer, and move them to `device`; gradients will arrive summed."""
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device, (self.size,))
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        names = set(policy.model._no_split_modules or ())
        layers = [module for module in policy.modules() if type(module).__name__ in names]
        for module in [*layers, policy]:
            divided = fully_shard(module, mesh=mesh, mp_policy=precision)
            divided.set_gradient_divide_factor(1.0)
            divided.set_force_sum_reduction_for_comms(True)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each by its sum over the ranks, the same bits on all of them."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum what the backward passes left; FSDP has done so during them."""
        if not self.sharded:
            self.sum_(*(p.grad for p in parameters if p.grad is not None))

    def whole(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor undivided, gathered one at a time; on the first rank only. The others help, and yield nothing.

        To be exhausted on every rank.
        """
        for name, tensor in named:
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                yield name, gathered.cpu() if self.sharded else gathered

    def share(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This rank's share of a whole tensor, where `like` is divided; else, or if it is one already, itself."""
        if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


ALONE = Ranks()
"""A learner of one process."""


def listen(host: str) -> socket.socket:
    """A free port for the ranks to meet at, on this address alone."""
    return socket.create_server((host, 0))


def join(
    rank: int,
    size: int,
    *,
    meeting: str,
    host: str,
    timeout_s: float,
    listener: socket.socket | None = None,
    sharding: Sharding = "replicated",
    device: str = "cpu",
) -> Ranks:
    """Make this process one of `size` ranks, over gloo on CPUs and NCCL on GPUs. Returns when all are there.

    meeting: address:port of the first rank, which passes its `listener`. host: this machine's address, as the
    others reach it. timeout_s: how long one may wait for another, here and in every later collective.
    Raises ClusterError when not all arrive.
    """
    address, _, port = meeting.rpartition(":")
    if interface := _interface(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            size,
            is_master=rank == 0,
            timeout=timeout,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise ClusterError(
            f"learner rank {rank} of {size} did not find the others at {meeting} within "
            f"learner.rank_timeout_s={timeout_s:g}: {error}"
        ) from error
    return Ranks(rank, size, sharding, device)


def _interface(host: str) -> str | None:
    """The network interface with this address: gloo would take the one of the machine's name."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if host in [a.address for a in addresses]), None)
