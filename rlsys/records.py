"""What travels between the parts: a prompt, its sampled responses, their scores, a batch, a step.

All are frozen and keyword-only. Token data are NumPy arrays so that Ray moves them without copies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rlsys.versions import PolicyVersion, VersionSpan

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of a task. `index` is its place in the epoch; (epoch, index) names it for ever.

    >>> Prompt(epoch=0, index=4, text="12+7=", token_ids=(3, 4, 12, 9, 13), answer="19").index
    4
    """

    epoch: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    answer: str
    info: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response of T tokens, with where every token came from.

    `behavior_logprobs` [T] are log μ as the engine sampled, after temperature; `version_spans` cover
    0..T without gaps; `loss_mask` [T] is True for tokens the policy sampled.
    """

    sample: int
    response_ids: IntArray
    behavior_logprobs: FloatArray
    loss_mask: BoolArray
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str

    def token_versions(self) -> IntArray:
        """Policy version of every token, [T]."""
        versions = np.empty(len(self.response_ids), dtype=np.int32)
        for span in self.version_spans:
            versions[span.start : span.stop] = span.version
        return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the controller needs to know of a finished group; the payload itself stays in the object store."""

    slot: int
    attempt: int
    worker: str
    tokens: int
    oldest_version: PolicyVersion
    newest_version: PolicyVersion
    started_at: float
    finished_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All responses to one prompt from one attempt. Times are wall-clock seconds since the epoch."""

    slot: int
    attempt: int
    worker: str
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    started_at: float
    finished_at: float

    def __reduce__(self) -> tuple[Callable[..., "RolloutGroup"], tuple[object, ...]]:
        """Pickled as columns, five times as fast: a tiny model finishes hundreds of groups a second."""
        rollouts = self.rollouts
        columns = (
            tuple((r.sample, len(r.response_ids), r.finish_reason, r.text) for r in rollouts),
            tuple(tuple((s.start, s.stop, s.version) for s in r.version_spans) for r in rollouts),
            np.concatenate([r.response_ids for r in rollouts]).astype(np.int32, copy=False).tobytes(),
            np.concatenate([r.behavior_logprobs for r in rollouts]).astype(np.float32, copy=False).tobytes(),
            np.concatenate([r.loss_mask for r in rollouts]).astype(np.bool_, copy=False).tobytes(),
        )
        return _from_columns, (
            self.slot,
            self.attempt,
            self.worker,
            self.prompt,
            self.started_at,
            self.finished_at,
            columns,
        )

    def summary(self) -> GroupSummary:
        """What the controller needs to know of this group."""
        versions = [span.version for rollout in self.rollouts for span in rollout.version_spans]
        return GroupSummary(
            slot=self.slot,
            attempt=self.attempt,
            worker=self.worker,
            tokens=sum(len(rollout.response_ids) for rollout in self.rollouts),
            oldest_version=min(versions),
            newest_version=max(versions),
            started_at=self.started_at,
            finished_at=self.finished_at,
        )


def _from_columns(
    slot: int, attempt: int, worker: str, prompt: Prompt, started_at: float, finished_at: float, columns: Any
) -> RolloutGroup:
    heads, spans, response_ids, behavior_logprobs, loss_mask = columns
    ids, logprobs = np.frombuffer(response_ids, np.int32), np.frombuffer(behavior_logprobs, np.float32)
    mask = np.frombuffer(loss_mask, np.bool_)
    rollouts, start = [], 0
    for (sample, length, finish_reason, text), of_rollout in zip(heads, spans, strict=True):
        tokens = slice(start, start := start + length)
        rollouts.append(
            Rollout(
                sample=sample,
                response_ids=ids[tokens],
                behavior_logprobs=logprobs[tokens],
                loss_mask=mask[tokens],
                version_spans=tuple(VersionSpan(start=a, stop=b, version=v) for a, b, v in of_rollout),
                finish_reason=finish_reason,
                text=text,
            )
        )
    return RolloutGroup(
        slot=slot,
        attempt=attempt,
        worker=worker,
        prompt=prompt,
        rollouts=tuple(rollouts),
        started_at=started_at,
        finished_at=finished_at,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """One reward per response of a group, [n], and when they were known."""

    slot: int
    attempt: int
    rewards: FloatArray
    scored_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with the rewards of its responses: the unit the learner consumes."""

    group: RolloutGroup
    score: GroupScore


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStep:
    """What one optimizer step did. `version` is the learner version *after* it.

    A step refused by the non-finite guard has `applied=False` and leaves `version` unchanged.
    """

    version: PolicyVersion
    applied: bool
    metrics: Mapping[str, float | None]
    trained_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a reward function sees of a sampled response; `finished` is False when it hit the length limit."""

    text: str
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchArrays:
    """What a learner step knew of every response token, for the records; arrays in the batch's flat order.

    Tokens of response i (groups in order, rollouts in order) are `offsets[i]:offsets[i + 1]`: the layout of an
    Arrow list column. `policy_logprobs` are log π_θ when the token's gradient was taken, `step_start_logprobs`
    log π_V, NaN where no pass came to; `masked` is what the correction dropped. `advantages` [G].
    """

    offsets: npt.NDArray[np.int64]
    policy_logprobs: FloatArray
    step_start_logprobs: FloatArray
    reference_logprobs: FloatArray | None
    clipped: BoolArray
    masked: BoolArray
    advantages: FloatArray
