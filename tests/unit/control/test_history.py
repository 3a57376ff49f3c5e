"""What a step leaves behind: metrics of all parts, alarms where they belong, and never a learner that waits for it."""

import pytest

from rlsys.control.loop import TrainingLoop
from rlsys.control.ports import PayloadLost, WorkerLost
from rlsys.errors import ClusterError
from tests.fakes import FakeLearner, FakeProbe, FakeRecorder, FakeRollout, run
from tests.rig import Rig, at, rig


def rows(rig: Rig) -> dict[int, dict[str, float | None]]:
    return {version: row for version, row in rig.journal.rows if "reward/mean" in row}


# The probe


def test_every_published_version_is_kept_for_the_probe_and_every_batch_is_probed_at_its_own() -> None:
    r = rig("learner.steps=4", probe=FakeProbe())
    r.run()
    assert r.probe is not None
    assert r.probe.kept == [0, 1, 2, 3, 4]
    assert r.probe.probed == [0, 1, 2, 3]
    assert [row["split/lag/mean"] for row in rows(r).values()] == [pytest.approx(0.1)] * 4


def test_a_slow_probe_never_makes_the_learner_wait() -> None:
    quick, slow = rig("learner.steps=40"), rig("learner.steps=40", probe=FakeProbe(split_s=0.5))
    quick.run()
    slow.run()
    assert [b.at for b in slow.learner.batches] == [b.at for b in quick.learner.batches]
    assert sorted(rows(slow)) == list(range(1, 41))


def test_a_probe_that_fails_stops_the_run_even_when_nobody_waited_for_it() -> None:
    r = rig("learner.steps=40", probe=FakeProbe(split_s=0.05, error=ValueError("version 3 is not held")))
    with pytest.raises(ValueError, match="version 3 is not held"):
        r.run()


# What a node took along


def test_a_batch_that_is_gone_before_it_was_written_down_costs_its_record_and_not_the_run() -> None:
    gone = PayloadLost("node b is dead")
    r = rig("learner.steps=4", probe=FakeProbe(error=gone), recorder=FakeRecorder(fail={"step-000002": gone}))
    r.run()
    assert [name for name, _, _ in r.recorder.files] == ["step-000001", "step-000003", "step-000004"]
    assert ("records_lost", "step-000002: node b is dead") in r.journal.events
    assert [what for what, _ in r.journal.events].count("split_lost") == 4
    assert list(rows(r)) == [1, 2, 3, 4]
    assert not any("split/lag/mean" in row for row in rows(r).values())


def test_a_probe_that_died_is_told_of_once_and_asked_no_more() -> None:
    r = rig("learner.steps=4", probe=FakeProbe(error=WorkerLost("out of memory")))
    r.run()
    assert r.probe is not None
    assert r.probe.probed == [0]
    assert [what for what in r.journal.events if what[0] == "probe_lost"] == [
        ("probe_lost", "no more splits of the log-ratio: out of memory")
    ]
    assert list(rows(r)) == [1, 2, 3, 4]


def test_a_recorder_that_died_stops_the_run_and_says_how_to_go_on() -> None:
    r = rig("learner.steps=4", recorder=FakeRecorder(fail={"step-000002": WorkerLost("out of memory")}))
    with pytest.raises(ClusterError, match=r"a part of the run died; --resume goes on .*: out of memory"):
        r.run()


def test_a_recorder_that_fails_stops_the_run() -> None:
    r = rig("learner.steps=4", recorder=FakeRecorder(fail={"step-000002": OSError("no space left on device")}))
    with pytest.raises(OSError, match="no space left"):
        r.run()


# Alarms


def test_an_alarm_stands_in_the_journal_and_in_the_metrics_while_it_lasts() -> None:
    diverging = FakeLearner(metrics=lambda version: {"importance/k3": 1.0 if 2 <= version <= 4 else 0.0})
    r = rig("alarms.patience=2", "learner.steps=8", learner=diverging)
    loop = r.run()
    assert [(a.name, a.state, a.step) for a in r.journal.alarms] == [
        ("divergence_high", "raised", 3),
        ("divergence_high", "cleared", 6),
    ]
    assert [row["alarms/raised"] for row in rows(r).values()] == [0, 0, 1, 1, 1, 0, 0, 0]
    assert loop.progress.alarms == ()


def test_a_refused_batch_raises_an_alarm_and_the_next_applied_one_clears_it() -> None:
    r = rig(learner=FakeLearner(refuse=[2]))
    r.run()
    assert [(a.name, a.state, a.step) for a in r.journal.alarms] == [
        ("not_finite", "raised", 2),
        ("not_finite", "cleared", 3),
    ]


# Survivorship


def test_the_rejected_are_counted_apart_from_the_trained() -> None:
    r = rig(learner=FakeLearner(refuse=[2]), workers=[FakeRollout("a", tokens=lambda slot: 6 if slot in (4, 5) else 2)])
    r.run()
    last = rows(r)[6]
    assert (last["staleness/rejected_groups"], last["staleness/rejected_tokens"]) == (2, 2 * 2 * 6)
    assert (last["staleness/rejected_length"], last["staleness/trained_length"]) == (6, 2)
    assert last["staleness/rejected_reward"] == last["staleness/trained_reward"] == 1
    first = rows(r)[1]
    assert (first["staleness/rejected_groups"], first["staleness/rejected_length"]) == (0, None)


# The ESS-driven window


ESS = ("staleness.controller=ess", "staleness.ess.target=0.7", "staleness.ess.decrease=0.5", "staleness.ess.increase=1")


def test_a_low_ess_makes_the_data_younger_and_a_high_one_older_again_within_the_bound() -> None:
    def ess(version: int) -> dict[str, float | None]:
        return {"importance/ess_sequence": 0.1 if version <= 15 else 0.9}

    r = rig(*ESS, "learner.steps=40", "staleness.backlog=3", learner=FakeLearner(metrics=ess))
    r.run()
    ages = [max(batch.ages) for batch in r.learner.batches]
    assert max(ages) <= r.config.staleness.max
    assert max(ages[:6]) == 3
    assert max(ages[14:16]) <= 1
    assert max(ages[-6:]) == 3
    windows = [w for row in rows(r).values() if (w := row["staleness/window"]) is not None]
    assert min(windows) == pytest.approx(1, abs=0.01)
    assert windows[-1] == 4


def test_a_resumed_run_admits_no_more_age_than_it_did_when_it_ended() -> None:
    first = rig(*ESS, learner=FakeLearner(metrics=lambda version: {"importance/ess_sequence": 0.1}))
    run(first.run().checkpoint())
    (_, extra) = first.learner.saved[0]
    assert extra["window"] == 3 / 2**6  # halved in each of six steps

    for window, slots in ((extra["window"], 2), (None, 8)):
        r = rig(*ESS, window=window, workers=[FakeRollout("a", tokens=lambda slot: 10**6)])

        async def stop(loop: TrainingLoop) -> None:
            await at(1.0)
            assert len(loop.ledger.open) == slots  # noqa: B023
            loop.stop()

        r.run(stop)


def test_without_the_controller_the_window_is_the_bound() -> None:
    r = rig(learner=FakeLearner(metrics=lambda version: {"importance/ess_sequence": 0.0}))
    r.run()
    assert {row["staleness/window"] for row in rows(r).values()} == {4.0}
