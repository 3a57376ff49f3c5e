"""A learner batch as a parquet file: one row per response, token quantities as lists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.records import BatchArrays, GroupScore, RolloutGroup


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
