"""What a loss is given and what it returns, and the reductions from tokens to a scalar.

A reduction is a *weight per token* whose normaliser belongs to the global batch. That is why losses and
gradients of micro-batches and data-parallel ranks simply add up to those of the whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlsys.algo.importance import response_lengths
from rlsys.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The tokens of `responses` whole responses, concatenated; all tensors [N]. Log-probs in nats.

    Only `policy_logprobs` carries a gradient. When a batch is trained in one update,
    `step_start_logprobs` is `policy_logprobs.detach()`. A per-response advantage is broadcast.

    Raises ValueError when a tensor is not [N].
    """

    policy_logprobs: Tensor
    behavior_logprobs: Tensor
    step_start_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    response_index: Tensor
    responses: int
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        """Asserts the shapes at the door."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.shape != self.loss_mask.shape[:1]:
                raise ValueError(f"{field.name}: expected [N] like loss_mask, got {tuple(value.shape)}")

    def lengths(self) -> Tensor:
        """|y_i|, the trained tokens of each response, [G] int64."""
        return response_lengths(self.loss_mask, self.response_index, self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTotals:
    """Normalisers of the *global* batch: over all micro-batches and all data-parallel ranks.

    `tokens` counts trained tokens, `responses` the responses with at least one, and `max_tokens` is the
    constant L of the `constant` reduction (the longest response allowed). What a correction masks counts.
    """

    tokens: int
    responses: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss that adds up over micro-batches, and metrics that do too.

    loss: scalar. metrics: each a *sum* over the tokens (or responses, or pairs) given; divide by the
    batch's totals after adding. clipped: [N] bool, the clipped branch acts. outside: [N] bool, the ratio
    lies beyond the bounds (whether or not the clip acts). clamped: [N] bool, the ±20 clamp acts on the ratio,
    or on what else the loss takes the exponential of.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    clipped: Tensor
    outside: Tensor
    clamped: Tensor


def trained_only(tokens: TokenBatch) -> TokenBatch:
    """The same batch with 0 on every untrained token and gradient through log π_θ only.

    After this, whatever padding holds (0, −inf, NaN) can reach neither loss nor gradient.
    """

    def fixed(values: Tensor) -> Tensor:
        return values.detach().masked_fill(~tokens.loss_mask, 0.0)

    return replace(
        tokens,
        policy_logprobs=tokens.policy_logprobs.masked_fill(~tokens.loss_mask, 0.0),
        behavior_logprobs=fixed(tokens.behavior_logprobs),
        step_start_logprobs=fixed(tokens.step_start_logprobs),
        advantages=fixed(tokens.advantages),
        proximal_logprobs=None if tokens.proximal_logprobs is None else fixed(tokens.proximal_logprobs),
        reference_logprobs=None if tokens.reference_logprobs is None else fixed(tokens.reference_logprobs),
    )


def token_mean(lengths: Tensor, totals: BatchTotals) -> Tensor:
    """1/N: Σ_i Σ_t / N (DAPO). Expected gradient ∇E[r]/E|y| only for large batches: a ratio of means."""
    return torch.full_like(lengths, 1.0 / max(totals.tokens, 1), dtype=torch.float64)


def sequence_mean(lengths: Tensor, totals: BatchTotals) -> Tensor:
    """1/(G|y_i|): (1/G) Σ_i (1/|y_i|) Σ_t (GRPO). Not parallel to ∇E[r]: short responses weigh more."""
    return 1.0 / (lengths.clamp(min=1).double() * max(totals.responses, 1))


def constant(lengths: Tensor, totals: BatchTotals) -> Tensor:
    """1/(G·L): (1/G) Σ_i Σ_t / L (Dr.GRPO, 2503.20783). Parallel to ∇E[r] at every batch size."""
    return torch.full_like(lengths, 1.0 / (max(totals.responses, 1) * totals.max_tokens), dtype=torch.float64)


Reduction = Callable[[Tensor, BatchTotals], Tensor]
"""Trained lengths [G] and global totals -> the weight of each of a response's tokens, [G]."""

REDUCTIONS: dict[str, Reduction] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}


def reduce_tokens(values: Tensor, tokens: TokenBatch, totals: BatchTotals, reduce: str) -> Tensor:
    """Σ_t weight_t · value_t over trained tokens. values: [N]. Returns a scalar; ConfigError on a name."""
    if reduce not in REDUCTIONS:
        raise ConfigError(f"objective.reduce={reduce!r}: allowed are {', '.join(REDUCTIONS)}")
    weight = REDUCTIONS[reduce](tokens.lengths(), totals).to(values.dtype)
    return (weight[tokens.response_index] * values.masked_fill(~tokens.loss_mask, 0.0)).sum()


def resolve_options(
    field: str, table: Mapping[str, Mapping[str, float]], name: str, given: Mapping[str, float]
) -> dict[str, float]:
    """Defaults of `name` overlaid by what was given. Raises ConfigError on an unknown name or option."""
    if name not in table:
        raise ConfigError(f"{field}={name!r}: allowed are {', '.join(table)}")
    unknown = given.keys() - table[name].keys()
    if unknown:
        allowed = ", ".join(table[name]) or "none"
        raise ConfigError(f"{field}={name!r} has no option {', '.join(sorted(unknown))}; allowed: {allowed}")
    return {**table[name], **given}
