"""Ctrl-C ends a run cleanly at the step it is in, `--resume` continues it, and a second Ctrl-C leaves at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import load_config
from rlsys.learning.optimizer import learning_rate
from tests.integration.running import SMALL, Outcome, responses, rlsys, rows, running, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS = 100
"""More than are done before the interruption arrives, about three."""

GROUPS = SMALL["rollout"]["prompts_per_step"]


def evaluated(run: Path) -> list[int]:
    """The versions that were evaluated, in order."""
    return [row["step"] for row in rows(run / "metrics.jsonl") if "eval/accuracy" in row]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupted")
    write_config(path, learner={"steps": STEPS}, eval={"every": 0}, checkpoint={"every": 0})
    return path


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """The run's directory, there or not."""
    return home / "runs" / "run"


@pytest.fixture(scope="module")
def interrupted(home: Path, run: Path) -> Outcome:
    """A run that got one Ctrl-C after a few steps."""
    with running(home, "train", "run.yaml") as command:
        command.until(lambda: len(steps(run)) >= 3)
        command.interrupt()
        outcome = command.finish()
    print(outcome.stdout, outcome.stderr)
    return outcome


@pytest.fixture(scope="module")
def before(interrupted: Outcome, run: Path) -> dict[str, Any]:
    """What the interrupted run left: its steps and its checkpoint's state."""
    assert interrupted.code == 0, interrupted.stderr
    (checkpoint,) = (run / "checkpoints").iterdir()
    return {
        "steps": steps(run),
        "checkpoint": checkpoint.name,
        "state": json.loads((checkpoint / "trainer" / "state.json").read_text()),
        "evaluated": evaluated(run),
    }


@pytest.fixture(scope="module")
def repeated(home: Path, before: dict[str, Any]) -> Outcome:
    """The same command once more."""
    return rlsys(home, "train", "run.yaml")


@pytest.fixture(scope="module")
def resumed(home: Path, repeated: Outcome) -> Outcome:
    """The run continued to its end."""
    outcome = rlsys(home, "train", "run.yaml", "--resume")
    print(outcome.stdout, outcome.stderr)
    return outcome


def test_one_interruption_ends_the_run_with_a_checkpoint_of_the_current_step(
    interrupted: Outcome, before: dict[str, Any]
) -> None:
    done = before["steps"][-1]["step"]
    assert 3 <= done < STEPS
    assert [row["step"] for row in before["steps"]] == list(range(1, done + 1))
    assert before["checkpoint"] == f"step-{done:06d}"
    assert before["state"]["version"] == done
    assert "stopping after the current step" in interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    assert f"after {done} learner steps" in interrupted.stdout
    assert interrupted.left == []


def test_a_directory_that_holds_a_run_is_not_trained_over(repeated: Outcome, before: dict[str, Any], run: Path) -> None:
    assert repeated.code == 1
    assert "already holds a run" in repeated.stderr
    assert "--resume" in repeated.stderr
    assert "Traceback" not in repeated.stderr
    assert not any("raylet" in name for name in repeated.seen)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [before["checkpoint"]]


def test_a_resumed_run_continues_its_steps_without_gap_or_repetition(
    resumed: Outcome, before: dict[str, Any], run: Path
) -> None:
    assert resumed.code == 0, resumed.stderr
    assert [row["step"] for row in steps(run)] == list(range(1, STEPS + 1))
    assert steps(run)[: len(before["steps"])] == before["steps"]
    assert evaluated(run) == [*before["evaluated"], STEPS]
    assert (run / "checkpoints" / f"step-{STEPS:06d}").is_dir()
    assert sorted({r["step"] for r in responses(run)}) == list(range(1, STEPS + 1))
    assert resumed.left == []


