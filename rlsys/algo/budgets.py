"""How many samples a prompt deserves: pure decisions, taken as rewards come in.

A group of n samples at pass rate p carries no signal with probability p^n + (1−p)^n: 43% at p = 0.1, n = 8.
Two kinds of remedy. BUDGETS decide one prompt at a time, from the rewards drawn so far, whether to draw more
or which to keep; the rounds may come from different policy versions, so the caller records each draw's.
ALLOCATIONS divide a budget over many prompts before drawing, from what is known about them. A sample is
positive when its reward exceeds `threshold`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlsys.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Draw:
    """Sample `n` more responses to this prompt."""

    n: int


@dataclass(frozen=True, slots=True)
class Done:
    """Train on the draws at these positions; none: the prompt carried no signal. All draws serve the baseline."""

    keep: tuple[int, ...]


def uniform(rewards: Sequence[float], *, n: int) -> Draw | Done:
    """n samples for every prompt, all kept."""
    return Draw(n - len(rewards)) if len(rewards) < n else Done(tuple(range(len(rewards))))


def dynamic(rewards: Sequence[float], *, n: int) -> Draw | Done:
    """n samples, kept only if their rewards differ; the caller admits prompts until the batch is full (DAPO)."""
    if len(rewards) < n:
        return Draw(n - len(rewards))
    return Done(tuple(range(len(rewards))) if max(rewards) > min(rewards) else ())


def ada_seq(
    rewards: Sequence[float], *, n: int, positives: int, per_round: int, max_rounds: int, threshold: float = 0.0
) -> Draw | Done:
    """Rounds of M until K positives, or max_rounds; then n kept, balanced (Reinforce-Ada 2510.04996).

    E[N] = K/p when drawn one at a time and uncapped; rounds of M overshoot.
    """
    found = sum(reward > threshold for reward in rewards)
    if found < positives and len(rewards) < per_round * max_rounds:
        return Draw(per_round)
    return Done(balanced(rewards, n, threshold))


def ada_seq_balance(
    rewards: Sequence[float], *, n: int, positives: int, per_round: int, max_rounds: int, threshold: float = 0.0
) -> Draw | Done:
    """As `ada_seq`, but a prompt leaves at K positives **and** K negatives."""
    found = sum(reward > threshold for reward in rewards)
    rarer = min(found, len(rewards) - found)
    if rarer < positives and len(rewards) < per_round * max_rounds:
        return Draw(per_round)
    return Done(balanced(rewards, n, threshold))


BUDGETS: dict[str, Callable[..., Draw | Done]] = {
    "uniform": uniform,
    "dynamic": dynamic,
    "ada_seq": ada_seq,
    "ada_seq_balance": ada_seq_balance,
}
"""(rewards drawn so far, **options) -> Draw(n) | Done(keep)."""


def balanced(rewards: Sequence[float], n: int, threshold: float = 0.0) -> tuple[int, ...]:
    """Positions of n draws, half positive and half negative as far as they go, the earliest of each."""
    good = [i for i, reward in enumerate(rewards) if reward > threshold]
    bad = [i for i, reward in enumerate(rewards) if reward <= threshold]
    from_good = min(len(good), max(n // 2, n - len(bad)))
    return tuple(sorted(good[:from_good] + bad[: n - from_good]))


def stopped_pass_rate(positives: int, drawn: int) -> float:
    """(K − 1)/(N − 1): unbiased after stopping at the K-th positive, one draw at a time, where K/N is too high.

    Raises ValueError for K < 2.
    """
    if positives < 2:
        raise ValueError(f"positives: must be at least 2 for an unbiased estimate, got {positives}")
    return (positives - 1) / (drawn - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRate:
    """Discounted counts of a prompt's draws: N_tot ← λN_tot + n, N_pos ← λN_pos + k (2510.04996)."""

    total: float = 0.0
    positive: float = 0.0

    def updated(self, drawn: int, positive: int, *, decay: float = 1.0) -> "PassRate":
        return PassRate(total=decay * self.total + drawn, positive=decay * self.positive + positive)

    def estimate(self, *, alpha: float = 1.0, beta: float = 1.0) -> float:
        """p̂ = (N_pos + α)/(N_tot + α + β), the mean of a Beta posterior."""
        return (self.positive + alpha) / (self.total + alpha + beta)


