"""One small run of `rlsys train` with two rollout workers, and everything its directory promises about it."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config import load_config
from rlsys.observability.catalogue import definition
from tests.integration.running import SMALL, Outcome, responses, rlsys, rows, steps, write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS = SMALL["learner"]["steps"]
GROUPS, SAMPLES = SMALL["rollout"]["prompts_per_step"], SMALL["rollout"]["samples_per_prompt"]
BOUND = SMALL["staleness"]["max"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    write_config(path, rollout={"workers": 2}, probe={"fraction": 1.0})
    return path


@pytest.fixture(scope="module")
def outcome(home: Path) -> Outcome:
    """The run. What it printed is shown when a test fails."""
    outcome = rlsys(home, "train", "run.yaml")
    print(outcome.stdout, outcome.stderr)
    return outcome


@pytest.fixture(scope="module")
def run(home: Path, outcome: Outcome) -> Path:
    """The run's directory."""
    assert outcome.code == 0, outcome.stderr
    return home / "runs" / "run"


@pytest.fixture(scope="module")
def recorded(run: Path) -> list[dict[str, Any]]:
    return responses(run)


def test_a_run_succeeds_and_prints_its_result_and_nothing_else(outcome: Outcome) -> None:
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert f"after {STEPS} learner steps" in outcome.stdout
    for word in ("Traceback", "WARNING", "Warning", "ERROR"):
        assert word not in outcome.stdout


def test_a_run_leaves_no_process_no_shared_memory_and_no_scratch(outcome: Outcome) -> None:
    assert any("raylet" in name for name in outcome.seen), "the watcher saw no Ray: this test would prove nothing"
    assert any("RolloutActor" in name for name in outcome.seen)
    assert len(outcome.scratch) == 1
    assert outcome.left == []


def test_the_cluster_of_a_run_listens_on_loopback_alone(outcome: Outcome) -> None:
    assert outcome.listened
    assert outcome.listened <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_the_directory_holds_every_file(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "ledger.jsonl", "trace.json", "summary.png"}
    assert files | {"rollouts", "events", "checkpoints"} <= names
    assert [p.name for p in sorted((run / "rollouts").iterdir())] == [
        f"step-{s:06d}.parquet" for s in range(1, STEPS + 1)
    ]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000008", f"step-{STEPS:06d}"]
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_configuration_is_the_resolved_one(run: Path) -> None:
    saved = load_config(run / "config.yaml")
    assert saved.rollout.workers == 2
    assert saved.staleness.max == BOUND
    assert saved.path == run


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_there_is_one_row_of_metrics_for_every_step(run: Path) -> None:
    assert [row["step"] for row in steps(run)] == list(range(1, STEPS + 1))


