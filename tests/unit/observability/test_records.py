"""What a run writes can be read again, value for value, and says nothing that is not defined."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlsys.dashboard.run import standing
from rlsys.errors import CheckpointError
from rlsys.observability.alarms import Alarms
from rlsys.observability.rollouts import read_rollouts, write_rollouts
from rlsys.observability.run_directory import RunDirectory, read_jsonl
from rlsys.observability.sinks import JsonLines, RunJournal, TensorBoard
from rlsys.records import BatchArrays, GroupScore, RolloutGroup
from rlsys.scheduling.ledger import Closed, End
from tests.fakes import make_config, make_prompt, make_rollout

# JSON lines


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_and_a_refused_row_leaves_no_trace(tmp_path: Path, value: float) -> None:
    lines = JsonLines(tmp_path / "deep" / "x.jsonl")
    lines.write({"a": 1.5, "b": None, "c": "ü\u2028"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"a": value})
    lines.write({"a": 2})
    assert list(read_jsonl(tmp_path / "deep" / "x.jsonl")) == [{"a": 1.5, "b": None, "c": "ü\u2028"}, {"a": 2}]
    lines.close()


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    for n in range(3):
        lines.write({"n": n})
        assert [row["n"] for row in read_jsonl(tmp_path / "x.jsonl")] == list(range(n + 1))
    lines.close()


def test_a_last_line_cut_short_is_left_out_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n{"n": 2}\n{"n": 3')
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [{"n": 1}, {"n": 2}]
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


# The journal


def open_journal(directory: RunDirectory, *, tensorboard: bool = False) -> RunJournal:
    written = f"records.tensorboard={str(tensorboard).lower()}"
    return RunJournal(directory, make_config(directory.root.parent, written, "observability.prometheus=false"))


def closed(slot: int, prompt: int, version: int, end: End = End.TRAINED) -> Closed:
    return Closed(slot=slot, epoch=0, prompt=prompt, end=end, attempts=1, admitted_version=0, version=version)


def test_the_journal_keeps_steps_ends_and_events_apart(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    journal = open_journal(directory)
    journal.step(1, {"reward/mean": 0.5, "importance/ess_token/by_staleness/4+": None})
    journal.closed(closed(3, 8, 1, End.REJECTED_NONFINITE))
    journal.event(End.FAILED_REWARD, "slot 4: no reward")
    journal.close()
    (row,) = directory.rows()
    assert (row["step"], row["reward/mean"], row["importance/ess_token/by_staleness/4+"]) == (1, 0.5, None)
    (end,) = read_jsonl(directory.ledger)
    assert end == {**asdict(closed(3, 8, 1)), "end": "rejected_nonfinite"}
    (event,) = read_jsonl(directory.notes)
    assert (event["kind"], event["message"]) == ("failed_reward", "slot 4: no reward")
    assert not directory.tensorboard.exists()


def test_the_journal_refuses_a_metric_nobody_defined_before_writing_any(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    journal = open_journal(directory, tensorboard=True)
    with pytest.raises(KeyError, match="reward/median"):
        journal.step(1, {"reward/mean": 0.5, "reward/median": 0.5})
    journal.close()
    assert directory.rows() == []


def test_tensorboard_can_read_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.write(1, {"reward/mean": 0.25, "kl/reference_k1": None})
    board.write(2, {"reward/mean": 0.75, "kl/reference_k1": 0.5})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl/reference_k1", "reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("kl/reference_k1")] == [(2, 0.5)]


# The run directory


def test_a_directory_that_holds_a_run_is_not_used_for_another(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("name: run\n")
    assert directory.config.read_text() == "name: run\n"
    directory.create("name: run\n")  # nothing was recorded yet
    open_journal(directory).close()
    with pytest.raises(CheckpointError, match="continue it with --resume, or choose another name"):
        directory.create("name: run\n")


def test_a_configuration_that_changes_leaves_the_earlier_one_beside_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    for config in ("steps: 1\n", "steps: 1\n", "steps: 2\n", "steps: 3\n"):
        directory.write_config(config)
    texts = {path.name: path.read_text() for path in directory.root.glob("config*.yaml")}
    assert texts == {"config.yaml": "steps: 3\n", "config-1.yaml": "steps: 1\n", "config-2.yaml": "steps: 2\n"}


def recorded(directory: RunDirectory) -> None:
    """Three steps of two prompts; prompt 1 failed at version 1; at version 2, after its checkpoint, prompt 7 failed."""
    journal = open_journal(directory)
    for version in (0, 1, 2, 3):
        journal.step(version, {"reward/mean" if version else "eval/accuracy": 0.1 * version})
    for slot, prompt, version, end in [
        (0, 0, 1, End.TRAINED),
        (1, 1, 1, End.FAILED_REWARD),
        (2, 2, 1, End.TRAINED),
        (3, 3, 2, End.TRAINED),
        (4, 4, 2, End.TRAINED),
        (7, 7, 2, End.FAILED_REWARD),
        (9, 9, 2, End.FAILED_REWARD),
        (5, 5, 3, End.TRAINED),
        (6, 6, 3, End.TRAINED),
    ]:
        journal.closed(closed(slot, prompt, version, end))
    journal.event("note", "kept")
    journal.close()
    directory.rollouts.mkdir()
    for name in ("step-000001", "step-000002", "step-000003", "refused-000002-000009", "refused-000003-000011"):
        (directory.rollouts / f"{name}.parquet").touch()


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    recorded(directory)
    directory.rewind(2)
    assert [row["step"] for row in directory.rows()] == [0, 1, 2]
    assert [row["slot"] for row in read_jsonl(directory.ledger)] == [0, 1, 2, 3, 4, 7, 9]
    assert sorted(path.stem for path in directory.rollouts.iterdir()) == [
        "refused-000002-000009",
        "step-000001",
        "step-000002",
    ]


def test_rewinding_forgets_the_evaluation_that_a_resumed_run_repeats_and_no_other(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    journal = open_journal(directory)
    for step, metric in [
        (0, "eval/accuracy"),
        (1, "reward/mean"),
        (2, "reward/mean"),
        (2, "eval/accuracy"),
        (2, "audit/cosine"),
        (1, "eval/accuracy"),  # late
        (3, "reward/mean"),
    ]:
        journal.step(step, {metric: 0.5})
    journal.close()
    directory.rewind(2)
    found = [(row["step"], key) for row in directory.rows() for key in row if "/" in key]
    assert found == [
        (0, "eval/accuracy"),
        (1, "reward/mean"),
        (2, "reward/mean"),
        (2, "audit/cosine"),
        (1, "eval/accuracy"),
    ]


def test_rewinding_forgets_the_ends_of_prompts_that_the_checkpoint_knows_as_open_or_not_at_all(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    recorded(directory)
    directory.rewind(2, cursor=(0, 9), reopened={(0, 5), (0, 6), (0, 7), (0, 8)})
    assert [row["prompt"] for row in read_jsonl(directory.ledger)] == [0, 1, 2, 3, 4]


def test_rewinding_twice_is_rewinding_once_and_lines_cut_short_are_gone(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    recorded(directory)
    for path in (directory.metrics, directory.ledger, directory.notes):
        with path.open("a") as file:
            file.write('{"step": 2, "ti')
    directory.rewind(2)
    texts = [path.read_text() for path in (directory.metrics, directory.ledger, directory.notes)]
    directory.rewind(2)
    assert [path.read_text() for path in (directory.metrics, directory.ledger, directory.notes)] == texts
    journal = open_journal(directory)
    journal.event("note", "resumed")
    journal.step(3, {"reward/mean": 0.5})
    journal.close()
    assert [row["message"] for row in read_jsonl(directory.notes)] == ["kept", "resumed"]
    assert [row["step"] for row in directory.rows()] == [0, 1, 2, 3]


def test_rewinding_clears_the_alarms_that_stand_and_only_those(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    journal, alarms = open_journal(directory), Alarms(make_config(tmp_path))
    for alarm in [*alarms.refused(1), *alarms.applied(2), *alarms.refused(4), *alarms.idle(4, {"learner": 1e9})]:
        journal.alarm(alarm)
    journal.close()
    assert [alarm["name"] for alarm in standing(list(read_jsonl(directory.notes)))] == ["not_finite", "stalled_learner"]
    directory.rewind(3)
    assert standing(list(read_jsonl(directory.notes))) == []
    assert [row["alarm"]["step"] for row in read_jsonl(directory.notes)] == [1, 2, 4, 4, 3, 3]


def test_rewinding_a_run_without_records_is_harmless(tmp_path: Path) -> None:
    RunDirectory(tmp_path).rewind(5, cursor=(0, 3))
    assert list(tmp_path.iterdir()) == []


# Rollouts


def batch(with_reference: bool) -> tuple[list[RolloutGroup], list[GroupScore], BatchArrays]:
    """Two groups of two responses with 3, 1, 0 and 2 tokens."""
    versions = [[[4, 4, 5], [5]], [[], [3, 6]]]
    groups = [
        RolloutGroup(
            slot=10 + g,
            attempt=1 + g,
            worker=f"w{g}",
            prompt=make_prompt(20 + g, epoch=2),
            rollouts=tuple(make_rollout(tokens, sample) for sample, tokens in enumerate(responses)),
            started_at=1.0 + g,
            finished_at=2.0 + g,
        )
        for g, responses in enumerate(versions)
    ]
    scores = [
        GroupScore(slot=10 + g, attempt=1 + g, rewards=np.array([0.5, g], dtype=np.float32), scored_at=3.0 + g)
        for g in range(2)
    ]
    numbers = np.arange(6, dtype=np.float32)
    arrays = BatchArrays(
        offsets=np.array([0, 3, 4, 4, 6]),
        policy_logprobs=-numbers,
        step_start_logprobs=-10 * numbers,
        reference_logprobs=-100 * numbers if with_reference else None,
        clipped=numbers == 2,
        masked=numbers == 5,
        advantages=np.array([0.1, -0.1, 0.2, -0.2], dtype=np.float32),
    )
    return groups, scores, arrays


def test_a_recorded_batch_can_be_trained_on_again(tmp_path: Path) -> None:
    groups, scores, arrays = batch(with_reference=True)
    read = read_rollouts(write_rollouts(tmp_path / "step-000007.parquet", 7, groups, scores, arrays))
    assert [scored.group.summary() for scored in read] == [
        replace(group.summary(), tokens=tokens) for group, tokens in zip(groups, (4, 2), strict=True)
    ]
    for scored, group, score in zip(read, groups, scores, strict=True):
        assert scored.score.rewards.tolist() == score.rewards.tolist()
        assert scored.group.prompt.token_ids == group.prompt.token_ids
        for back, rollout in zip(scored.group.rollouts, group.rollouts, strict=True):
            assert back.token_versions().tolist() == rollout.token_versions().tolist()
            assert back.response_ids.tolist() == rollout.response_ids.tolist()
            assert back.behavior_logprobs.tolist() == rollout.behavior_logprobs.tolist()
            assert back.loss_mask.tolist() == rollout.loss_mask.tolist()


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_recorded_batch_reads_back_value_for_value(tmp_path: Path, with_reference: bool) -> None:
    path = write_rollouts(tmp_path / "rollouts" / "step-000007.parquet", 7, *batch(with_reference))
    assert [p.name for p in path.parent.iterdir()] == ["step-000007.parquet"]  # and no temporary file
    table = pq.read_table(path).to_pydict()
    assert table.pop("prompt_ids") == [[20], [20], [21], [21]]
    numbers = {
        "step": [7, 7, 7, 7],
        "slot": [10, 10, 11, 11],
        "attempt": [1, 1, 2, 2],
        "epoch": [2, 2, 2, 2],
        "prompt": [20, 20, 21, 21],
        "sample": [0, 1, 0, 1],
        "reward": [0.5, 0.0, 0.5, 1.0],
        "started_at": [1.0, 1.0, 2.0, 2.0],
        "finished_at": [2.0, 2.0, 3.0, 3.0],
        "scored_at": [3.0, 3.0, 4.0, 4.0],
    }
    assert {name: table.pop(name) for name in numbers} == numbers
    assert table.pop("advantage") == pytest.approx([0.1, -0.1, 0.2, -0.2])
    texts = {name: table.pop(name) for name in ("worker", "prompt_text", "response_text", "finish_reason")}
    assert texts == {
        "worker": ["w0", "w0", "w1", "w1"],
        "prompt_text": ["20", "20", "21", "21"],
        "response_text": [""] * 4,
        "finish_reason": ["stop"] * 4,
    }
    tokens = {
        "response_ids": [[0, 1, 2], [0], [], [0, 1]],
        "loss_mask": [[True] * 3, [True], [], [True] * 2],
        "versions": [[4, 4, 5], [5], [], [3, 6]],
        "behavior_logprobs": [[-1.0] * 3, [-1.0], [], [-1.0] * 2],
        "policy_logprobs": [[0, -1, -2], [-3], [], [-4, -5]],
        "step_start_logprobs": [[0, -10, -20], [-30], [], [-40, -50]],
        "clipped": [[False, False, True], [False], [], [False, False]],
        "masked": [[False, False, False], [False], [], [False, True]],
    }
    if with_reference:
        tokens["reference_logprobs"] = [[0, -100, -200], [-300], [], [-400, -500]]
    assert table == tokens


def test_a_row_of_json_is_one_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.write({"message": "two\nlines"})
    lines.close()
    (line,) = (tmp_path / "x.jsonl").read_text().splitlines()
    assert json.loads(line) == {"message": "two\nlines"}
