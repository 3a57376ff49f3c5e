"""Advantages: from rewards to the number that multiplies log π, [G] per response or [N] per token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.algo.batch import resolve_options
from rlsys.algo.importance import segment_sum

PASSED = 1.0 - 1e-6
"""Rewards from here on count as a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageOutput:
    """advantages [G], and how many of the groups had equal rewards throughout (nothing to compare)."""

    advantages: Tensor
    zero_variance_groups: int
    groups: int


def compute_advantages(
    name: str,
    rewards: Tensor,
    group_index: Tensor,
    *,
    pass_rate: Tensor | None = None,
    kl_rewards: Tensor | None = None,
    **options: float,
) -> AdvantageOutput:
    """One advantage per response.

    rewards: [G] float. group_index: [G] int64, equal for responses to one prompt; any labels, any order.
    pass_rate: [G] or None, mean reward of the response's prompt measured elsewhere: over all samples
    drawn (`reinforce_ada`) or from the probe (`accepted`); other names ignore it. kl_rewards: [G] or None,
    added to the rewards before they are compared; what has equal rewards is counted without it. options: as
    in ADVANTAGE_OPTIONS. Raises ConfigError on an unknown name or option, ValueError on shapes.
    """
    chosen = resolve_options("advantage.name", ADVANTAGE_OPTIONS, name, options)
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected [G], got {tuple(rewards.shape)}")
    for label, values in (("group_index", group_index), ("pass_rate", pass_rate), ("kl_rewards", kl_rewards)):
        if values is not None and values.shape != rewards.shape:
            raise ValueError(f"{label}: expected {tuple(rewards.shape)} like rewards, got {tuple(values.shape)}")
    _, group = torch.unique(group_index, return_inverse=True)
    exact = rewards.detach().double()
    compared = exact if kl_rewards is None else exact + kl_rewards.detach().double()
    rate = None if pass_rate is None else pass_rate.detach().double()
    varied = _varied(exact, group)
    return AdvantageOutput(
        advantages=ADVANTAGES[name](compared, group, rate, **chosen).to(rewards.dtype),
        zero_variance_groups=int((~varied).sum()),
        groups=len(varied),
    )


def group_mean(rewards: Tensor, group: Tensor, pass_rate: Tensor | None) -> Tensor:
    """r − r̄ of the group. Expected gradient (1 − 1/n)·∇E[r]."""
    return _centred(rewards, group)


def grpo(rewards: Tensor, group: Tensor, pass_rate: Tensor | None, *, eps: float) -> Tensor:
    """(r − r̄)/(σ + ε), σ with ddof 1 (2402.03300). Weights prompts by 1/σ, which changes the direction."""
    centred = _centred(rewards, group)
    variance = _group_sum(centred.square(), group) / (_group_size(group) - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def rloo(rewards: Tensor, group: Tensor, pass_rate: Tensor | None) -> Tensor:
    """r − mean of the *other* responses = n/(n−1)·(r − r̄): unbiased (Ahmadian 2402.14740)."""
    size = _group_size(group)
    return _centred(rewards, group) * size / (size - 1).clamp(min=1)


def batch_whiten(rewards: Tensor, group: Tensor, pass_rate: Tensor | None, *, eps: float) -> Tensor:
    """(r − r̄)/(σ + ε) over all responses of the batch, σ with ddof 1 (REINFORCE++ 2501.03262)."""
    return grpo(rewards, torch.zeros_like(group), pass_rate, eps=eps)


def reinforce_ada(rewards: Tensor, group: Tensor, pass_rate: Tensor | None, *, scale: float, eps: float) -> Tensor:
    """r − r̄ with r̄ over *all* drawn samples, kept or not; ÷ √(r̄ + ε) when scale ≠ 0 (2510.04996).

    Without `pass_rate` the responses here are all that was drawn.
    """
    if pass_rate is None:
        pass_rate = _group_sum(rewards, group) / _group_size(group)
    advantages = rewards - pass_rate
    return advantages / (pass_rate + eps).sqrt() if scale else advantages


def accepted(rewards: Tensor, group: Tensor, pass_rate: Tensor | None, *, threshold: float) -> Tensor:
    """1 where r ≥ threshold, else 0: the acceptance of RAFT; 1/(n_i p_i) where a `pass_rate` p_i is given.

    n_i is the group's size. p_i must come from the probe: from the same draws 1/(n_i p̂_i) is biased.
    A prompt with p_i = 0 gets 0.
    """
    chosen = (rewards >= threshold).double()
    if pass_rate is None:
        return chosen
    return (chosen / (_group_size(group) * pass_rate)).masked_fill(pass_rate == 0, 0.0)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group_mean": group_mean,
    "grpo": grpo,
    "rloo": rloo,
    "batch_whiten": batch_whiten,
    "reinforce_ada": reinforce_ada,
    "accepted": accepted,
}
"""(rewards [G] float64, dense group [G], pass_rate [G] or None, **options) -> advantages [G].

A group of one gets 0 wherever the group is its own baseline.
"""

