"""A learner batch as a parquet file: one row per response, token quantities as lists."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.records import BatchArrays, GroupScore, Prompt, Rollout, RolloutGroup, ScoredGroup
from rlsys.versions import VersionSpan


def write_rollouts(
    path: Path, version: int, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore], arrays: BatchArrays
) -> Path:
    """Write the batch that made `version`, atomically. `groups`, `scores` and `arrays` are in one order."""
    rollouts = [(group, rollout) for group in groups for rollout in group.rollouts]
    offsets = pa.array(arrays.offsets, pa.int32())

    def tokens(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    def flat(name: str) -> Any:
        return np.concatenate([getattr(rollout, name) for _, rollout in rollouts])

    columns: dict[str, pa.Array | list[Any]] = {
        "step": [version] * len(rollouts),
        "slot": [group.slot for group, _ in rollouts],
        "attempt": [group.attempt for group, _ in rollouts],
        "worker": [group.worker for group, _ in rollouts],
        "epoch": [group.prompt.epoch for group, _ in rollouts],
        "prompt": [group.prompt.index for group, _ in rollouts],
        "sample": [rollout.sample for _, rollout in rollouts],
        "prompt_text": [group.prompt.text for group, _ in rollouts],
        "prompt_ids": [list(group.prompt.token_ids) for group, _ in rollouts],
        "response_text": [rollout.text for _, rollout in rollouts],
        "finish_reason": [rollout.finish_reason for _, rollout in rollouts],
        "reward": np.concatenate([score.rewards for score in scores]),
        "advantage": arrays.advantages,
        "started_at": [group.started_at for group, _ in rollouts],
        "finished_at": [group.finished_at for group, _ in rollouts],
        "scored_at": [score.scored_at for group, score in zip(groups, scores, strict=True) for _ in group.rollouts],
        "response_ids": tokens(flat("response_ids")),
        "loss_mask": tokens(flat("loss_mask")),
        "versions": tokens(np.concatenate([rollout.token_versions() for _, rollout in rollouts])),
        "behavior_logprobs": tokens(flat("behavior_logprobs")),
        "step_start_logprobs": tokens(arrays.step_start_logprobs),
        "policy_logprobs": tokens(arrays.policy_logprobs),
        "clipped": tokens(arrays.clipped),
        "masked": tokens(arrays.masked),
    }
    if arrays.reference_logprobs is not None:
        columns["reference_logprobs"] = tokens(arrays.reference_logprobs)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)
    return path


def read_rollouts(path: Path) -> list[ScoredGroup]:
    """The batch that `write_rollouts` wrote, as the learner got it; the prompts without their answers."""
    table = pq.read_table(path)
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault((row["slot"], row["attempt"]), []).append(row)
    return [_group(rows) for rows in groups.values()]


def _group(rows: Sequence[dict[str, Any]]) -> ScoredGroup:
    first = rows[0]
    prompt = Prompt(
        epoch=first["epoch"],
        index=first["prompt"],
        text=first["prompt_text"],
        token_ids=tuple(first["prompt_ids"]),
        answer="",
    )
    rollouts = tuple(
        Rollout(
            sample=row["sample"],
            response_ids=np.array(row["response_ids"], dtype=np.int32),
            behavior_logprobs=np.array(row["behavior_logprobs"], dtype=np.float32),
            loss_mask=np.array(row["loss_mask"], dtype=np.bool_),
            version_spans=_spans(row["versions"]),
            finish_reason=row["finish_reason"],
            text=row["response_text"],
        )
        for row in rows
    )
    group = RolloutGroup(
        slot=first["slot"],
        attempt=first["attempt"],
        worker=first["worker"],
        prompt=prompt,
        rollouts=rollouts,
        started_at=first["started_at"],
        finished_at=first["finished_at"],
    )
    rewards = np.array([row["reward"] for row in rows], dtype=np.float32)
    score = GroupScore(slot=group.slot, attempt=group.attempt, rewards=rewards, scored_at=first["scored_at"])
    return ScoredGroup(group=group, score=score)


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    changes = [i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
    bounds = [0, *changes, len(versions)] if versions else []
    return tuple(VersionSpan(start=a, stop=b, version=versions[a]) for a, b in pairwise(bounds))
