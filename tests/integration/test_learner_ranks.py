"""A learner of two processes with divided parameters, until one of them is killed; one process finishes the run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.integration.running import SMALL, Outcome, Running, responses, rlsys, rows, running, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

EVERY = 3
"""Steps between checkpoints."""

GROUPS, SAMPLES = SMALL["rollout"]["prompts_per_step"], SMALL["rollout"]["samples_per_prompt"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a bound of 0 every token is of the newest version, which the ranks have just made."""
    path = tmp_path_factory.mktemp("ranks")
    write_config(
        path,
        staleness={"max": 0},
        learner={"ranks": 2, "sharding": "fsdp", "steps": 1000, "updates_per_batch": 2},
        checkpoint={"every": EVERY},
        eval={"every": 0},
        probe={"fraction": 1.0},
        audit={"every": 4, "prompts": 4},
    )
    return path


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """The run's directory, there or not."""
    return home / "runs" / "run"


def learners(command: Running) -> list[psutil.Process]:
    """The learner's processes, oldest first."""
    found = [process for process in command.alive() if "LearnerActor" in " ".join(process.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def broken(home: Path, run: Path) -> Outcome:
    """The run, in which one learner process is killed after a few steps."""
    with running(home, "train", "run.yaml") as command:
        command.until(lambda: len(steps(run)) >= 2 * EVERY + 1)
        both = learners(command)
        assert len(both) == 2
        both[1].kill()
        outcome = command.finish(within_s=120)
    print(outcome.stdout, outcome.stderr)
    return outcome


@pytest.fixture(scope="module")
def left(broken: Outcome, run: Path) -> dict[str, Any]:
    """What the broken run left: the steps of its last checkpoint, and that checkpoint's state."""
    checkpoint = max((run / "checkpoints").iterdir())
    return {
        "steps": steps(run),
        "responses": responses(run),
        "metrics": rows(run / "metrics.jsonl"),
        "state": json.loads((checkpoint / "trainer" / "state.json").read_text()),
    }


@pytest.fixture(scope="module")
def finished(home: Path, left: dict[str, Any]) -> Outcome:
    """The same run, continued by a learner of one process."""
    last = left["state"]["version"] + EVERY
    alone = ["learner.ranks=1", "learner.sharding=replicated", f"learner.steps={last}", "staleness.max=2"]
    outcome = rlsys(home, "train", "run.yaml", "--resume", *alone)
    print(outcome.stdout, outcome.stderr)
    return outcome


def test_a_killed_rank_ends_the_run_and_is_named(broken: Outcome) -> None:
    assert broken.code == 1
    assert re.search(r"learner rank [01] of 2 died; --resume continues from the last checkpoint", broken.stderr)
    assert "Traceback" not in broken.stderr
    assert broken.left == []


def test_two_ranks_step_within_the_bound_and_lose_no_response(left: dict[str, Any]) -> None:
    done = left["steps"]
    assert [row["step"] for row in done] == list(range(1, len(done) + 1))
    assert len(done) > 2 * EVERY
    for row in done:
        assert row["staleness/violations"] == 0
        assert row["staleness/max"] == 0
        assert row["policy/grad_norm"] > 0
    recorded = [r for r in left["responses"] if r["step"] <= 2 * EVERY]
    keys = {(r["epoch"], r["prompt"], r["sample"]) for r in recorded}
    assert len(keys) == len(recorded) == 2 * EVERY * GROUPS * SAMPLES


def test_the_records_are_those_of_the_whole_batch(left: dict[str, Any]) -> None:
    for row in left["steps"][: 2 * EVERY]:
        batch = [r for r in left["responses"] if r["step"] == row["step"]]
        logs = [np.array(r["policy_logprobs"], dtype=np.float64) - np.array(r["behavior_logprobs"]) for r in batch]
        log = np.concatenate(logs)
        assert all(np.all(np.array(r["policy_logprobs"]) < 0) for r in batch), "a token that no rank has computed"
        assert row["importance/k3"] == pytest.approx(np.mean(np.exp(log) - log - 1), rel=1e-3, abs=1e-6)
        clipped = np.mean(np.concatenate([r["clipped"] for r in batch]))
        assert row["importance/clip_fraction"] == pytest.approx(clipped, abs=1e-6)


def test_what_is_served_under_each_version_is_what_the_ranks_computed(left: dict[str, Any]) -> None:
    for r in left["responses"]:
        assert set(r["versions"]) == {r["step"] - 1}
        gap = np.abs(np.array(r["step_start_logprobs"]) - np.array(r["behavior_logprobs"]))
        assert gap.max() < 1e-4, r["step"]
    split = [row for row in left["steps"] if row.get("split/engine/k3") is not None]
    assert split, "the probe never ran"
    assert all(row["split/engine/k3"] < 1e-5 for row in split)
    assert [row["step"] for row in left["metrics"] if "audit/cosine" in row]


def test_one_process_continues_what_two_began(finished: Outcome, left: dict[str, Any], run: Path) -> None:
    assert finished.code == 0, finished.stderr
    last = left["state"]["version"] + EVERY
    assert [row["step"] for row in steps(run)] == list(range(1, last + 1))
    assert all(row["staleness/violations"] == 0 for row in steps(run))
    assert sum("LearnerActor" in name for name in finished.seen) == 1
    assert finished.left == []