ADVANTAGE_OPTIONS: dict[str, dict[str, float]] = {
    "group_mean": {},
    "grpo": {"eps": 1e-6},
    "rloo": {},
    "batch_whiten": {"eps": 1e-6},
    "reinforce_ada": {"scale": 0.0, "eps": 1e-6},
    "accepted": {"threshold": PASSED},
}
"""Option names of each advantage with their defaults."""


def step_advantages(token_rewards: Tensor, loss_mask: Tensor, response_index: Tensor, responses: int) -> Tensor:
    """A_t = Σ of the step rewards of the same response that end at t or later; the outcome is a last step.

    token_rewards: [N], a step's reward on the step's last token (and the outcome's on the response's last).
    Returns [N], 0 on untrained tokens; a reward on an untrained token counts for the tokens before it.
    """
    rewards = token_rewards.detach().double()
    total = segment_sum(rewards, response_index, responses)
    received = rewards.cumsum(0) - rewards - (total.cumsum(0) - total)[response_index]
    return (total[response_index] - received).masked_fill(~loss_mask, 0.0).to(token_rewards.dtype)


def gae(
    token_rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    response_index: Tensor,
    bootstrap: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ A_{t+1}, δ_t = ρ_t + γ V_{t+1} − V_t (Schulman 2015), t+1 the next *trained* token.

    token_rewards, values, loss_mask, response_index: [N]. bootstrap: [G], the value after the last token:
    0 for a response that ended, V of its last state for one that was cut. Untrained positions are no
    states: their rewards and values are ignored. Returns A and the returns A + V, [N], 0 where untrained.
    """
    trained = loss_mask.nonzero().squeeze(-1)
    index = response_index[trained]
    lengths = torch.bincount(index, minlength=len(bootstrap))
    position = torch.arange(len(trained), device=index.device) - (lengths.cumsum(0) - lengths)[index]
    horizon = int(lengths.max()) if len(lengths) else 0
    reward = values.new_zeros(len(bootstrap), horizon)
    value = values.new_zeros(len(bootstrap), horizon + 1)
    reward[index, position] = token_rewards[trained]
    value[index, position] = values[trained]
    value[torch.arange(len(bootstrap), device=index.device), lengths] = bootstrap
    advantage = torch.zeros_like(value)
    for t in reversed(range(horizon)):
        running = reward[:, t] + gamma * value[:, t + 1] - value[:, t] + gamma * lam * advantage[:, t + 1]
        advantage[:, t] = running.masked_fill(t >= lengths, 0.0)
    advantages = torch.zeros_like(values)
    advantages[trained] = advantage[index, position]
    return advantages, (advantages + values).masked_fill(~loss_mask, 0.0)


def _group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Σ over the element's group, broadcast back. [G] -> [G]."""
    return segment_sum(values, group, len(values))[group]


def _group_size(group: Tensor) -> Tensor:
    return _group_sum(torch.ones_like(group), group)


def _varied(rewards: Tensor, group: Tensor) -> Tensor:
    """Which groups have more than one distinct reward, [number of groups] bool."""
    bounds = rewards.new_zeros(int(group.max()) + 1 if len(group) else 0)
    lowest = bounds.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = bounds.scatter_reduce(0, group, rewards, "amax", include_self=False)
    return highest > lowest


def _centred(rewards: Tensor, group: Tensor) -> Tensor:
    """r − r̄ of the group; exactly 0 (no rounding dust for a σ to blow up) where the rewards are equal."""
    centred = rewards - _group_sum(rewards, group) / _group_size(group)
    return centred.masked_fill(~_varied(rewards, group)[group], 0.0)
