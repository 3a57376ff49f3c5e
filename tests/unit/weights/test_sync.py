"""Every worker comes to the newest version as soon as it can, and no worker waits for another."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlsys.errors import ChecksumMismatch, WeightSyncError
from rlsys.weights.sync import REFUSED_AGAIN_S, RETRY_BACKOFF_S, Ack, WeightSync
from rlsys.weights.transport import WeightTicket
from tests.fakes import make_ticket, now, run


@dataclass
class Worker:
    """Takes `apply_s` to serve a version; `fail` says what goes wrong with the n-th attempt (from 0) at a version."""

    apply_s: float = 0.0
    fail: Callable[[int, int], Exception | None] = lambda version, attempt: None
    served: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    async def apply(self, ticket: WeightTicket) -> float:
        version = ticket.manifest.version
        attempt = self.attempts.count(version)
        self.attempts.append(version)
        await asyncio.sleep(self.apply_s)
        if error := self.fail(version, attempt):
            raise error
        self.served.append(version)
        return 0.25


def with_sync(
    work: Callable[[WeightSync], Coroutine[Any, Any, None]], *, timeout_s: float = 60.0, **workers: Worker
) -> list[Ack]:
    """Run `work` over a service with these workers; returns all acknowledgements. No task may be left."""

    async def main() -> list[Ack]:
        sync = WeightSync(timeout_s=timeout_s)
        for name, worker in workers.items():
            await sync.add(name, worker)
        await work(sync)
        acks = sync._acks
        for name in (*workers, "joining"):
            await sync.remove(name)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return acks

    return run(main())


def heard(acks: list[Ack]) -> list[tuple[str, int, bool]]:
    return [(ack.worker, ack.version, ack.error is None) for ack in acks]


def always(error: Exception, *versions: int) -> Callable[[int, int], Exception | None]:
    return lambda version, attempt: error if version in versions else None


def test_publication_returns_at_the_first_acknowledgement() -> None:
    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))
        assert now() == 1.0
        assert heard(sync._acks) == [("fast", 1, True)]

    with_sync(work, fast=Worker(apply_s=1), slow=Worker(apply_s=100))


def test_publication_waits_for_an_acknowledgement() -> None:
    async def work(sync: WeightSync) -> None:
        publication = asyncio.create_task(sync.publish(make_ticket(1)))
        await asyncio.sleep(4.9)
        assert not publication.done()
        await asyncio.sleep(0.2)
        assert publication.done()

    with_sync(work, only=Worker(apply_s=5))


def test_a_slow_worker_skips_versions_and_holds_nobody_up() -> None:
    fast, slow = Worker(apply_s=1), Worker(apply_s=3.5)

    async def work(sync: WeightSync) -> None:
        for version in range(1, 8):
            await sync.publish(make_ticket(version))
        assert now() == 7.0
        await asyncio.sleep(10)

    with_sync(work, fast=fast, slow=slow)
    assert fast.served == [1, 2, 3, 4, 5, 6, 7]
    assert slow.served == [1, 4, 7]  # at 3.5 s version 4 is the newest, at 7 s version 7


def test_versions_never_go_backwards_at_any_worker() -> None:
    workers = {name: Worker(apply_s=seconds) for name, seconds in [("a", 0.3), ("b", 1.1), ("c", 2.7)]}

    async def work(sync: WeightSync) -> None:
        for version in range(1, 15):
            await sync.publish(make_ticket(version))
        await asyncio.sleep(10)

    acks = with_sync(work, a=workers["a"], b=workers["b"], c=workers["c"])
    for name, worker in workers.items():
        assert worker.served == sorted(set(worker.served))
        assert worker.served[-1] == 14
        assert [ack.version for ack in acks if ack.worker == name] == worker.served


def test_an_older_version_than_the_published_one_is_refused() -> None:
    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(5))
        with pytest.raises(WeightSyncError, match="version 4 is older than the published 5"):
            await sync.publish(make_ticket(4))

    acks = with_sync(work, a=Worker())
    assert heard(acks) == [("a", 5, True)]


def test_a_failed_attempt_is_repeated_with_growing_waits() -> None:
    worker = Worker(fail=lambda version, attempt: ConnectionError("reset") if attempt < 2 else None)

    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))
        assert now() == pytest.approx(sum(RETRY_BACKOFF_S[:2]))

    acks = with_sync(work, a=worker)
    assert worker.attempts == [1, 1, 1]
    assert heard(acks) == [("a", 1, True)]


def test_a_version_that_a_worker_refuses_is_reported_and_the_next_one_replaces_it() -> None:
    """The flipped byte of fault 5: the old version keeps serving, and the acknowledgement names what happened."""
    good, bad = Worker(), Worker(fail=always(ChecksumMismatch("checksum 00 arrived"), 2))

    async def work(sync: WeightSync) -> None:
        for version in (1, 2):
            await sync.publish(make_ticket(version))
            await asyncio.sleep(10)
        assert bad.served == [1]
        await sync.publish(make_ticket(3))
        await asyncio.sleep(10)

    acks = with_sync(work, good=good, bad=bad)
    assert good.served == [1, 2, 3]
    assert bad.served == [1, 3]
    assert bad.attempts == [1, 2, 2, 2, 2, 3]
    (refusal,) = [ack for ack in acks if ack.error is not None]
    assert (refusal.worker, refusal.version, refusal.pause_s) == ("bad", 2, 0.0)
    assert refusal.error == "ChecksumMismatch: checksum 00 arrived"


def test_a_refused_version_is_tried_again_when_no_newer_one_comes() -> None:
    """The others may all die: then only this worker can make the batch that a newer version needs."""
    worker = Worker(fail=lambda version, attempt: OSError("torn") if attempt < 4 and version == 1 else None)

    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))
        await asyncio.sleep(sum(RETRY_BACKOFF_S) + REFUSED_AGAIN_S - 0.1)
        assert worker.served == []
        await asyncio.sleep(0.2)
        assert worker.served == [1]

    acks = with_sync(work, other=Worker(), worker=worker)
    assert heard(acks) == [("other", 1, True), ("worker", 1, False), ("worker", 1, True)]


def test_retries_end_when_a_newer_version_is_there() -> None:
    bad = Worker(fail=always(OSError("torn"), 1))

    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))  # the good one serves it
        await sync.publish(make_ticket(2))
        await asyncio.sleep(10)

    with_sync(work, good=Worker(), bad=bad)
    assert bad.attempts == [1, 1, 2]
    assert bad.served == [2]


def test_a_version_that_all_refused_is_an_error_at_once_with_every_reason() -> None:
    async def work(sync: WeightSync) -> None:
        with pytest.raises(WeightSyncError, match="no worker served version 1; a: OSError: x; b: OSError: y"):
            await sync.publish(make_ticket(1))
        assert now() == pytest.approx(sum(RETRY_BACKOFF_S))

    with_sync(work, a=Worker(fail=always(OSError("x"), 1)), b=Worker(fail=always(OSError("y"), 1)))


def test_after_a_refused_version_the_next_one_is_given_its_chance() -> None:
    worker = Worker(apply_s=1, fail=always(OSError("x"), 1))

    async def work(sync: WeightSync) -> None:
        with pytest.raises(WeightSyncError, match="version 1"):
            await sync.publish(make_ticket(1))
        await sync.publish(make_ticket(2))

    with_sync(work, a=worker)
    assert worker.served == [2]


def test_a_late_refusal_of_an_older_version_does_not_count_against_the_newer() -> None:
    async def work(sync: WeightSync) -> None:
        first = asyncio.create_task(sync.publish(make_ticket(1)))
        await asyncio.sleep(0.5)
        await sync.publish(make_ticket(2))
        assert now() == 2.0  # version 1 was refused at 1.0
        await first  # a newer version is served

    with_sync(work, a=Worker(apply_s=1, fail=always(OSError("x"), 1)))


def test_a_version_that_nobody_serves_in_time_is_an_error_with_the_reasons_known() -> None:
    async def work(sync: WeightSync) -> None:
        with pytest.raises(WeightSyncError, match=r"no worker served version 1 within 7 s; a: OSError: x$"):
            await sync.publish(make_ticket(1))
        assert now() == 7.0

    with_sync(work, timeout_s=7, a=Worker(fail=always(OSError("x"), 1)), hanging=Worker(apply_s=1e9))


def test_what_one_worker_served_does_not_count_for_the_next_version() -> None:
    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))
        with pytest.raises(WeightSyncError, match="version 2"):
            await sync.publish(make_ticket(2))

    with_sync(work, a=Worker(fail=always(OSError("x"), 2)))


def test_a_joining_worker_gets_the_current_version_and_no_earlier_one() -> None:
    joining = Worker()

    async def work(sync: WeightSync) -> None:
        for version in (1, 2, 3):
            await sync.publish(make_ticket(version))
        await sync.add("joining", joining)
        await asyncio.sleep(1)
        assert joining.served == [3]
        await sync.publish(make_ticket(4))
        await asyncio.sleep(1)

    with_sync(work, a=Worker())
    assert joining.served == [3, 4]


def test_a_worker_that_comes_back_under_its_name_is_brought_up_to_date_by_one_sender() -> None:
    first, second = Worker(), Worker()

    async def work(sync: WeightSync) -> None:
        await sync.publish(make_ticket(1))
        await sync.add("a", second)
        await asyncio.sleep(1)
        await sync.publish(make_ticket(2))
        await asyncio.sleep(1)

    with_sync(work, a=first)
    assert first.served == [1]
    assert second.served == [1, 2]


@pytest.mark.parametrize("others", [False, True])
def test_removing_a_worker_while_it_is_being_sent_to_hangs_nobody(others: bool) -> None:
    """Without others the publication has nobody to wait for; with them it goes on waiting for those."""

    async def work(sync: WeightSync) -> None:
        publication = asyncio.create_task(sync.publish(make_ticket(1)))
        await asyncio.sleep(1)
        if not others:
            await sync.remove("staying")
        await sync.remove("leaving")
        await publication
        assert now() == (5.0 if others else 1.0)

    with_sync(work, timeout_s=1e6, leaving=Worker(apply_s=1e9), staying=Worker(apply_s=5))


def test_removing_the_only_worker_that_did_not_refuse_ends_the_publication() -> None:
    async def work(sync: WeightSync) -> None:
        publication = asyncio.create_task(sync.publish(make_ticket(1)))
        await asyncio.sleep(10)
        await sync.remove("hanging")
        with pytest.raises(WeightSyncError, match="a: OSError: x"):
            await publication

    with_sync(work, timeout_s=1e6, a=Worker(fail=always(OSError("x"), 1)), hanging=Worker(apply_s=1e9))


def test_acknowledgements_are_read_once_each_from_a_cursor() -> None:
    async def work(sync: WeightSync) -> None:
        async def read() -> list[Ack]:
            seen: list[Ack] = []
            while len(seen) < 6:
                seen += await sync.acks(len(seen))
            return seen

        reader = asyncio.create_task(read())
        for version in (1, 2, 3):
            await sync.publish(make_ticket(version))
            await asyncio.sleep(5)
        seen = await reader
        assert heard(seen) == [(name, version, True) for version in (1, 2, 3) for name in ("a", "b")]
        assert await sync.acks(4) == seen[4:]
        assert all(ack.pause_s == 0.25 for ack in seen)

    with_sync(work, a=Worker(apply_s=1), b=Worker(apply_s=2))
