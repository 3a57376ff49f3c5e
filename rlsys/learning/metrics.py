"""Numbers of one learner step, by their catalogue names. None where there is nothing to average."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlsys.algo.advantages import PASSED, AdvantageOutput
from rlsys.algo.diagnostics import flag_fractions, weight_diagnostics
from rlsys.algo.importance import segment_sum
from rlsys.algo.staleness import Staleness
from rlsys.learning.batch import FlatBatch
from rlsys.learning.ranks import Ranks

Metrics = dict[str, float | None]

_NUMBERS = ("policy_logprobs", "step_start_logprobs", "entropy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenResults:
    """What the forward passes of a step left for every token, [N].

    `policy_logprobs` and `entropy` as of the token's gradient; `step_start_logprobs` under π_V. `reached`: a pass
    came to the token, which it does not after a mini-batch that is refused.
    """

    policy_logprobs: Tensor
    step_start_logprobs: Tensor
    entropy: Tensor
    clipped: Tensor
    outside: Tensor
    masked: Tensor
    truncated: Tensor
    clamped: Tensor
    reached: Tensor

    @classmethod
    def empty(cls, tokens: int, device: torch.device) -> "TokenResults":
        """Zeros to be filled micro-batch by micro-batch."""
        flags = ("clipped", "outside", "masked", "truncated", "clamped", "reached")
        tensors = {name: torch.zeros(tokens, device=device) for name in _NUMBERS}
        tensors |= {name: torch.zeros(tokens, dtype=torch.bool, device=device) for name in flags}
        return cls(**tensors)

    def note(self, index: Tensor, **values: Tensor) -> None:
        """Enter what a micro-batch showed of the tokens `index`, [n] each."""
        for name, value in values.items():
            getattr(self, name)[index] = value
        self.reached[index] = True

    def complete_(self, ranks: Ranks) -> None:
        """Enter what the other ranks have noted: a token is one rank's, and 0 on the others. NaN where none came to."""
        if ranks.size > 1:
            columns = [getattr(self, f.name) for f in fields(self)]
            table = torch.stack([column.float() for column in columns])
            ranks.sum_(table)
            for column, values in zip(columns, table, strict=True):
                column.copy_(values)
        for name in _NUMBERS:
            getattr(self, name).masked_fill_(~self.reached, math.nan)

    def cpu(self) -> "TokenResults":
        """The same results on the CPU."""
        return TokenResults(**{f.name: getattr(self, f.name).cpu() for f in fields(self)})


def step_metrics(
    batch: FlatBatch,
    results: TokenResults,
    staleness: Staleness,
    advantage: AdvantageOutput,
    *,
    bound: int,
    cap: float | None,
) -> Metrics:
    """All but the optimizer's own numbers. bound: of the staleness; cap: where the correction truncates weights."""
    mask, advantages = batch.loss_mask, advantage.advantages
    lengths = segment_sum(mask.long(), batch.response_index, batch.responses)
    trained = lengths > 0
    return {
        **reward_metrics(batch.rewards),
        **staleness_metrics(staleness, mask, bound),
        **weight_diagnostics(
            results.policy_logprobs - batch.behavior_logprobs,
            mask,
            batch.response_index,
            batch.responses,
            staleness.total,
            cap=cap,
        ),
        **flag_fractions(
            {
                "clip_fraction": results.clipped,
                "outside_fraction": results.outside,
                "masked_fraction": results.masked,
                "truncated_fraction": results.truncated,
            },
            advantages=advantages[batch.response_index],
            loss_mask=mask,
            staleness=staleness.total,
        ),
        "importance/clamped_fraction": _mean(results.clamped[mask]),
        **reference_metrics(batch, results.policy_logprobs, trained),
        "advantage/mean": _mean(advantages[trained]),
        "advantage/std": _std(advantages[trained]),
        "advantage/zero_variance_fraction": advantage.zero_variance_groups / max(advantage.groups, 1),
        "policy/entropy": _mean(results.entropy[mask]),
        "policy/response_tokens": _mean(lengths),
    }


def reward_metrics(rewards: Tensor) -> Metrics:
    """Mean, standard deviation (ddof 1) and pass rate (share of rewards of 1 or more) over responses."""
    return {
        "reward/mean": _mean(rewards),
        "reward/std": _std(rewards),
        "reward/pass_rate": _mean((rewards >= PASSED).double()),
    }


def staleness_metrics(staleness: Staleness, mask: Tensor, bound: int) -> Metrics:
    """Over trained tokens, in versions; p95 is the smallest age that covers 95% of them."""
    ages = staleness.total[mask]
    return {
        "staleness/mean": _mean(ages),
        "staleness/p95": float(ages.sort().values[math.ceil(0.95 * len(ages)) - 1]) if len(ages) else None,
        "staleness/max": float(ages.max()) if len(ages) else None,
        "staleness/violations": float((ages > bound).sum()),
        "staleness/in_flight/mean": _mean(staleness.in_flight[mask]),
        "staleness/in_queue/mean": _mean(staleness.in_queue[mask]),
    }


def reference_metrics(batch: FlatBatch, policy_logprobs: Tensor, trained: Tensor) -> Metrics:
    """KL(π_θ‖π_ref) estimates: token means of k1 and k3, and the mean over responses of the sum of k1. Nats."""
    if batch.reference_logprobs is None:
        return dict.fromkeys(("kl/reference_k1", "kl/reference_k3", "kl/sequence_mean"))
    k1 = (policy_logprobs - batch.reference_logprobs).double().masked_fill(~batch.loss_mask, 0.0)
    k3 = (-k1).expm1() + k1
    sequences = segment_sum(k1, batch.response_index, batch.responses)
    return {
        "kl/reference_k1": _mean(k1[batch.loss_mask]),
        "kl/reference_k3": _mean(k3[batch.loss_mask]),
        "kl/sequence_mean": _mean(sequences[trained]),
    }


def finite(metrics: Mapping[str, float | None]) -> Metrics:
    """NaN and ±inf, which JSON cannot say, become None: the step that met them has `applied=False`."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _std(values: Tensor) -> float | None:
    return float(torch.std(values.double())) if len(values) > 1 else None