def ada_est(
    pass_rates: Sequence[float], budget: int, *, lowest: int = 2, highest: int = 32, eps: float = 1e-3
) -> list[int]:
    """n_x ∝ 1/√(p̂_x + ε) within [n_min, n_max], Σ n_x = budget (2510.04996)."""
    return allocate([1 / math.sqrt(p + eps) for p in pass_rates], budget, lowest=lowest, highest=highest)


def gvm(
    pass_rates: Sequence[float],
    gradient_norms: Sequence[float],
    budget: int,
    *,
    alpha: float = 1e-3,
    beta: float = 2.0,
) -> list[int]:
    """n_i = N·q_i/Σq, q_i = G_i/√(p_i + α/p_i^{β−1}); p_i = 0 or G_i = 0 gives 0 (GVM-RAFT 2505.02391).

    p_i and G_i, the mean gradient norm of log π over accepted responses, come from N′ probe samples, whose
    tokens belong to the cost. Rounding is by largest remainder, not always the integer optimum.
    """
    weights = [
        g / math.sqrt(p + alpha / p ** (beta - 1)) if p > 0 else 0.0
        for p, g in zip(pass_rates, gradient_norms, strict=True)
    ]
    return allocate(weights, budget)


def log_optimal(pass_rates: Sequence[float], budget: int) -> list[int]:
    """n_i ∝ √((1 − p_i)/p_i): least variance of the log objective Σ log p_i under Σ n_i = budget; 0 at p = 0."""
    return allocate([math.sqrt((1 - p) / p) if p > 0 else 0.0 for p in pass_rates], budget)


ALLOCATIONS: dict[str, Callable[..., list[int]]] = {"ada_est": ada_est, "gvm": gvm, "log_optimal": log_optimal}
"""(what is known per prompt..., budget, **options) -> samples per prompt."""


def allocate(weights: Sequence[float], budget: int, *, lowest: int = 0, highest: int | None = None) -> list[int]:
    """Whole numbers n_i ∝ weights within [lowest, highest] that sum to the budget, by largest remainder.

    A weight of 0 gets `lowest`; without any positive weight so do all, and the budget stays unspent.
    Raises ConfigError when the bounds cannot hold the budget.
    """
    ceiling = budget if highest is None else highest
    able = sum(weight > 0 for weight in weights)
    if len(weights) * lowest > budget or (able and able * ceiling + (len(weights) - able) * lowest < budget):
        raise ConfigError(
            f"budget={budget}: so many samples do not fit {len(weights)} prompts with {lowest} to {ceiling} each"
        )
    if not able:
        return [lowest] * len(weights)
    shares = _bounded_shares(weights, budget, lowest, ceiling)
    counts = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - shares[i])
    takers = [i for i in by_remainder if weights[i] > 0 and counts[i] < ceiling]
    for i in takers[: budget - sum(counts)]:
        counts[i] += 1
    return counts


def _bounded_shares(weights: Sequence[float], budget: int, lowest: int, ceiling: int) -> list[float]:
    """Real shares clip(s·w_i, lowest, ceiling) with the s that spends the budget, by bisection."""

    def shares(scale: float) -> list[float]:
        return [min(max(scale * weight, lowest), ceiling) if weight > 0 else lowest for weight in weights]

    low, high = 0.0, max(ceiling, 1) / min(weight for weight in weights if weight > 0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < budget else (low, middle)
    return shares(high)


def signal_loss(pass_rate: float, n: int) -> float:
    """p^n + (1−p)^n: how often n samples of one prompt all agree, and teach nothing."""
    return pass_rate**n + (1 - pass_rate) ** n
