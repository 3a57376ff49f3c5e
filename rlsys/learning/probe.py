"""Why the ratio is not 1: log π_θ − log μ of every token, split into what moved it.

    log π_θ − log μ  =  [log π_θ − log π_V]      drift within the step: mini-batches before this one
                      + [log π_V − log π_v]      lag: learner versions since v sampled the token
                      + [log π_v − log μ]        engine mismatch: other kernels, precision, an older KV cache

All but μ are the learner's numerics. The learner reports π_θ and π_V for every token; π_v is scored here, under
weights kept since version v was published. The mismatch is told apart again: in the first version span of a response
the engine computed everything under v, in later spans its KV cache is partly older (a mixed policy).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlsys.config.schema import Dtype
from rlsys.learning.packing import Sequences, pack
from rlsys.learning.policy import load_policy
from rlsys.records import BatchArrays, FloatArray, RolloutGroup
from rlsys.versions import PolicyVersion, VersionSpan

Metrics = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The parts of the log-ratio of N probed tokens, [N] each, nats; `later`: after the response's first span."""

    drift: FloatArray
    lag: FloatArray
    engine: FloatArray
    later: np.ndarray

    @property
    def total(self) -> FloatArray:
        """log π_θ − log μ."""
        return self.drift + self.lag + self.engine

    def metrics(self) -> Metrics:
        """By catalogue name. Each mean is over the tokens of its part: of first version spans, or of later ones."""
        parts = {
            "drift": self.drift,
            "lag": self.lag,
            "engine": self.engine[~self.later],
            "engine_later_spans": self.engine[self.later],
        }
        found: Metrics = {f"split/{part}/{name}": value for part, x in parts.items() for name, value in _means(x)}
        return {**found, "split/tokens": float(len(self.drift)), "split/later_tokens": float(self.later.sum())}


def _means(log_ratio: FloatArray) -> list[tuple[str, float | None]]:
    x = log_ratio.astype(np.float64)
    if not len(x):
        return [("mean", None), ("abs_mean", None), ("k3", None)]
    return [("mean", float(x.mean())), ("abs_mean", float(np.abs(x).mean())), ("k3", float((np.expm1(x) - x).mean()))]


class Probe:
    """The policy's architecture, and the weights of the versions whose tokens may still be trained."""

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Dtype,
        temperature: float,
        fraction: float,
        oldest: int,
        ahead: int = 0,
        seed: int = 0,
        row_tokens: int = 64,
        micro_batch_tokens: int = 8192,
        device: str = "cpu",
    ) -> None:
        """`fraction` of each batch's groups is scored; their tokens are at most `oldest` versions old.

        Batches may come `ahead` versions late.
        """
        self._policy = load_policy(path, dtype, device=device)
        self._policy.model.requires_grad_(False)
        self._temperature, self._fraction, self._seed = temperature, fraction, seed
        self._oldest, self._ahead = oldest, ahead
        self._row_tokens, self._micro_batch_tokens = row_tokens, micro_batch_tokens
        self._weights: dict[PolicyVersion, Mapping[str, Tensor]] = {}

    def keep(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        """Hold the parameters of a version, by Hugging Face name; those too old to be trained are let go."""
        self._weights[version] = tensors
        self._let_go(version - self._oldest - self._ahead - 1)

    def chosen(self, version: PolicyVersion, groups: int) -> list[int]:
        """Which of a batch's groups are probed: a draw that depends on seed and version alone, at least one."""
        size = max(1, round(self._fraction * groups))
        return sorted(np.random.default_rng((self._seed, version)).choice(groups, size, replace=False).tolist())

    def metrics(self, version: PolicyVersion, groups: Sequence[RolloutGroup], arrays: BatchArrays) -> Metrics:
        """`split/…` of the batch trained at `version`, from some of its groups. `arrays`: of the whole batch."""
        started = time.perf_counter()
        self._let_go(version - self._oldest)
        found = self.split(version, groups, arrays, self.chosen(version, len(groups))).metrics()
        return {**found, "split/seconds": time.perf_counter() - started}

    def split(
        self, version: PolicyVersion, groups: Sequence[RolloutGroup], arrays: BatchArrays, chosen: Sequence[int]
    ) -> Split:
        """The parts for the trained tokens of the `chosen` groups, in the batch's order.

        Raises ValueError when a token's version is not held.
        """
        firsts = np.cumsum([0, *(len(group.rollouts) for group in groups)])
        responses = np.concatenate([np.arange(firsts[i], firsts[i + 1]) for i in chosen])
        rollouts = [rollout for i in chosen for rollout in groups[i].rollouts]
        index = np.concatenate([np.arange(arrays.offsets[r], arrays.offsets[r + 1]) for r in responses])
        versions = np.concatenate([rollout.token_versions() for rollout in rollouts])
        policy, start = arrays.policy_logprobs[index], arrays.step_start_logprobs[index]
        behavior = np.concatenate([rollout.behavior_logprobs for rollout in rollouts])
        sampled = self._sampled([groups[i] for i in chosen], versions, version, start)
        first = np.concatenate([np.full(len(r.response_ids), _first_version(r.version_spans)) for r in rollouts])
        mask = np.concatenate([rollout.loss_mask for rollout in rollouts])
        return Split(
            drift=(policy - start)[mask],
            lag=(start - sampled)[mask],
            engine=(sampled - behavior)[mask],
            later=(versions != first)[mask],
        )

    @torch.no_grad()
    def _sampled(
        self, groups: Sequence[RolloutGroup], versions: np.ndarray, version: PolicyVersion, start: FloatArray
    ) -> FloatArray:
        """log π_v of every token under the version v that sampled it, [N]; for v = V the learner has said it."""
        result = start.copy()
        sequences = Sequences(
            prompts=[group.prompt.token_ids for group in groups],
            responses=[rollout.response_ids for group in groups for rollout in group.rollouts],
            prompt_of=[i for i, group in enumerate(groups) for _ in group.rollouts],
        )
        owner = np.repeat(np.arange(len(sequences.responses)), np.diff(sequences.offsets()))
        for old in np.unique(versions[versions != version]).tolist():
            self._use(old)
            packing = pack(
                sequences,
                row_tokens=self._row_tokens,
                micro_batch_tokens=self._micro_batch_tokens,
                members=np.unique(owner[versions == old]),
            )
            for micro in packing.micro_batches:
                found = self._policy.token_logprobs(micro.to(self._policy.device), self._temperature).logprobs
                place = micro.token_index.cpu().numpy()
                here = versions[place] == old
                result[place[here]] = found.cpu().numpy()[here]
        return result

    def _let_go(self, before: PolicyVersion) -> None:
        for old in [v for v in self._weights if v < before]:
            del self._weights[old]

    def _use(self, version: PolicyVersion) -> None:
        if version not in self._weights:
            raise ValueError(f"version {version} is not held; held are {sorted(self._weights)}")
        held = self._weights[version]
        for name, tensor in self._policy.named_tensors():
            tensor.copy_(held[name])


def _first_version(spans: Sequence[VersionSpan]) -> PolicyVersion:
    return spans[0].version if spans else -1
