"""A broadcast needs all of its members; whoever is lost, late or wrong, the others go on and nobody waits for ever."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlsys.errors import ChecksumMismatch, WeightSyncError
from rlsys.weights.collective import ANSWER_S, ATTEMPTS, CollectiveSync, Group
from rlsys.weights.sync import REFUSED_AGAIN_S, RETRY_BACKOFF_S, Ack
from rlsys.weights.transport import WeightTicket
from tests.fakes import make_ticket, now, run

TIMEOUT_S = 40.0
ATTEMPT_S = TIMEOUT_S / (ATTEMPTS + 1)


class Rendezvous:
    """Returns when all are here; when one of them leaves, those who wait fail."""

    def __init__(self, size: int) -> None:
        self._size, self._here = size, 0
        self._all: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def meet(self) -> None:
        self._here += 1
        if self._here == self._size and not self._all.done():
            self._all.set_result(None)
        await asyncio.shield(self._all)

    def leave(self) -> None:
        if not self._all.done():
            self._all.set_exception(ConnectionError("connection closed by peer"))
            self._all.exception()


@dataclass
class Network:
    """Every group that was formed, and who meets whom in it: once to join, then once for every broadcast."""

    groups: list[Group] = field(default_factory=list)
    meetings: dict[tuple[int, str, int], Rendezvous] = field(default_factory=dict)

    async def meet(self, group: Group, what: str, n: int) -> None:
        if group not in self.groups:
            self.groups.append(group)
        await self.meetings.setdefault((group.epoch, what, n), Rendezvous(group.size)).meet()

    def leave(self, epoch: int) -> None:
        for (of, _, _), meeting in self.meetings.items():
            if of == epoch:
                meeting.leave()

    @property
    def formed(self) -> list[tuple[str, ...]]:
        return [group.workers for group in self.groups]


@dataclass
class Party:
    """What the learner and a worker have in common."""

    network: Network
    group: Group | None = None
    broadcasts: int = 0
    left: list[int] = field(default_factory=list)

    async def _join(self, group: Group) -> None:
        await self.network.meet(group, "join", 0)
        self.group, self.broadcasts = group, 0

    async def _take_part(self) -> None:
        if self.group is None:
            raise WeightSyncError("in no group")
        self.broadcasts += 1
        await self.network.meet(self.group, "broadcast", self.broadcasts)

    async def leave(self, epoch: int) -> None:
        self.left.append(epoch)
        if self.group is not None and self.group.epoch == epoch:
            self.group = None
        self.network.leave(epoch)


@dataclass
class Learner(Party):
    fail: Callable[[int], Exception | None] = lambda version: None
    leave_s: float = 0.0

    async def leave(self, epoch: int) -> None:
        await asyncio.sleep(self.leave_s)
        await super().leave(epoch)

    async def listen(self) -> tuple[str, int]:
        return "10.0.0.1", 4711

    async def join(self, group: Group) -> None:
        await self._join(group)

    async def broadcast(self, version: int) -> None:
        if error := self.fail(version):
            raise error
        await self._take_part()


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


@dataclass
class Worker(Party):
    """`fail` says what goes wrong with the n-th attempt (from 0) at a version, once its bytes should be here."""

    swap_s: float = 0.0
    fail: Callable[[int, int], Exception | None] = lambda version, attempt: None
    lost_at: int | None = None
    """Version in whose broadcast its process dies: the call fails, and every later one."""
    hangs_at: int | None = None
    """Version in whose broadcast it stops to answer, as it does to every later call."""
    lost_in_join: bool = False
    lost: bool = False
    silent: bool = False
    served: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    async def ready(self) -> None:
        await self._answer()

    async def join(self, group: Group, rank: int) -> None:
        assert group.workers[rank - 1]
        self.lost |= self.lost_in_join
        await self._answer()
        await self._join(group)

    async def leave(self, epoch: int) -> None:
        await self._answer()
        await super().leave(epoch)

    async def apply(self, ticket: WeightTicket) -> float:
        version = ticket.manifest.version
        attempt = self.attempts.count(version)
        self.attempts.append(version)
        self.lost |= self.lost_at == version
        self.silent |= self.hangs_at == version
        await self._answer()
        await self._take_part()
        await asyncio.sleep(self.swap_s)
        if error := self.fail(version, attempt):
            raise error
        self.served.append(version)
        return 0.25

    async def _answer(self) -> None:
        if self.lost:
            raise ConnectionError("the actor died")
        if self.silent:
            await forever()


@dataclass
class Fleet:
    """A service over a network, and its workers by name."""

    sync: CollectiveSync
    network: Network
    learner: Learner
    workers: dict[str, Worker] = field(default_factory=dict)

    async def add(self, name: str, **options: Any) -> Worker:
        worker = self.workers[name] = Worker(self.network, **options)
        await self.sync.add(name, worker)
        return worker

    def heard(self) -> list[tuple[str, int, bool]]:
        return [(ack.worker, ack.version, ack.error is None) for ack in self.sync._acks]

    def errors(self) -> dict[str, str]:
        return {ack.worker: ack.error for ack in self.sync._acks if ack.error is not None}


def with_fleet(work: Callable[[Fleet], Coroutine[Any, Any, None]], timeout_s: float = TIMEOUT_S) -> Fleet:
    """Run `work`; when all workers have left, no task and no group may be left either."""

    async def main() -> Fleet:
        network = Network()
        learner = Learner(network)
        fleet = Fleet(CollectiveSync(learner, timeout_s=timeout_s), network, learner)
        await work(fleet)
        for name in fleet.workers:
            await fleet.sync.remove(name)
        await asyncio.sleep(10 * TIMEOUT_S)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert fleet.sync._group is None
        assert learner.left == [group.epoch for group in network.groups]
        return fleet

    return run(main())


def test_one_group_carries_version_after_version_and_everybody_acknowledges() -> None:
    async def work(fleet: Fleet) -> None:
        for name in ("b", "a", "c"):
            await fleet.add(name)
        for version in (1, 2, 3):
            await fleet.sync.publish(make_ticket(version))
            await asyncio.sleep(1)

    fleet = with_fleet(work)
    assert fleet.network.formed == [("a", "b", "c")]
    assert sorted(fleet.heard()) == [(name, version, True) for name in "abc" for version in (1, 2, 3)]
    assert {ack.pause_s for ack in fleet.sync._acks} == {0.25}


def test_publication_returns_at_the_first_worker_that_serves_it() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("fast", swap_s=1)
        await fleet.add("slow", swap_s=5)
        await fleet.sync.publish(make_ticket(1))
        assert now() == 1.0
        assert fleet.heard() == [("fast", 1, True)]

    with_fleet(work)


def test_a_joining_worker_is_caught_up_alone_and_takes_part_in_the_next_version() -> None:
    async def work(fleet: Fleet) -> None:
        first = await fleet.add("a")
        await fleet.sync.publish(make_ticket(1))
        second = await fleet.add("b")
        await asyncio.sleep(1)
        assert (first.served, second.served) == ([1], [1])
        assert first.attempts == [1], "it was disturbed by a worker that joined"
        await fleet.sync.publish(make_ticket(2))
        await asyncio.sleep(1)
        assert (first.served, second.served) == ([1, 2], [1, 2])

    fleet = with_fleet(work)
    assert fleet.network.formed == [("a",), ("b",), ("a", "b")]
    assert [group.epoch for group in fleet.network.groups] == [1, 2, 3]


def test_a_worker_that_joins_before_anything_was_published_waits_for_the_first_version() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        await asyncio.sleep(100)
        assert fleet.network.formed == []
        await fleet.sync.publish(make_ticket(7))

    assert with_fleet(work).heard() == [("a", 7, True)]


def test_a_worker_lost_in_mid_broadcast_costs_the_others_one_retry() -> None:
    async def work(fleet: Fleet) -> None:
        for name in ("a", "b"):
            await fleet.add(name)
        lost = await fleet.add("lost", lost_at=2)
        await fleet.sync.publish(make_ticket(1))
        await asyncio.sleep(1)
        started = now()
        await fleet.sync.publish(make_ticket(2))
        assert now() - started == pytest.approx(RETRY_BACKOFF_S[0])
        await asyncio.sleep(1)
        assert [fleet.workers[name].served for name in "ab"] == [[1, 2], [1, 2]]
        assert lost.served == [1]
        await fleet.sync.remove("lost")  # what the controller does when a worker died
        await fleet.sync.publish(make_ticket(3))
        await asyncio.sleep(1)
        assert [fleet.workers[name].served for name in "ab"] == [[1, 2, 3], [1, 2, 3]]

    fleet = with_fleet(work)
    assert fleet.network.formed == [("a", "b", "lost"), ("a", "b")]
    assert fleet.workers["a"].left[0] == 1, "it stayed in a group that was broken"


def test_a_worker_that_hangs_in_mid_broadcast_is_given_up_after_one_attempt() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        await fleet.add("hanging", hangs_at=1)
        await fleet.sync.publish(make_ticket(1))
        # It answers neither the request to leave the group nor, later, whether it can take part in the next.
        assert now() == pytest.approx(ATTEMPT_S + ANSWER_S + RETRY_BACKOFF_S[0] + ANSWER_S)
        assert fleet.workers["a"].served == [1]
        await asyncio.sleep(100)
        await fleet.sync.publish(make_ticket(2))
        assert fleet.workers["a"].served == [1, 2]

    fleet = with_fleet(work)
    assert "no answer within 5 s" in fleet.errors()["hanging"]


def test_removing_the_worker_that_a_broadcast_waits_for_ends_the_wait() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        await fleet.add("hanging", hangs_at=1)
        publication = asyncio.create_task(fleet.sync.publish(make_ticket(1)))
        await asyncio.sleep(1)
        await fleet.sync.remove("hanging")
        await publication
        assert now() == pytest.approx(1 + RETRY_BACKOFF_S[0])

    fleet = with_fleet(work)
    assert fleet.network.formed == [("a", "hanging"), ("a",)]


def test_removing_the_only_worker_in_mid_broadcast_releases_the_learner() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("only", hangs_at=1)
        publication = asyncio.create_task(fleet.sync.publish(make_ticket(1)))
        await asyncio.sleep(1)
        await fleet.sync.remove("only")
        await publication
        assert now() == 1.0
        await asyncio.sleep(0.1)
        assert fleet.learner.left == [1]

    with_fleet(work)


def test_a_worker_that_joins_while_the_last_group_is_given_up_is_caught_up() -> None:
    async def work(fleet: Fleet) -> None:
        fleet.learner.leave_s = 2
        await fleet.add("a")
        await fleet.sync.publish(make_ticket(1))
        await fleet.sync.remove("a")
        await asyncio.sleep(1)
        assert fleet.learner.left == [], "the group was given up before anybody could join meanwhile"
        worker = await fleet.add("b")
        await asyncio.sleep(2)
        assert worker.served == [1]

    assert with_fleet(work).network.formed == [("a",), ("b",)]


def test_a_worker_that_comes_back_under_its_name_is_caught_up() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("b")
        await fleet.add("a", lost_at=1)
        await fleet.sync.publish(make_ticket(1))
        await asyncio.sleep(5)
        refusals = fleet.heard().count(("a", 1, False))
        assert refusals, "it is not yet given up for a while"
        torn = ChecksumMismatch("checksum 00 arrived")
        again = await fleet.add(
            "a", fail=lambda version, attempt: torn if version == 1 and attempt < ATTEMPTS - 1 else None
        )
        await asyncio.sleep(1)
        assert again.served == [1]
        assert fleet.heard().count(("a", 1, False)) == refusals, "it was blamed for what its predecessor did"
        await fleet.sync.publish(make_ticket(2))
        await asyncio.sleep(1)
        assert again.served == [1, 2]

    assert with_fleet(work).network.formed == [("a", "b"), ("b",), ("a",), ("a", "b")]


def test_one_that_does_not_answer_is_left_out_before_the_group_is_formed() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        await fleet.add("silent", silent=True)
        await fleet.sync.publish(make_ticket(1))
        assert now() == pytest.approx(ANSWER_S)

    assert with_fleet(work).network.formed == [("a",)]


def test_one_that_dies_while_the_group_is_formed_is_left_out_of_the_next() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        await fleet.add("b", lost_in_join=True)
        await fleet.sync.publish(make_ticket(1))
        assert now() == pytest.approx(RETRY_BACKOFF_S[0])

    assert with_fleet(work).network.formed == [("a", "b"), ("a",)]


def test_bytes_that_arrive_wrong_are_sent_again_to_that_worker_alone() -> None:
    torn = ChecksumMismatch("checksum 00 arrived")

    async def work(fleet: Fleet) -> None:
        good = await fleet.add("good")
        bad = await fleet.add("torn", fail=lambda version, attempt: torn if (version, attempt) == (1, 0) else None)
        await fleet.sync.publish(make_ticket(1))
        await asyncio.sleep(10)
        assert (good.served, bad.served) == ([1], [1])
        assert good.attempts == [1]
        await fleet.sync.publish(make_ticket(2))

    assert with_fleet(work).network.formed == [("good", "torn"), ("torn",), ("good", "torn")]


def test_a_version_that_a_worker_refuses_is_reported_and_the_next_one_replaces_it() -> None:
    torn = ChecksumMismatch("checksum 00 arrived")

    async def work(fleet: Fleet) -> None:
        await fleet.add("good")
        bad = await fleet.add("torn", fail=lambda version, attempt: torn if version == 1 else None)
        await fleet.sync.publish(make_ticket(1))
        await asyncio.sleep(sum(RETRY_BACKOFF_S) + 1)
        assert fleet.errors() == {"torn": "ChecksumMismatch: checksum 00 arrived"}
        assert bad.attempts == [1] * ATTEMPTS
        await asyncio.sleep(REFUSED_AGAIN_S)
        assert len(bad.attempts) > ATTEMPTS, "no newer version comes, and it was given up for good"
        await fleet.sync.publish(make_ticket(2))
        await asyncio.sleep(1)
        assert bad.served == [2]

    with_fleet(work)


def test_a_late_refusal_of_an_older_version_does_not_count_against_the_newer() -> None:
    async def work(fleet: Fleet) -> None:
        torn = ChecksumMismatch("checksum 00 arrived")
        await fleet.add("a", swap_s=1, fail=lambda version, attempt: torn if version == 1 else None)
        first = asyncio.create_task(fleet.sync.publish(make_ticket(1)))
        await asyncio.sleep(0.5)
        await fleet.sync.publish(make_ticket(2))
        assert now() == 2.0  # version 1 was refused at 1.0
        await first  # a newer version is served

    with_fleet(work)


def test_a_version_that_all_refused_is_an_error_with_every_reason() -> None:
    async def work(fleet: Fleet) -> None:
        for name in "ab":
            await fleet.add(name, fail=lambda version, attempt, n=name: ChecksumMismatch(n) if version == 1 else None)
        with pytest.raises(WeightSyncError, match=r"version 1; a: ChecksumMismatch: a; b: ChecksumMismatch: b"):
            await fleet.sync.publish(make_ticket(1))
        await fleet.sync.publish(make_ticket(2))

    with_fleet(work)


def test_a_learner_that_cannot_send_is_an_error_that_says_so() -> None:
    async def work(fleet: Fleet) -> None:
        await fleet.add("a")
        fleet.learner.fail = lambda version: OSError("no route to host") if version == 1 else None
        with pytest.raises(WeightSyncError, match="version 1; a: OSError: no route to host"):
            await fleet.sync.publish(make_ticket(1))
        await fleet.sync.publish(make_ticket(2))
        assert fleet.workers["a"].served == [2]

    with_fleet(work)


def test_a_fleet_that_hangs_is_an_error_in_time() -> None:
    async def work(fleet: Fleet) -> None:
        for name in "ab":
            await fleet.add(name, hangs_at=1)
        with pytest.raises(WeightSyncError, match="no worker served version 1"):
            await fleet.sync.publish(make_ticket(1))
        assert now() <= TIMEOUT_S

    with_fleet(work)


def test_ranks_start_behind_the_learner() -> None:
    group = Group(epoch=3, workers=("b", "a"), address="10.0.0.1", port=1, timeout_s=1)
    assert (group.rank("b"), group.rank("a"), group.size) == (1, 2, 3)


# Whatever happens to workers, those that are left come to the newest version, and none ever goes backwards.

FATES = st.fixed_dictionaries(
    {},
    optional={
        "swap_s": st.floats(0, 3),
        "lost_at": st.integers(1, 4),
        "hangs_at": st.integers(1, 4),
        "lost_in_join": st.booleans(),
        "silent": st.booleans(),
    },
)


@given(st.lists(st.tuples(FATES, st.floats(0, 30)), min_size=1, max_size=4), st.lists(st.floats(0, 20), min_size=4))
@example([({"lost_at": 2}, 16.0), ({"hangs_at": 2}, 0.0), ({"hangs_at": 2}, 1.0)], [0.0] * 4)
def test_who_is_left_serves_the_newest_version(fates: list[tuple[dict[str, Any], float]], waits: list[float]) -> None:
    acks: list[Ack] = []

    async def work(fleet: Fleet) -> None:
        async def join_later(name: str, fate: dict[str, Any], after: float) -> None:
            await asyncio.sleep(after)
            await fleet.add(name, **fate)

        await fleet.add("steady")
        joining = [asyncio.create_task(join_later(f"w{i}", *fate)) for i, fate in enumerate(fates)]
        for version, wait in enumerate(waits[:4], start=1):
            await fleet.sync.publish(make_ticket(version))
            await asyncio.sleep(wait)
        await asyncio.gather(*joining)
        await asyncio.sleep(4 * TIMEOUT_S)
        for worker in fleet.workers.values():
            assert worker.served == sorted(set(worker.served))
            assert worker.lost or worker.silent or worker.served[-1] == 4
        acks.extend(fleet.sync._acks)

    fleet = with_fleet(work)
    epochs = [group.epoch for group in fleet.network.groups]
    assert epochs == sorted(set(epochs))
    for name, worker in fleet.workers.items():
        assert [ack.version for ack in acks if ack.worker == name and ack.error is None] == worker.served
