"""A run that audits its gradients, and the same audit of the finished run's directory.

Its versions go to two workers by broadcast, so what audit and probe read from the object store is a copy.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.observability.catalogue import definition
from tests.integration.running import SMALL, Outcome, responses, rlsys, rows, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NAMES = {"audit/cosine", "audit/norm_ratio", "audit/cosine_floor"}
PROMPTS = 6

EXACT = 1e-5
"""Nats, mean of a batch. Engine and learner are both float32."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit")
    write_config(
        path,
        learner={"steps": 9},
        audit={"every": 4, "prompts": PROMPTS},
        checkpoint={"every": 3, "keep": 3},
        eval={"every": 0, "max_prompts": 1},
        rollout={"workers": 2},
        weights={"transport": "gloo"},
        probe={"fraction": 1.0},
    )
    return path


@pytest.fixture(scope="module")
def outcome(home: Path) -> Outcome:
    outcome = rlsys(home, "train", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def audits(home: Path, outcome: Outcome) -> list[dict[str, Any]]:
    """The rows of audits."""
    return [row for row in rows(home / "runs" / "run" / "metrics.jsonl") if "audit/cosine" in row]


def test_the_due_steps_and_no_others_have_an_audit(home: Path, audits: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in steps(home / "runs" / "run")] == list(range(1, 10))
    assert sorted(row["step"] for row in audits) == [4, 8]
    for row in audits:
        assert {name for name in row if name not in ("step", "time")} == NAMES
    for name in NAMES:
        assert definition(name).unit


def is_audit(cosine: float | None, floor: float | None, norm_ratio: float | None) -> bool:
    """So few groups may all be without a signal: then there is no cosine."""
    cosines = all(value is None or -1 <= value <= 1 for value in (cosine, floor))
    return cosines and (norm_ratio is None or norm_ratio >= 0)


def test_the_numbers_are_cosines_and_a_ratio_or_unknown(audits: list[dict[str, Any]]) -> None:
    for row in audits:
        assert is_audit(row["audit/cosine"], row["audit/cosine_floor"], row["audit/norm_ratio"])
    for name in NAMES:
        assert any(row[name] is not None for row in audits), f"no audit has a number for {name}"


def test_the_audit_ends_with_its_run_and_disturbs_nothing(home: Path, outcome: Outcome) -> None:
    assert any("AuditActor" in name for name in outcome.seen)
    assert outcome.left == []
    assert outcome.stderr == ""
    events = home / "runs" / "run" / "events.jsonl"
    assert "audit_failed" not in (events.read_text() if events.exists() else "")


def test_versions_reach_both_workers_by_broadcast_and_are_served_exactly(home: Path, outcome: Outcome) -> None:
    run = home / "runs" / "run"
    assert not [event for event in rows(run / "events.jsonl") if event["kind"] in ("sync_failed", "worker_lost")]
    trained = steps(run)
    assert max(row["weight_sync/acked"] for row in trained) == 2
    assert all(row["weight_sync/bytes"] > 0 and row["weight_sync/apply_s"] > 0 for row in trained[1:])
    assert {response["worker"] for response in responses(run)} == {"rollout-0", "rollout-1"}
    # log mu under the version that the engine served, log pi under the learner's: from the copy, or as it was trained.
    probed = [row for row in trained if row.get("split/engine/abs_mean") is not None]
    assert all(row["split/engine/abs_mean"] < EXACT for row in probed)
    fresh = [
        abs(learner - engine)
        for row in responses(run)
        for learner, engine, version in zip(
            row["policy_logprobs"], row["behavior_logprobs"], row["versions"], strict=True
        )
        if version == row["step"] - 1 > 0
    ]
    assert fresh or probed[1:], "nothing could be compared"
    assert all(gap < 10 * EXACT for gap in fresh)


@pytest.fixture(scope="module")
def report(home: Path, outcome: Outcome) -> dict[str, Any]:
    """What `rlsys lab gradient` says of the finished run."""
    printed = rlsys(home, "lab", "gradient", "runs/run", "--json")
    assert printed.code == 0, printed.stderr
    found: dict[str, Any] = json.loads(printed.stdout)
    return found


def test_the_audit_in_the_run_and_that_of_its_files_agree(audits: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Step 4 was trained from version 3, which was kept: the published weights are the checkpoint's."""
    row, step = audits[0], report["steps"][0]
    assert (row["step"], step["version"]) == (4, 3)
    for name in NAMES:
        assert row[name] == pytest.approx(step[name.removeprefix("audit/")], rel=1e-3, abs=1e-4)


def test_the_finished_run_is_audited_at_every_checkpoint_with_a_next_batch(home: Path, report: dict[str, Any]) -> None:
    assert [row["version"] for row in report["steps"]] == [3, 6], "the last checkpoint has no next batch"
    assert report["samples"] == SMALL["rollout"]["samples_per_prompt"]
    for row in report["steps"]:
        assert row["groups"] == PROMPTS
        assert 0 <= row["staleness"] <= SMALL["staleness"]["max"]
        assert is_audit(row["cosine"], row["cosine_floor"], row["norm_ratio"])
    for name in NAMES:
        assert any(row[name.removeprefix("audit/")] is not None for row in report["steps"]), name
    assert Path(home, report["plot"]).read_bytes().startswith(b"\x89PNG")
    text = rlsys(home, "lab", "gradient", "runs/run", "--step", "6", "--prompts", "2", "--samples", "3")
    assert text.code == 0, text.stderr
    (row,) = [line.split() for line in text.stdout.splitlines() if line.split()[:1] == ["6"]]
    assert row[2] == "2"
    assert "3 fresh samples a prompt" in text.stdout
