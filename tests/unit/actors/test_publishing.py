"""A version stays whole as long as somebody may take it, and lies in the object store for who reads it there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.actors import publishing
from rlsys.actors.publishing import Publisher
from rlsys.errors import WeightSyncError
from rlsys.weights.buffer import checksum, verify
from tests.fakes import make_config


class Given:
    """A transport whose payload is the buffer itself; what was broadcast is noted by its checksum."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.broadcasts: list[str] = []

    def send(self, buffer: Any) -> Any:
        self.sent.append(buffer.copy())
        return buffer

    def broadcast(self, buffer: Any) -> None:
        self.broadcasts.append(checksum(buffer))


class Parameters:
    """A model of one tensor, another one at each version."""

    value = 0.0

    def __call__(self) -> list[tuple[str, torch.Tensor]]:
        self.value += 1
        return [("norm.weight", torch.full((8,), self.value))]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Given:
    given = Given()
    monkeypatch.setattr(publishing, "ObjectStoreTransport", lambda: given)
    return given


def publisher(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Publisher, Given]:
    """One whose workers' bytes go by a transport of ours."""
    transport = Given()
    monkeypatch.setattr(Publisher, "_end", lambda self, name, address: transport)
    config = make_config(Path("/nowhere"), "weights.transport=gloo", *overrides)
    return Publisher(config, Parameters()(), Parameters(), vocab_size=10, address="127.0.0.1"), transport


def test_the_two_newest_versions_can_be_broadcast_and_no_older_one(
    monkeypatch: pytest.MonkeyPatch, store: Given
) -> None:
    found, transport = publisher(monkeypatch, "probe.fraction=0.0")
    tickets = [found.publish(version) for version in (1, 2, 3)]
    for version in (2, 3):
        found.broadcast(version)
        verify(tickets[version - 1].manifest, tickets[version - 1].payload)
    assert transport.broadcasts == [ticket.manifest.checksum for ticket in tickets[1:]]
    with pytest.raises(WeightSyncError, match=r"no longer holds version 1, but \[2, 3\]"):
        found.broadcast(1)
    assert store.sent == []
    assert all(ticket.stored is None and ticket.exact is None for ticket in tickets)


@pytest.mark.parametrize("reader", ["probe.fraction=0.5", "audit.every=3"])
def test_who_reads_versions_from_the_object_store_finds_a_copy_there(
    monkeypatch: pytest.MonkeyPatch, store: Given, reader: str
) -> None:
    found, _ = publisher(monkeypatch, "probe.fraction=0.0", reader)
    ticket = found.publish(4)
    assert ticket.stored is not None
    assert ticket.stored.manifest == ticket.manifest  # both in host memory: the same checksum
    verify(ticket.stored.manifest, store.sent[0])


def test_a_probe_in_higher_precision_gets_that_and_no_second_copy(
    monkeypatch: pytest.MonkeyPatch, store: Given
) -> None:
    found, transport = publisher(monkeypatch, "probe.fraction=0.5", "rollout.dtype=bfloat16")
    ticket = found.publish(4)
    assert ticket.exact is not None
    assert ticket.stored is None
    assert ticket.exact.manifest.layout[0].dtype == "float32"
    assert [len(store.sent), len(transport.sent)] == [1, 1]


def test_the_object_store_is_both_ends_where_it_is_the_transport(store: Given) -> None:
    config = make_config(Path("/nowhere"), "probe.fraction=0.5")
    ticket = Publisher(config, Parameters()(), Parameters(), vocab_size=10, address="127.0.0.1").publish(1)
    assert len(store.sent) == 1
    assert ticket.stored is None