def test_every_metric_is_in_the_catalogue_and_finite(run: Path) -> None:
    for row in rows(run / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time"):
                definition(name)
                assert value is None or math.isfinite(value), name
    for name in ("reward/mean", "importance/k3", "importance/ess_token", "policy/grad_norm", "kl/reference_k3"):
        assert all(row[name] is not None for row in steps(run)), name


def test_no_trained_token_is_staler_than_the_bound(run: Path, recorded: list[dict[str, Any]]) -> None:
    for row in steps(run):
        assert row["staleness/violations"] == 0
        assert row["staleness/bound"] == BOUND
        assert row["staleness/max"] <= BOUND
    ages = [r["step"] - 1 - version for r in recorded for version in r["versions"]]
    assert min(ages) >= 0
    assert max(ages) <= BOUND
    assert max(ages) > 0, "nothing was asynchronous"


def test_the_split_adds_up_to_the_log_ratio_of_the_recorded_tokens(run: Path, recorded: list[dict[str, Any]]) -> None:
    """Every group is probed. The means over tokens add up, those of the engine by the share of their tokens."""
    probed = 0
    for row in steps(run):
        if row.get("split/tokens") is None:
            continue  # the probe was skipped: it would have held up the learner
        probed += 1
        batch = [r for r in recorded if r["step"] == row["step"]]
        ratios = np.concatenate([np.subtract(r["policy_logprobs"], r["behavior_logprobs"]) for r in batch])
        tokens, later = row["split/tokens"], row["split/later_tokens"]
        assert tokens == len(ratios)
        assert later == sum(sum(v != r["versions"][0] for v in r["versions"]) for r in batch)
        engine = (row["split/engine/mean"] or 0) * (tokens - later)
        engine += (row["split/engine_later_spans/mean"] or 0) * later
        assert row["split/drift/mean"] + row["split/lag/mean"] + engine / tokens == pytest.approx(
            ratios.mean(), abs=1e-5
        )
        assert row["split/engine/k3"] is None or row["split/engine/k3"] < 1e-5, "both sides are float32"
        if row["staleness/max"] == 0:
            assert row["split/lag/abs_mean"] == 0
    assert probed > 0


def test_the_trace_shows_every_role_at_work_and_the_version_each_worker_serves(run: Path) -> None:
    events = json.loads((run / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    work = {(names[event["pid"]], event["name"]) for event in events if event["ph"] == "X"}
    expected = {("learner", "step"), ("learner", "publish"), ("reference", "reference"), ("recorder", "write")}
    expected |= {("probe", "probe"), ("controller", "evaluate")}
    expected |= {(f"rollout-{i}", name) for i in range(2) for name in ("generate", "pause", "fetch")}
    assert expected <= work
    assert any(name == "score" for _, name in work)
    learner = [event for event in events if event["ph"] == "X" and event["name"] == "step"]
    assert [event["args"]["version"] for event in learner] == list(range(STEPS))
    for role in ("rollout-0", "rollout-1"):
        served = [e["args"]["version"] for e in events if e["name"] == "pause" and names[e["pid"]] == role]
        assert served == sorted(set(served)), "versions only go up"
    for pid in names:
        for track in {event["tid"] for event in events if event["ph"] == "X" and event["pid"] == pid}:
            own = sorted(
                (e["ts"], e["ts"] + e["dur"]) for e in events if (e["ph"], e["pid"], e.get("tid")) == ("X", pid, track)
            )
            assert all(end <= start + 2 for (_, end), (start, _) in pairwise(own)), f"{names[pid]} overlaps itself"


def test_held_out_accuracy_is_measured_before_during_and_after(run: Path) -> None:
    evaluated = {row["step"]: row for row in rows(run / "metrics.jsonl") if "eval/accuracy" in row}
    assert {0, 5, STEPS} <= set(evaluated)
    for row in evaluated.values():
        assert row["eval/prompts"] == SMALL["eval"]["max_prompts"]
        assert row["eval/oldest_version"] <= row["eval/newest_version"] <= STEPS


def test_tensorboard_shows_the_same_numbers(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "events"))
    events.Reload()
    for name in ("reward/mean", "staleness/mean", "importance/ess_token", "throughput/step_s"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({row["step"]: row[name] for row in steps(run)}, rel=1e-5), name


# -- ledger.jsonl ------------------------------------------------------------------------------------------------------


def test_what_was_admitted_is_trained_or_still_open(run: Path) -> None:
    for row in steps(run):
        somewhere = ("waiting", "in_flight", "finished", "learning", "trained", "rejected")
        assert row["ledger/lost"] == 0
        assert row["ledger/admitted"] == sum(row[f"ledger/{name}"] for name in somewhere if f"ledger/{name}" in row)
    closed = rows(run / "ledger.jsonl")
    assert {row["end"] for row in closed} == {"trained"}
    assert len(closed) == STEPS * GROUPS
    assert [row["version"] for row in closed] == sorted(row["version"] for row in closed)


def test_every_prompt_is_trained_at_most_once_an_epoch(run: Path, recorded: list[dict[str, Any]]) -> None:
    closed = [(row["epoch"], row["prompt"]) for row in rows(run / "ledger.jsonl")]
    assert len(set(closed)) == len(closed)
    assert {epoch for epoch, _ in closed} == {0, 1}, "the run was to go through more than one epoch"
    keys = [(r["epoch"], r["prompt"], r["sample"]) for r in recorded]
    assert len(set(keys)) == len(keys) == STEPS * GROUPS * SAMPLES
    assert {key[:2] for key in keys} == set(closed)


# -- rollouts/*.parquet ------------------------------------------------------------------------------------------------


def test_both_workers_sampled_for_training(recorded: list[dict[str, Any]]) -> None:
    assert {r["worker"] for r in recorded} == {"rollout-0", "rollout-1"}


def test_a_recorded_response_says_what_it_is(recorded: list[dict[str, Any]]) -> None:
    for r in recorded:
        tokens = len(r["response_ids"])
        assert 1 <= tokens <= SMALL["rollout"]["max_new_tokens"]
        for name in ("loss_mask", "versions", "behavior_logprobs", "policy_logprobs", "reference_logprobs", "clipped"):
            assert len(r[name]) == tokens, name
        assert all(r["loss_mask"])
        assert r["versions"] == sorted(r["versions"])
        first, second = r["prompt_text"].removesuffix("=").split("+")
        right = r["finish_reason"] == "stop" and r["response_text"] == str(int(first) + int(second))
        assert r["reward"] == float(right)
        assert r["started_at"] <= r["finished_at"] <= r["scored_at"]


def test_metrics_can_be_recomputed_from_the_recorded_tokens(run: Path, recorded: list[dict[str, Any]]) -> None:
    for row in steps(run):
        batch = [r for r in recorded if r["step"] == row["step"]]
        logs = [np.array(r["policy_logprobs"], dtype=np.float64) - np.array(r["behavior_logprobs"]) for r in batch]
        log, total = np.concatenate(logs), np.array([part.sum() for part in logs])
        ages = np.concatenate([row["step"] - 1 - np.array(r["versions"]) for r in batch])
        reference = np.concatenate([np.array(r["reference_logprobs"]) - np.array(r["policy_logprobs"]) for r in batch])
        assert len(batch) == GROUPS * SAMPLES
        expected = {
            "importance/k3": np.mean(np.exp(log) - log - 1),
            "importance/ess_token": np.exp(log).sum() ** 2 / (len(log) * np.exp(2 * log).sum()),
            "importance/ess_sequence": np.exp(total).sum() ** 2 / (len(total) * np.exp(2 * total).sum()),
            "importance/log_ratio_abs_max": np.abs(log).max(),
            "importance/clip_fraction": np.mean(np.concatenate([r["clipped"] for r in batch])),
            "kl/reference_k3": np.mean(np.exp(reference) - reference - 1),
            "staleness/mean": ages.mean(),
            "staleness/max": ages.max(),
            "reward/mean": np.mean([r["reward"] for r in batch]),
            "advantage/mean": np.mean([r["advantage"] for r in batch]),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (row["step"], name)
        for response, part in zip(batch, logs, strict=True):
            if set(response["versions"]) == {row["step"] - 1}:  # else its KV cache is partly of older versions
                assert np.abs(part).max() < 1e-4, "engine and learner disagree on a response of the newest version"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_last_checkpoint_gives_one_accuracy_to_the_run_to_rlsys_eval_and_to_plain_transformers(
    home: Path, run: Path
) -> None:
    checkpoint = f"runs/run/checkpoints/step-{STEPS:06d}"
    outcome = rlsys(home, "eval", checkpoint, "--json")
    assert outcome.code == 0, outcome.stderr
    told = json.loads(outcome.stdout)
    during = [
        row["eval/accuracy"] for row in rows(run / "metrics.jsonl") if row["step"] == STEPS and "eval/accuracy" in row
    ]
    plain = accuracy_by_transformers(home / checkpoint, run)
    assert told["prompts"] == SMALL["eval"]["max_prompts"]
    assert told["accuracy"] == plain == during[-1]
    assert plain > 0, "the model knows nothing: equality would mean nothing"
    said = [line for line in outcome.stderr.splitlines() if "NUMA binding" not in line]  # PyTorch's, from C++
    assert said == []
    assert outcome.left == []


def accuracy_by_transformers(checkpoint: Path, run: Path) -> float:
    """Greedy accuracy on the held-out questions with nothing of ours but the questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlsys.tasks import build_task

    config = load_config(run / "config.yaml")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    items = build_task(config.task, config.seed).eval_items()[: config.eval.max_prompts]
    right = 0
    for item in items:
        ids = tokenizer(item.text, return_tensors="pt").input_ids
        said = model.generate(ids, do_sample=False, max_new_tokens=config.rollout.max_new_tokens)[
            0, ids.shape[1] :
        ].tolist()
        right += said[-1] == tokenizer.eos_token_id and tokenizer.decode(said[:-1]) == item.answer
    return right / len(items)


# -- strict mode -------------------------------------------------------------------------------------------------------


def test_with_a_bound_of_zero_every_token_is_of_the_newest_version(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("strict")
    write_config(home, staleness={"max": 0}, learner={"steps": 4}, kl={"coef": 0.0, "reference": False})
    outcome = rlsys(home, "train", "run.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["version"] == 4
    recorded = responses(home / "runs" / "run")
    assert len(recorded) == 4 * GROUPS * SAMPLES
    for r in recorded:
        assert set(r["versions"]) == {r["step"] - 1}
        np.testing.assert_allclose(r["policy_logprobs"], r["behavior_logprobs"], rtol=0, atol=1e-3)
        assert "reference_logprobs" not in r
    assert [row["staleness/max"] for row in steps(home / "runs" / "run")] == [0] * 4
    assert outcome.left == []
