"""Which batches are audited, with which weights, and what an audit cannot disturb."""

import pytest

from rlsys.config.schema import AuditConfig
from rlsys.control.auditing import Auditor
from rlsys.control.ports import PayloadLost, WorkerLost
from rlsys.errors import RewardError
from tests.fakes import FakeAudit, FakeJournal, FakeLearner, make_ticket, run
from tests.rig import Rig, rig


def audited(rig: Rig) -> list[int]:
    """Versions whose row has an audit."""
    return [version for version, metrics in rig.journal.rows if "audit/cosine" in metrics]


def test_the_steps_that_are_due_are_audited_with_the_weights_their_batch_was_trained_from() -> None:
    r = rig("audit.every=2", "audit.prompts=1", "learner.steps=6")
    r.run()
    consumed = {batch.version: batch.slots for batch in r.learner.batches}
    assert r.audit.asked == [(version, consumed[version][:1]) for version in (1, 3, 5)]
    assert audited(r) == [2, 4, 6]
    assert r.journal.steps == [1, 2, 3, 4, 5, 6], "an audit has a row of its own"


def test_the_first_batch_is_audited_with_the_initial_weights_and_a_resumed_one_with_the_checkpoints() -> None:
    r = rig("audit.every=1", "learner.steps=6", learner=FakeLearner(version=4))
    r.run()
    assert [version for version, _ in r.audit.asked] == [4, 5]
    first = rig("audit.every=1", "learner.steps=1")
    first.run()
    assert [version for version, _ in first.audit.asked] == [0]


def test_without_audit_every_nothing_is_audited() -> None:
    r = rig()
    r.run()
    assert r.audit.asked == []
    assert audited(r) == []
    assert r.make().parts.audit is None


def test_a_batch_that_was_refused_is_not_audited_and_the_next_one_is() -> None:
    r = rig("audit.every=1", "learner.steps=3", learner=FakeLearner(refuse=[1]))
    r.run()
    assert [version for version, _ in r.audit.asked] == [0, 1, 2]
    consumed = [(batch.version, batch.slots) for batch in r.learner.batches]
    assert consumed[1][0] == consumed[2][0] == 1
    assert r.audit.asked[1] == consumed[2]


@pytest.mark.parametrize("error", [RewardError("no reward"), WorkerLost("gone"), PayloadLost("with its node")])
def test_an_audit_that_fails_is_an_event_and_its_step_has_a_row_all_the_same(error: Exception) -> None:
    r = rig("audit.every=2", "learner.steps=6", audit=FakeAudit(fail={3: error}))
    r.run()
    assert audited(r) == [2, 6]
    assert r.journal.steps == [1, 2, 3, 4, 5, 6]
    assert r.journal.events == [("audit_failed", f"version 4: {error}")]


def test_an_error_of_ours_in_an_audit_ends_the_run() -> None:
    r = rig("audit.every=2", audit=FakeAudit(fail={1: KeyError("a bug")}))
    with pytest.raises(KeyError, match="a bug"):
        r.run()


def test_the_learner_goes_on_while_an_audit_runs() -> None:
    r = rig("learner.steps=40", "audit.every=2", audit=FakeAudit(audit_s=1000.0))
    r.run()
    assert sorted(audited(r)) == list(range(2, 41, 2))
    assert r.learner.batches[-1].at < 1000, "the last batch was trained before the first audit was done"


def test_weights_are_held_for_due_batches_only_and_until_they_are_audited() -> None:
    port = FakeAudit()
    auditor = Auditor(AuditConfig(every=3), port, FakeJournal())

    async def train() -> None:
        for version in range(9):
            auditor.published(make_ticket(version))
            if version:
                await auditor.metrics(version, [])
            assert set(auditor._tickets) == ({version} if version % 3 == 2 else set())

    run(train())
    assert [version for version, _ in port.asked] == [2, 5]
