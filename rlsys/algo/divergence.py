"""KL to the reference policy: estimators, as a loss, as a reward, and the schedules of its coefficient.

With d_t = log π_ref − log π_θ on a sampled token, E_π[k1] = E_π[k3] = KL(π‖π_ref) per prefix; k2 is biased
in value but right in gradient. What each does as a *loss*, at fixed prefixes: k2 has the gradient of
KL(π‖π_ref), k3 that of KL(π_ref‖π), k1 none in expectation. No token loss sees that prefixes move with the
policy; the gradient of the sequence KL is exact only with KL placed in the reward.
"""

from collections.abc import Callable

from torch import Tensor

from rlsys.algo.batch import BatchTotals, LossOutput, TokenBatch, reduce_tokens, trained_only
from rlsys.algo.importance import beyond_clamp, bounded_exp, log_ratio, segment_sum
from rlsys.errors import ConfigError


def k1(d: Tensor) -> Tensor:
    """k1 = −d: unbiased value, high variance, may be negative. d: log π_ref − log π_θ, any shape."""
    return -d


def k2(d: Tensor) -> Tensor:
    """k2 = d²/2: biased value, gradient of KL(π‖π_ref) at fixed prefixes."""
    return d.square() / 2


def k3(d: Tensor) -> Tensor:
    """k3 = e^d − d − 1 ≥ 0: unbiased value, low variance; only the exponent is clamped (Schulman 2020)."""
    return bounded_exp(d) - d - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_loss(
    tokens: TokenBatch,
    totals: BatchTotals,
    *,
    estimator: str,
    reduce: str,
    coef: float,
    cap: float = 2.0,
) -> LossOutput:
    """+β · reduction of sg(min(r_t, cap))·k(d_t), r_t = π_θ/μ; add it to the policy loss.

    The weight repairs the token's distribution off-policy, not that of its prefix. Of k1 the expected gradient
    is zero on-policy, and off-policy too, but for what the cap cuts: a run refuses it. Flags: where the cap acts,
    and where a clamp does, on the weight or on the exponent of k3.

    Raises ConfigError without a reference and on an unknown estimator or reduction.
    """
    if estimator not in KL_ESTIMATORS:
        raise ConfigError(f"kl.estimator={estimator!r}: allowed are {', '.join(KL_ESTIMATORS)}")
    if tokens.reference_logprobs is None:
        raise ConfigError("kl.coef > 0 needs reference_logprobs: configure a reference policy")
    tokens = trained_only(tokens)
    assert tokens.reference_logprobs is not None
    d = tokens.reference_logprobs - tokens.policy_logprobs
    log_weight = (tokens.policy_logprobs - tokens.behavior_logprobs).detach()
    weight = bounded_exp(log_weight)
    capped = (weight > cap) & tokens.loss_mask
    clamped = beyond_clamp(log_weight)
    if estimator == "k3":
        clamped = clamped | beyond_clamp(d)
    return LossOutput(
        loss=coef * reduce_tokens(weight.clamp(max=cap) * KL_ESTIMATORS[estimator](d), tokens, totals, reduce),
        metrics={},
        clipped=capped,
        outside=capped,
        clamped=clamped & tokens.loss_mask,
    )


def kl_token_rewards(step_start_logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor, coef: float) -> Tensor:
    """−β(log π_V − log π_ref) on trained tokens, 0 elsewhere; no gradient. All [N]. For `gae` and `step`."""
    return -coef * log_ratio(step_start_logprobs.detach(), reference_logprobs.detach(), loss_mask)


def kl_rewards(
    step_start_logprobs: Tensor,
    reference_logprobs: Tensor,
    loss_mask: Tensor,
    response_index: Tensor,
    responses: int,
    coef: float,
) -> Tensor:
    """−β Σ_t (log π_V − log π_ref), to add to each response's reward *before* the advantage. Returns [G].

    On-policy the policy gradient of this reward is −β times the gradient of the sequence KL, exactly.
    """
    rewards = kl_token_rewards(step_start_logprobs, reference_logprobs, loss_mask, coef)
    return segment_sum(rewards, response_index, responses)


def fixed_coef(coef: float, *, step: int, sequence_kl: float) -> float:
    """β stays."""
    return coef


def linear_coef(coef: float, *, step: int, sequence_kl: float, initial: float, final: float, steps: int) -> float:
    """β goes from `initial` at step 0 to `final` at step `steps`, then stays."""
    return initial + (final - initial) * min(step / steps, 1.0)


def adaptive_coef(coef: float, *, step: int, sequence_kl: float, target: float, gain: float = 0.1) -> float:
    """β ← β(1 + K·clip(KL/target − 1, ±0.2)), K = 0.1 (Ziegler 2019); KL is per sequence, in nats."""
    return coef * (1 + gain * min(max(sequence_kl / target - 1, -0.2), 0.2))


KL_SCHEDULES: dict[str, Callable[..., float]] = {
    "fixed": fixed_coef,
    "linear": linear_coef,
    "adaptive": adaptive_coef,
}
"""(coef, step=, sequence_kl=, **options) -> the coefficient of step `step`; it is the whole state."""
