"""Scored groups as flat arrays: the tokens of all G responses concatenated, [N]; and back.

`RolloutGroup`s are what travels; the mathematics wants one tensor per quantity. The order is that of the
groups and, within one, of its rollouts; `offsets` [G + 1] says where each response's tokens lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsys.algo.staleness import Staleness, token_staleness
from rlsys.errors import StalenessViolation
from rlsys.learning.packing import Int64Array, Sequences
from rlsys.records import FloatArray, Rollout, ScoredGroup
from rlsys.versions import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """One learner batch. [N]: one value per response token; [G]: one per response.

    `versions` sampled each token; `finished_versions` is the newest version in the token's response, that is
    the one serving when the response ended. `rewards` are raw, without a KL term.
    """

    sequences: Sequences
    offsets: Int64Array
    response_index: Tensor
    behavior_logprobs: Tensor
    loss_mask: Tensor
    versions: Tensor
    finished_versions: Tensor
    reference_logprobs: Tensor | None
    rewards: Tensor
    group_index: Tensor

    @property
    def responses(self) -> int:
        """G."""
        return len(self.rewards)

    @property
    def trained_tokens(self) -> int:
        """Tokens with loss_mask True."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device) -> "FlatBatch":
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def staleness(self, learner_version: PolicyVersion, bound: int) -> Staleness:
        """Age of every token, [N]. Raises StalenessViolation when a trained one is older than `bound` versions."""
        ages = token_staleness(self.versions, finished_version=self.finished_versions, learner_version=learner_version)
        too_old = (ages.total > bound) & self.loss_mask
        if bool(too_old.any()):
            token = int(ages.total.masked_fill(~self.loss_mask, -1).argmax())
            raise StalenessViolation(
                f"{int(too_old.sum())} trained tokens are older than staleness.max={bound}: the oldest, in response "
                f"{int(self.response_index[token])} of the batch, was sampled by version {int(self.versions[token])} "
                f"and reached learner version {learner_version}"
            )
        return ages


def flatten(groups: Sequence[ScoredGroup], reference_logprobs: Sequence[FloatArray] | None) -> FlatBatch:
    """Concatenate groups. `reference_logprobs` [T] per response, in order. Raises ValueError on lengths that differ."""
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    for scored in groups:
        if len(scored.score.rewards) != len(scored.group.rollouts):
            raise ValueError(
                f"slot {scored.group.slot}: {len(scored.score.rewards)} rewards for "
                f"{len(scored.group.rollouts)} responses"
            )
    sizes = [len(scored.group.rollouts) for scored in groups]
    prompt_of = np.repeat(np.arange(len(groups)), sizes)
    sequences = Sequences(
        prompts=[scored.group.prompt.token_ids for scored in groups],
        responses=[rollout.response_ids for rollout in rollouts],
        prompt_of=prompt_of.tolist(),
    )
    offsets = sequences.offsets()
    lengths = np.diff(offsets)
    spans = [_spans(rollout) for rollout in rollouts]
    return FlatBatch(
        sequences=sequences,
        offsets=offsets,
        response_index=torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths)),
        behavior_logprobs=_flat([r.behavior_logprobs for r in rollouts], lengths, "behavior_logprobs", np.float32),
        loss_mask=_flat([r.loss_mask for r in rollouts], lengths, "loss_mask", np.bool_),
        versions=_flat([s.repeat(n) for s, n in spans], lengths, "version_spans", np.int64),
        finished_versions=torch.from_numpy(np.repeat([s.max(initial=0) for s, _ in spans], lengths).astype(np.int64)),
        reference_logprobs=None
        if reference_logprobs is None
        else _flat(reference_logprobs, lengths, "reference_logprobs", np.float32),
        rewards=torch.from_numpy(_concatenate([scored.score.rewards for scored in groups], np.float32)),
        group_index=torch.from_numpy(prompt_of),
    )


def _spans(rollout: Rollout) -> tuple[Int64Array, Int64Array]:
    """Versions and lengths of a response's spans. Raises ValueError unless they tile it in order."""
    reached = 0
    for span in rollout.version_spans:
        if span.start != reached or span.stop < span.start:
            raise ValueError(f"version_spans: {span} does not continue at token {reached}")
        reached = span.stop
    table = np.asarray([(s.version, s.stop - s.start) for s in rollout.version_spans], dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _flat(parts: Sequence[np.ndarray], lengths: Int64Array, name: str, dtype: type) -> Tensor:
    found = [len(part) for part in parts]
    if found != lengths.tolist():
        wrong = next((i for i, (a, b) in enumerate(zip(found, lengths, strict=False)) if a != b), len(found))
        raise ValueError(f"{name}: lengths differ from response_ids, first at response {wrong} of {len(lengths)}")
    return torch.from_numpy(_concatenate(parts, dtype))


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if len(parts) else np.zeros(0, dtype)
