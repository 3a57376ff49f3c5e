"""Policy objectives: what is maximised for every token, and `policy_loss`, minus its reduction.

An objective is a pure function of a clean batch (zeros on untrained tokens, gradient through log π_θ only)
and the log-ratio log π_θ − log denominator, raw, [N]. It returns a `Term`. The denominator is μ unless
a correction moves it to π_V.

On-policy all of them but `raft` have the gradient of `reinforce` under every reduction. Its expectation is
∇E[r]/L with `constant` and, for large batches, ∇E[r]/E|y| with `token_mean`; with `sequence_mean` it is
not parallel to ∇E[r].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlsys.algo.batch import (
    BatchTotals,
    LossOutput,
    TokenBatch,
    reduce_tokens,
    resolve_options,
    trained_only,
)
from rlsys.algo.corrections import (
    CORRECTION_OPTIONS,
    SEQUENCE_OBJECTIVES,
    Correction,
    compute_correction,
    no_correction,
)
from rlsys.algo.divergence import kl_loss
from rlsys.algo.importance import beyond_clamp, bounded_exp, segment_sum, sequence_log_ratio
from rlsys.errors import ConfigError

__all__ = [
    "CORRECTION_OPTIONS",
    "OBJECTIVES",
    "OBJECTIVE_OPTIONS",
    "SEQUENCE_OBJECTIVES",
    "BatchTotals",
    "Correction",
    "LossOutput",
    "Term",
    "TokenBatch",
    "compute_correction",
    "dpo_loss",
    "kl_loss",
    "policy_loss",
]


class Term(NamedTuple):
    """What an objective maximises, per token; all [N].

    ratio: the weight it looked at, after the ±20 clamp. clipped: a bound acts on value or gradient.
    outside: the ratio is beyond a bound. clamped: the ±20 clamp acted.
    """

    value: Tensor
    ratio: Tensor
    clipped: Tensor
    outside: Tensor
    clamped: Tensor


def policy_loss(
    tokens: TokenBatch,
    totals: BatchTotals,
    *,
    objective: str,
    reduce: str,
    correction: Correction | None = None,
    **options: float,
) -> LossOutput:
    """Loss = −Σ_t reduction_t · correction_t · term_t; add it, and its gradient, over micro-batches.

    tokens: N tokens of whole responses. totals: normalisers of the global batch. correction: this
    micro-batch's part of `compute_correction` (None: no correction). options: as in OBJECTIVE_OPTIONS.

    metrics, sums over trained tokens: `tokens`; `clipped` (the clip acts on a kept token), `outside` (ratio
    beyond the bounds), `masked` and `truncated` (by the correction), `ratio` (the objective's weight), `weight`
    (the correction's). Sum over responses with a trained token: `responses`.

    Raises ConfigError on an unknown name or option, on per-token advantages for a sequence objective, and for
    `dpo`, which needs pairs: see `dpo_loss`.
    """
    chosen = resolve_options("objective.name", OBJECTIVE_OPTIONS, objective, options)
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective.name={objective!r} has no per-token term; use dpo_loss")
    tokens = trained_only(tokens)
    if objective in SEQUENCE_OBJECTIVES:
        _require_one_advantage(tokens, objective)
    correction = no_correction(tokens.policy_logprobs) if correction is None else correction
    over_start = correction.denominator == "step_start"
    denominator = tokens.step_start_logprobs if over_start else tokens.behavior_logprobs
    term = OBJECTIVES[objective](tokens, tokens.policy_logprobs - denominator, **chosen)

    mask, keep, weight = tokens.loss_mask, correction.keep, correction.weight
    clipped, outside = term.clipped & mask & keep, term.outside & mask
    counted = {
        "tokens": mask,
        "clipped": clipped,
        "outside": outside,
        "masked": ~keep & mask,
        "truncated": correction.truncated & mask,
        "ratio": term.ratio.detach() * mask,
        "weight": weight * mask,
        "responses": tokens.lengths() > 0,
    }
    corrected = (weight * term.value).masked_fill(~keep, 0.0)
    return LossOutput(
        loss=-reduce_tokens(corrected, tokens, totals, reduce),
        metrics={name: values.sum() for name, values in counted.items()},
        clipped=clipped,
        outside=outside,
        clamped=term.clamped & mask,
    )


def reinforce(tokens: TokenBatch, log_ratio: Tensor) -> Term:
    """A·log π_θ (Williams 1992). Off-policy even a baseline changes its mean gradient."""
    return _unclipped(tokens.advantages * tokens.policy_logprobs, log_ratio)


def is_token(tokens: TokenBatch, log_ratio: Tensor) -> Term:
    """r_t·A: L_tok. Off-policy its prefixes and its Q stay those of μ: bias of O(drift), 0 at T=1."""
    return _unclipped(bounded_exp(log_ratio) * tokens.advantages, log_ratio)


def is_sequence(tokens: TokenBatch, log_ratio: Tensor) -> Term:
    """w(y)·A, w = Π r_t: L_seq, unbiased for any μ that covers π; Var w grows exponentially with T.

    The response's term stands for its token sum: w·A/|y| on each token.
    """
    log_weight = sequence_log_ratio(log_ratio, tokens.response_index, tokens.responses)[tokens.response_index]
    return _unclipped(bounded_exp(log_weight) * tokens.advantages / _own_length(tokens), log_weight)


def is_sequence_truncated(tokens: TokenBatch, log_ratio: Tensor, *, clip_low: float, clip_high: float) -> Term:
    """clip(w, 1−ε_low, 1+ε_high)·A without a min: no gradient outside, whatever the sign of A."""
    log_weight = sequence_log_ratio(log_ratio, tokens.response_index, tokens.responses)[tokens.response_index]
    return _truncated(log_weight, tokens.advantages / _own_length(tokens), clip_low, clip_high)


def is_token_truncated(tokens: TokenBatch, log_ratio: Tensor, *, clip_low: float, clip_high: float) -> Term:
    """clip(r_t, 1−ε_low, 1+ε_high)·A without a min."""
    return _truncated(log_ratio, tokens.advantages, clip_low, clip_high)


def ppo_clip(tokens: TokenBatch, log_ratio: Tensor, *, clip_low: float, clip_high: float, dual_clip: float) -> Term:
    """min(r_t A, clip(r_t, 1−ε_low, 1+ε_high) A) (Schulman 2017; two ε: DAPO 2503.14476).

    dual_clip c > 1 bounds the term of A < 0 from below by c·A (Ye 2020); 0 is off, else ConfigError.
    """
    if dual_clip != 0 and dual_clip <= 1:
        raise ConfigError(f"objective.dual_clip={dual_clip}: must exceed 1, or be 0 (off)")
    return _pessimistic(log_ratio, tokens.advantages, clip_low, clip_high, dual_clip or torch.inf)


def decoupled_ppo(tokens: TokenBatch, log_ratio: Tensor, *, clip_low: float, clip_high: float) -> Term:
    """(π_prox/μ)·min(u A, clip(u, 1−ε_low, 1+ε_high) A), u = π_θ/π_prox (AReaL 2505.24298).

    π_prox is `proximal_logprobs`, or π_V where that is None. The trust region is around a recent policy
    while the behaviour weight corrects for the sampler.
    """
    proximal = tokens.step_start_logprobs if tokens.proximal_logprobs is None else tokens.proximal_logprobs
    log_behavior_weight = proximal - tokens.behavior_logprobs
    term = _pessimistic(tokens.policy_logprobs - proximal, tokens.advantages, clip_low, clip_high, torch.inf)
    return term._replace(
        value=bounded_exp(log_behavior_weight) * term.value,
        clamped=term.clamped | beyond_clamp(log_behavior_weight),
    )


def capped_reinforce(tokens: TokenBatch, log_ratio: Tensor, *, cap: float) -> Term:
    """sg(min(r_t, cap))·A·log π_θ: `cispo` (MiniMax-M1 2506.13585) and `aipo` (LlamaRL 2505.24034).

    The cap is absolute (not 1+ε). Every token keeps a gradient; a capped one a smaller.
    """
    ratio = bounded_exp(log_ratio.detach())
    over = ratio > cap
    value = ratio.clamp(max=cap) * tokens.advantages * tokens.policy_logprobs
    return Term(value, ratio, over, over, beyond_clamp(log_ratio))


def gspo(tokens: TokenBatch, log_ratio: Tensor, *, clip_low: float, clip_high: float) -> Term:
    """PPO's clip on s = exp(mean_t log r_t), broadcast to every token (Qwen 2507.18071)."""
    log_weight = sequence_log_ratio(log_ratio, tokens.response_index, tokens.responses)[tokens.response_index]
    return _pessimistic(log_weight / _own_length(tokens), tokens.advantages, clip_low, clip_high, torch.inf)


def raft(tokens: TokenBatch, log_ratio: Tensor) -> Term:
    """max(A, 0)·log π_θ: likelihood of accepted responses (Dong 2023; weighted: GVM-RAFT 2505.02391).

    Accepted means A > 0, and A is the weight: 1, or 1/(n_i p_i), from the advantage `accepted`.
    """
    return _unclipped(tokens.advantages.clamp(min=0) * tokens.policy_logprobs, log_ratio)


OBJECTIVES: dict[str, Callable[..., Term]] = {
    "reinforce": reinforce,
    "is_token": is_token,
    "is_sequence": is_sequence,
    "is_sequence_truncated": is_sequence_truncated,
    "is_token_truncated": is_token_truncated,
    "ppo_clip": ppo_clip,
    "decoupled_ppo": decoupled_ppo,
    "cispo": capped_reinforce,
    "aipo": capped_reinforce,
    "gspo": gspo,
    "raft": raft,
}

OBJECTIVE_OPTIONS: dict[str, dict[str, float]] = {
    "reinforce": {},
    "is_token": {},
    "is_sequence": {},
    "is_sequence_truncated": {"clip_low": 0.2, "clip_high": 0.2},
    "is_token_truncated": {"clip_low": 0.2, "clip_high": 0.2},
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0},
    "decoupled_ppo": {"clip_low": 0.2, "clip_high": 0.2},
    "cispo": {"cap": 5.0},
    "aipo": {"cap": 2.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "raft": {},
    "dpo": {"beta": 0.1},
}
"""Option names of each objective with their defaults; `dpo` is computed by `dpo_loss`."""


def dpo_loss(tokens: TokenBatch, pairs: Tensor, total_pairs: int, *, beta: float = 0.1) -> LossOutput:
    """−(1/P) Σ log σ(β[Δ(chosen) − Δ(rejected)]), Δ(y) = Σ_t log π_θ − log π_ref (Rafailov 2023).

    pairs: [p, 2] int64, response indices (chosen, rejected), both in this micro-batch; `total_pairs` P is
    global. Token sums, no reduction, no correction. metrics, sums over pairs: `pairs`, `margin` (β[…]),
    `correct` (margin > 0). Raises ConfigError without a reference, ValueError on the shape of pairs.
    """
    if tokens.reference_logprobs is None:
        raise ConfigError("objective.name='dpo' needs reference_logprobs: configure a reference policy")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs: expected [p, 2], got {tuple(pairs.shape)}")
    tokens = trained_only(tokens)
    assert tokens.reference_logprobs is not None
    gain = segment_sum(tokens.policy_logprobs - tokens.reference_logprobs, tokens.response_index, tokens.responses)
    margin = beta * (gain[pairs[:, 0]] - gain[pairs[:, 1]])
    none = torch.zeros_like(tokens.loss_mask)
    metrics = {
        "pairs": torch.tensor(len(pairs), device=margin.device),
        "margin": margin.detach().sum(),
        "correct": (margin > 0).sum(),
    }
    loss = -logsigmoid(margin).sum() / max(total_pairs, 1)
    return LossOutput(loss=loss, metrics=metrics, clipped=none, outside=none, clamped=none)


def _unclipped(value: Tensor, log_ratio: Tensor) -> Term:
    none = torch.zeros_like(value, dtype=torch.bool)
    return Term(value, bounded_exp(log_ratio), none, none, beyond_clamp(log_ratio))


def _truncated(log_ratio: Tensor, gain: Tensor, clip_low: float, clip_high: float) -> Term:
    ratio = bounded_exp(log_ratio)
    low, high = 1 - clip_low, 1 + clip_high
    outside = (ratio < low) | (ratio > high)
    return Term(ratio.clamp(low, high) * gain, ratio, outside, outside, beyond_clamp(log_ratio))


def _pessimistic(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, ceiling: float) -> Term:
    """min(r A, clip(r) A), written as the one-sided clip it is: from above for A > 0, from below for A < 0.

    `ceiling` is the dual clip: the largest ratio that A < 0 may use.
    """
    ratio = bounded_exp(log_ratio)
    low, high = 1 - clip_low, 1 + clip_high
    lower = torch.zeros_like(ratio).masked_fill(advantages < 0, low)
    upper = torch.full_like(ratio, torch.inf).masked_fill(advantages > 0, high)
    upper = upper.masked_fill(advantages < 0, ceiling)
    return Term(
        value=ratio.clamp(lower, upper) * advantages,
        ratio=ratio,
        clipped=(ratio < lower) | (ratio > upper),
        outside=(ratio < low) | (ratio > high),
        clamped=beyond_clamp(log_ratio),
    )


def _own_length(tokens: TokenBatch) -> Tensor:
    """|y| of the response each token belongs to, [N], at least 1."""
    return tokens.lengths().clamp(min=1)[tokens.response_index]


def _require_one_advantage(tokens: TokenBatch, objective: str) -> None:
    """Raises ConfigError unless all trained tokens of a response share their advantage."""
    advantages, index = tokens.advantages[tokens.loss_mask], tokens.response_index[tokens.loss_mask]
    bounds = advantages.new_zeros(tokens.responses)
    lowest = bounds.scatter_reduce(0, index, advantages, "amin", include_self=False)
    highest = bounds.scatter_reduce(0, index, advantages, "amax", include_self=False)
    if not torch.equal(lowest, highest):
        raise ConfigError(
            f"objective.name={objective!r} has one term per response and needs one advantage per response, "
            "not one per token (gae, step)"
        )
