"""Run directories as a run leaves them, made up: a few steps with numbers that can be checked by hand."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config import dump_config, parse_config
from rlsys.observability.catalogue import PARTS
from rlsys.observability.rollouts import write_rollouts
from rlsys.records import BatchArrays, GroupScore, Prompt, Rollout, RolloutGroup
from rlsys.scheduling.ledger import Closed, End
from rlsys.versions import VersionSpan

STARTED = 1_700_000_000.0
CHARACTERS = "<>0123456789+="  # an id is a place in it; 1 ends a response
STEP_S = 0.5

ALARM: dict[str, Any] = {
    "name": "ess_low",
    "state": "raised",
    "severity": "warning",
    "step": 4,
    "value": 0.21,
    "limit": 0.3,
    "cause": "the policy moves faster than the data arrives",
    "advice": "lower staleness.max or learner.lr",
}


def make_run(
    root: Path, steps: int = 6, *, planned: int | None = None, rollouts: bool = True, trace: bool = True
) -> Path:
    """A run of two workers that made `steps` of its `planned` steps; the same ones always give the same files."""
    planned = steps if planned is None else planned
    root.mkdir(parents=True)
    records = {"rollouts_every": 1 if rollouts else 0}
    config = {"name": root.name, "task": {"name": "arithmetic"}, "learner": {"steps": planned}, "records": records}
    (root / "config.yaml").write_text(dump_config(parse_config(config)))
    (root / "events.jsonl").touch()
    append(root / "metrics.jsonl", evaluation(0))
    if trace:
        (root / "trace.json").write_text("[\n")
        append_events(root / "trace.json", *names())
    for step in range(1, steps + 1):
        add_step(root, step, rollouts=rollouts, trace=trace)
    if steps == planned:
        append(root / "metrics.jsonl", evaluation(steps))
        if trace:
            with (root / "trace.json").open("a") as file:
                file.write(json.dumps(span(4, "evaluate", steps, 0.4)) + "\n]\n")
        (root / "summary.png").write_bytes(b"")
    return root


def add_step(root: Path, step: int, *, rollouts: bool = True, trace: bool = True) -> None:
    """What one learner step adds to every file."""
    if rollouts:
        add_rollouts(root, step)
    for slot in range(2):
        end = End.REJECTED_STALE if (step, slot) == (3, 1) else End.TRAINED
        closed = Closed(
            slot=2 * step + slot, epoch=0, prompt=slot, end=end, attempts=1, admitted_version=step - 1, version=step
        )
        append(root / "ledger.jsonl", asdict(closed))
    if trace:
        append_events(root / "trace.json", *events(step))
    append(root / "metrics.jsonl", metrics(step))


def metrics(step: int) -> dict[str, Any]:
    """A learner step's row."""
    split = {f"split/{part}/abs_mean": 0.01 * i for i, part in enumerate(("drift", "lag", "engine"), 1)}
    ess = {f"importance/ess_sequence/by_staleness/{b}": 0.99 - 0.1 * i for i, b in enumerate(PARTS["by_staleness"])}
    return {
        "step": step,
        "time": STARTED + STEP_S * step,
        "reward/mean": min(1.0, 0.1 * step),
        "reward/pass_rate": min(1.0, 0.1 * step),
        "staleness/mean": 1.0,
        "staleness/p95": 2.0,
        "staleness/max": 2.0,
        "staleness/bound": 4.0,
        "staleness/violations": 0.0,
        "staleness/in_flight/mean": 0.25,
        "staleness/in_queue/mean": 0.75,
        "importance/ess_token": 0.98,
        "importance/ess_sequence": 0.9,
        "importance/k3": 0.001,
        "importance/clip_fraction": 0.02,
        "importance/linearization_gap": None,
        "kl/reference_k3": 0.01 * step,
        "throughput/generated_tokens_per_s": 1000.0,
        "throughput/trained_tokens_per_s": 1500.0,
        "ledger/waiting": 1.0,
        "ledger/in_flight": 3.0,
        "ledger/finished": 2.0,
        "ledger/learning": 0.0,
        "ledger/lost": 0.0,
        "workers/rollout/desired": 2.0,
        "workers/rollout/ready": 2.0,
        "workers/rollout/restarts": 0.0,
        "workers/reward/desired": 1.0,
        "workers/reward/ready": 1.0,
        "workers/reward/restarts": 0.0,
        "weight_sync/serving_lag_max": 1.0,
        **ess,
        **split,
    }