def test_no_prompt_is_trained_twice_over_both_parts(resumed: Outcome, before: dict[str, Any], run: Path) -> None:
    trained = [(row["epoch"], row["prompt"]) for row in rows(run / "ledger.jsonl") if row["end"] == "trained"]
    assert len(trained) == len(set(trained)) == STEPS * GROUPS
    keys = [(r["epoch"], r["prompt"], r["sample"]) for r in responses(run)]
    assert len(keys) == len(set(keys)) == STEPS * GROUPS * SMALL["rollout"]["samples_per_prompt"]
    open_then = {tuple(key) for key in before["state"]["extra"]["open"]}
    assert open_then, "nothing was open: this test would prove little"
    assert open_then <= set(trained), "prompts that were open at the interruption were lost"


def test_slots_are_numbered_on_over_both_parts(resumed: Outcome, run: Path) -> None:
    slots = [row["slot"] for row in rows(run / "ledger.jsonl")]
    assert len(set(slots)) == len(slots)


def test_versions_and_the_learning_rate_continue(resumed: Outcome, before: dict[str, Any], run: Path) -> None:
    learner = load_config(run / "config.yaml").learner
    for row in steps(run):
        assert row["policy/lr"] == pytest.approx(learning_rate(learner, row["step"] - 1)), row["step"]
    done, bound = before["state"]["version"], SMALL["staleness"]["max"]
    later = [r for r in responses(run) if r["step"] > done]
    assert min(version for r in later for version in r["versions"]) >= done, "sampled by a version that was not resumed"
    assert all(r["step"] - 1 - version <= bound for r in later for version in r["versions"])


def test_two_interruptions_leave_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef reward(prompt, response):\n    time.sleep(0.1)\n    return float(len(response.text))\n"
    )
    write_config(tmp_path, learner={"steps": STEPS}, reward={"function": "slow:reward"}, eval={"max_prompts": 4})
    run = tmp_path / "runs" / "run"
    with running(tmp_path, "train", "run.yaml") as command:
        command.until(lambda: len(steps(run)) >= 1)
        command.interrupt()
        command.until(lambda: "stopping after the current step" in command.stderr)
        command.interrupt()
        outcome = command.finish()
    assert outcome.code not in (0, 1), outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.left == []
    assert not list((run / "checkpoints").glob(".*")), "a partial checkpoint"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, Outcome]:
    """Where a run was killed before its first checkpoint, what a second process was told meanwhile, how it ended."""
    home = tmp_path_factory.mktemp("killed")
    write_config(home, learner={"steps": 1000}, eval={"every": 0}, checkpoint={"every": 0})
    with running(home, "train", "run.yaml") as command:
        command.until(lambda: len(steps(home / "runs" / "run")) >= 2)
        second = rlsys(home, "train", "run.yaml", "--resume")
        command.process.kill()
        outcome = command.finish(linger_s=150)  # Ray's agents notice after a minute that their node is gone
    return home, second, outcome


def test_a_run_that_goes_on_is_not_resumed_beside_itself(killed: tuple[Path, Outcome, Outcome]) -> None:
    _, second, _ = killed
    assert second.code == 1
    assert "another process is training there" in second.stderr
    assert "Traceback" not in second.stderr
    assert not any("raylet" in name for name in second.seen)


def test_a_killed_run_takes_its_cluster_along(killed: tuple[Path, Outcome, Outcome]) -> None:
    """All but Ray's logs, which nobody is left to remove."""
    _, _, outcome = killed
    assert any("raylet" in name for name in outcome.seen)
    assert set(outcome.left) <= outcome.scratch


def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_its_beginning(
    killed: tuple[Path, Outcome, Outcome],
) -> None:
    home, _, _ = killed
    run = home / "runs" / "run"
    resumed = rlsys(home, "train", "run.yaml", "--resume", "learner.steps=4")
    assert resumed.code == 0, resumed.stderr
    assert "ended before its first checkpoint: starting from the beginning" in resumed.stderr
    assert [row["step"] for row in steps(run)] == [1, 2, 3, 4]
    assert evaluated(run) == [0, 4]
    trained = [(row["epoch"], row["prompt"]) for row in rows(run / "ledger.jsonl") if row["end"] == "trained"]
    assert len(trained) == len(set(trained)) == 4 * GROUPS
    assert load_config(run / "config.yaml").learner.steps == 4
    assert load_config(run / "config-1.yaml").learner.steps == 1000
