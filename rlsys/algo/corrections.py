"""Corrections for off-policy data: what the ratio q_t = π_V/μ allows, decided before the step.

q never involves π_θ, so masks, weights and denominators are constants of the step: they can be computed
over the whole batch, sliced into micro-batches, and carry no gradient. The KL term is left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlsys.algo.batch import resolve_options
from rlsys.algo.importance import (
    bounded_exp,
    log_ratio,
    response_lengths,
    sequence_log_ratio,
)
from rlsys.errors import ConfigError

SEQUENCE_OBJECTIVES = frozenset({"is_sequence", "is_sequence_truncated", "gspo"})
"""Objectives with one term per response: they take one factor per response and no token mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A correction fixed during the step; tensors [N], without gradient.

    weight multiplies the term (a per-response factor is broadcast); keep is False where the term is
    dropped; denominator is what the objective's ratio divides by; truncated says where the cap acted.
    """

    weight: Tensor
    keep: Tensor
    denominator: Literal["behavior", "step_start"]
    truncated: Tensor

    def take(self, positions: Tensor | slice) -> "Correction":
        """Its part for a micro-batch. positions: indices [n], a mask [N] bool, or a slice."""
        return replace(
            self,
            weight=self.weight[positions],
            keep=self.keep[positions],
            truncated=self.truncated[positions],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """log q of a global batch, in the shapes the corrections need."""

    token: Tensor  # [N] log q_t, 0 on untrained tokens
    sequence: Tensor  # [G] Σ_t log q_t
    lengths: Tensor  # [G]
    loss_mask: Tensor
    response_index: Tensor
    per_response: bool

    def unchanged(self) -> Correction:
        return no_correction(self.token)


def compute_correction(
    name: str,
    *,
    step_start_logprobs: Tensor,
    behavior_logprobs: Tensor,
    loss_mask: Tensor,
    response_index: Tensor,
    responses: int,
    objective: str,
    proximal_logprobs: Tensor | None = None,
    **options: float,
) -> Correction:
    """The correction `name` of a *global* batch (`m2` is a property of the whole batch).

    Tensors [N] as in `TokenBatch`; options as in CORRECTION_OPTIONS. `proximal_logprobs` matters only to
    `tis` with `decoupled_ppo` (None: π_prox = π_V). Raises ConfigError on an unknown name or option, on a
    token mask for a sequence objective, and on any correction of `dpo`.
    """
    chosen = resolve_options("objective.correction", CORRECTION_OPTIONS, name, options)
    per_response = objective in SEQUENCE_OBJECTIVES
    if per_response and name in ("mask_token", "m2"):
        raise ConfigError(
            f"objective.correction={name!r} masks tokens, but objective.name={objective!r} has one term per "
            "response; allowed: none, tis, mask_sequence"
        )
    if objective == "dpo" and name != "none":
        raise ConfigError(f"objective.correction={name!r} does not apply to objective.name='dpo'; allowed: none")
    numerator = step_start_logprobs
    decoupled = name == "tis" and objective == "decoupled_ppo"
    if decoupled and proximal_logprobs is not None:
        numerator = proximal_logprobs
    token = log_ratio(numerator.detach(), behavior_logprobs.detach(), loss_mask)
    lag = Lag(
        token=token,
        sequence=sequence_log_ratio(token, response_index, responses),
        lengths=response_lengths(loss_mask, response_index, responses),
        loss_mask=loss_mask,
        response_index=response_index,
        per_response=per_response,
    )
    return truncate_decoupled(lag, **chosen) if decoupled else CORRECTIONS[name](lag, **chosen)


def no_correction(like: Tensor) -> Correction:
    """Weight 1, everything kept, ratios over μ, for tokens shaped `like` a log-prob, [N]."""
    nowhere = torch.zeros_like(like, dtype=torch.bool)
    return Correction(weight=torch.ones_like(like), keep=~nowhere, denominator="behavior", truncated=nowhere)


def none(lag: Lag) -> Correction:
    """No correction: weight 1, everything kept, ratios over μ."""
    return lag.unchanged()


def tis(lag: Lag, *, cap: float) -> Correction:
    """Truncated importance sampling: ratios over π_V, and the term times min(q_t, C); C = 2.

    A sequence objective gets one factor min(Π_t q_t, C) per response. The denominator moves to π_V because
    the lag would count twice otherwise.
    """
    log_weight = lag.sequence[lag.response_index] if lag.per_response else lag.token
    weight = bounded_exp(log_weight)
    return replace(
        lag.unchanged(),
        weight=weight.clamp(max=cap),
        denominator="step_start",
        truncated=(weight > cap) & lag.loss_mask,
    )


def truncate_decoupled(lag: Lag, *, cap: float) -> Correction:
    """`tis` for `decoupled_ppo`: its term carries p = π_prox/μ already; min(1, C/p) makes that min(p, C)."""
    weight = bounded_exp(lag.token)
    return replace(
        lag.unchanged(),
        weight=(cap / weight).clamp(max=1.0),
        truncated=(weight > cap) & lag.loss_mask,
    )


def mask_token(lag: Lag, *, low: float, high: float) -> Correction:
    """Keep the tokens with lo ≤ q_t ≤ hi (IcePop's band [0.5, 5])."""
    ratio = bounded_exp(lag.token)
    return replace(lag.unchanged(), keep=(ratio >= low) & (ratio <= high))


def mask_sequence(lag: Lag, *, low: float, high: float, cap: float) -> Correction:
    """Drop a response when exp(mean_t log q_t) leaves [lo, hi], (0.8, 1.25), or Π_t q_t > C, 8."""
    mean = bounded_exp(lag.sequence / lag.lengths.clamp(min=1))
    keep = (mean >= low) & (mean <= high) & (bounded_exp(lag.sequence) <= cap)
    return replace(lag.unchanged(), keep=keep[lag.response_index])


def m2(lag: Lag, *, tau: float) -> Correction:
    """Mask the largest (log q_t)² until the mean over the kept tokens is ≤ τ, 0.04 (M2PO, 2510.01161).

    Tokens tied with the first one masked are masked too, so that the result does not depend on order.
    """
    moment = lag.token.double().square()
    ordered = moment[lag.loss_mask].sort().values
    counts = torch.arange(1, len(ordered) + 1, device=ordered.device)
    kept = int((ordered.cumsum(0) / counts <= tau).sum())
    if kept == len(ordered):
        return lag.unchanged()
    return replace(lag.unchanged(), keep=(moment < ordered[kept]) | ~lag.loss_mask)


CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "none": none,
    "tis": tis,
    "mask_token": mask_token,
    "mask_sequence": mask_sequence,
    "m2": m2,
}

CORRECTION_OPTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "tis": {"cap": 2.0},
    "mask_token": {"low": 0.5, "high": 5.0},
    "mask_sequence": {"low": 0.8, "high": 1.25, "cap": 8.0},
    "m2": {"tau": 0.04},
}
"""Option names of each correction with their defaults."""