def evaluation(step: int) -> dict[str, Any]:
    """An evaluation's row."""
    return {"step": step, "time": STARTED + STEP_S * step + 0.1, "eval/accuracy": min(1.0, 0.25 + 0.05 * step)}


def add_rollouts(root: Path, step: int) -> None:
    """Two groups of two responses, `12` with its end token: the first token one version older than the others.

    Worker 0 sampled with version step-1, worker 1 with step-2, where there is such a version. log π - log μ is
    0.1 for the first token, -0.1 for the second, 0 for the third.
    """
    groups = []
    for slot in range(2):
        newest = max(0, step - 1 - slot)
        oldest = max(0, newest - 1)
        spans = (VersionSpan(start=0, stop=1, version=oldest), VersionSpan(start=1, stop=3, version=newest))
        answers = tuple(
            Rollout(
                sample=sample,
                response_ids=np.array([CHARACTERS.index("1"), CHARACTERS.index("2"), 1], dtype=np.int32),
                behavior_logprobs=np.array([-0.5, -0.25, -0.125], dtype=np.float32),
                loss_mask=np.array([True, True, True]),
                version_spans=spans,
                finish_reason="stop",
                text="12",
            )
            for sample in range(2)
        )
        at = STARTED + STEP_S * step
        question = Prompt(epoch=0, index=slot, text="5+7=", token_ids=(7, 12, 9, 13), answer="")
        groups.append(
            RolloutGroup(
                slot=2 * step + slot,
                attempt=1,
                worker=f"rollout-{slot}",
                prompt=question,
                rollouts=answers,
                started_at=at - 0.4,
                finished_at=at - 0.2,
            )
        )
    scores = [
        GroupScore(slot=g.slot, attempt=1, rewards=np.array([1.0, 0.0], dtype=np.float32), scored_at=g.finished_at)
        for g in groups
    ]
    tokens, behavior = 12, np.tile(np.array([-0.5, -0.25, -0.125], dtype=np.float32), 4)
    moved = behavior + np.tile(np.array([0.1, -0.1, 0.0], dtype=np.float32), 4)
    arrays = BatchArrays(
        offsets=np.arange(0, tokens + 1, 3, dtype=np.int64),
        policy_logprobs=moved,
        step_start_logprobs=moved,
        reference_logprobs=behavior,
        clipped=np.arange(tokens) == 1,
        masked=np.arange(tokens) == 4,
        advantages=np.array([1.0, -1.0, 1.0, -1.0], dtype=np.float32),
    )
    write_rollouts(root / "rollouts" / f"step-{step:06d}.parquet", step, groups, scores, arrays)


PROCESSES = ("rollout-0", "rollout-1", "reward-0", "learner", "controller")


def names() -> Iterator[dict[str, Any]]:
    """The trace's process names; a process id is a place in PROCESSES."""
    for pid, name in enumerate(PROCESSES):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}


def span(pid: int, name: str, step: int, length: float, start: float = 0.0, **args: Any) -> dict[str, Any]:
    """`length` seconds of a process, `start` seconds into a step."""
    at = round((STARTED + STEP_S * (step - 1) + start) * 1e6)
    return {
        "ph": "X",
        "name": name,
        "pid": pid,
        "tid": int(name == "fetch"),
        "ts": at,
        "dur": length * 1e6,
        "args": args,
    }


def events(step: int) -> Iterator[dict[str, Any]]:
    """A step's half second: sampling 0.3 s of it and paused 0.05 s, learning 0.2 s and publishing 0.05 s."""
    for worker in range(2):
        yield span(worker, "generate", step, 0.3, tokens=6)
        yield span(worker, "pause", step, 0.05, 0.35, version=max(0, step - 1 - worker))
    yield span(2, "score", step, 0.1, 0.3)
    yield span(3, "step", step, 0.2, 0.2, version=step - 1)
    yield span(3, "publish", step, 0.05, 0.4, version=step)


def append(path: Path, row: dict[str, Any]) -> None:
    """One line of a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def append_events(path: Path, *rows: dict[str, Any]) -> None:
    """Lines of a trace that goes on."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + ",\n" for row in rows)


def raise_alarm(root: Path, **changes: Any) -> None:
    """Append an alarm's note to a run."""
    alarm = {**ALARM, **changes}
    message = f"{alarm['name']}: {alarm['value']} (limit {alarm['limit']})"
    append(root / "events.jsonl", {"time": STARTED + 2, "kind": "alarm", "message": message, "alarm": alarm})
