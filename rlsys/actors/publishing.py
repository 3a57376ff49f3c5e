"""The learner's end of weight sync: packs a version, hands it to the transport, keeps what may still be taken."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlsys.config.schema import RunConfig
from rlsys.config.transport import ON_GPU, Transport
from rlsys.errors import WeightSyncError
from rlsys.versions import PolicyVersion
from rlsys.weights.collective import Group
from rlsys.weights.transport import ObjectStoreTransport, WeightTicket, WeightTransport

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.weights.buffer import WeightPacker

Parameters = Iterable[tuple[str, "Tensor"]]

HELD = 2
"""Newest versions that can be taken: a publication ends before the learner makes the version after the next."""


def precisions(config: RunConfig) -> list[str]:
    """What each version is published in: the workers' precision, and the learner's for a probe where they differ."""
    exact = bool(config.probe.fraction) and config.rollout.dtype != config.model.dtype
    return [config.rollout.dtype, config.model.dtype] if exact else [config.rollout.dtype]


class Publisher:
    """Publishes in `rollout.dtype` by `weights.transport`.

    What probe and audit read lies in the object store, whichever way the workers' bytes go.
    """

    def __init__(
        self, config: RunConfig, layout: Parameters, tensors: Callable[[], Parameters], *, vocab_size: int, address: str
    ) -> None:
        """`layout`: names and shapes. `tensors` gives the parameters as they are now, gathered where ranks divide them.

        `address` is this process's, as the workers reach it.
        """
        from rlsys.weights.buffer import WeightPacker

        transport = config.weights.transport
        self._tensors, layout = tensors, list(layout)
        served, *exact = precisions(config)
        self._store = ObjectStoreTransport()
        self._transport = self._end(transport, address)
        self._packer = WeightPacker(
            layout,
            dtype=served,
            vocab_size=vocab_size,
            device="cuda" if transport in ON_GPU else "cpu",
            buffers=1 if transport == "object_store" else HELD,  # the object store keeps copies
        )
        self._exact: WeightPacker | None = None
        if exact:
            self._exact = WeightPacker(layout, dtype=exact[0], vocab_size=vocab_size)
        probed = config.probe.fraction and self._exact is None
        self._stores = transport != "object_store" and bool(probed or config.audit.every)
        self._held: dict[PolicyVersion, tuple[WeightTicket, Any]] = {}

    def _end(self, transport: Transport, address: str) -> Any:
        if transport == "object_store":
            return self._store
        from rlsys.engines.transfer import CollectiveSender, IpcSender

        return IpcSender() if transport == "ipc" else CollectiveSender(transport, address)

    @property
    def nbytes(self) -> int:
        """Of one version, as the workers get it."""
        return self._packer.nbytes

    def publish(self, version: PolicyVersion) -> WeightTicket:
        """The parameters as they are now, ready to be taken by the workers."""
        exact = None if self._exact is None else self._send(self._exact, self._store, version)[0]
        ticket, buffer = self._send(self._packer, self._transport, version)
        stored = self._copy(ticket, buffer) if self._stores else None
        ticket = replace(ticket, stored=stored, exact=exact)
        self._held = dict([*self._held.items(), (version, (ticket, buffer))][-HELD:])
        return ticket

    def _send(
        self, packer: "WeightPacker", transport: WeightTransport, version: PolicyVersion
    ) -> tuple[WeightTicket, Any]:
        start = time.perf_counter()
        manifest, buffer = packer.pack(self._tensors(), version)
        payload = transport.send(buffer)
        return WeightTicket(manifest=manifest, payload=payload, publish_s=time.perf_counter() - start), buffer

    def _copy(self, ticket: WeightTicket, buffer: Any) -> WeightTicket:
        """The same bytes in the object store."""
        import torch

        from rlsys.weights.buffer import checksum

        host = torch.as_tensor(buffer).cpu().numpy()
        manifest = replace(ticket.manifest, checksum=checksum(host))
        return WeightTicket(manifest=manifest, payload=self._store.send(host))

    # Groups: only called where the transport is a collective one.

    def listen(self) -> tuple[str, int]:
        """See `weights.collective.Source`."""
        found: tuple[str, int] = self._transport.listen()
        return found

    def join(self, group: Group) -> None:
        """See `weights.collective.Source`."""
        self._transport.join(group)

    def broadcast(self, version: PolicyVersion) -> None:
        """See `weights.collective.Source`."""
        held = self._held.get(version)
        if held is None:
            raise WeightSyncError(f"the learner no longer holds version {version}, but {sorted(self._held)}")
        self._transport.broadcast(held[1])

    def leave(self, epoch: int) -> None:
        """See `weights.collective.Source`."""
        self._transport.leave(epoch)
