"""Moving the bytes of a version from the learner to rollout workers.

`ObjectStoreTransport` puts them once into Ray's object store: readers on the same node map the same memory,
readers elsewhere get one copy per node. `engines.transfer` has those that are made of vLLM's weight-transfer backends,
behind the same two calls; transports that broadcast also meet in a group (`weights.collective`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlsys.versions import WeightManifest

if TYPE_CHECKING:  # the controller and the weight-sync service know tickets, and need no torch
    from rlsys.weights.buffer import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTicket:
    """A published version and where its bytes can be had. `payload` is the transport's own.

    `stored`: the same bytes in the object store, for probe and audit, where the workers' travel another way.
    `exact`: the same version in the learner's precision, in the object store, where the workers' is lower.
    """

    manifest: WeightManifest
    payload: Any
    publish_s: float = 0.0
    stored: "WeightTicket | None" = None
    exact: "WeightTicket | None" = None


class WeightTransport(Protocol):
    """How the bytes of a version travel."""

    def send(self, buffer: "Bytes") -> Any:
        """Make the bytes available; returns the payload of a ticket."""

    def receive(self, payload: Any) -> "Bytes":
        """The bytes of a ticket, read-only; blocks until they are here."""


class ObjectStoreTransport:
    """Ray's shared-memory object store. Wrapped in a list, a reference travels without being resolved."""

    def send(self, buffer: "Bytes") -> Any:
        """Copy the buffer into the store once."""
        import ray

        return [ray.put(buffer)]

    def receive(self, payload: Any) -> "Bytes":
        """Map the stored bytes; zero-copy on the node that holds them."""
        import ray

        (reference,) = payload
        return np.asarray(ray.get(reference))
