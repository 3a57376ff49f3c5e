"""Claims 4 and 16: the KL of a response, exactly and from samples of another policy."""

import math
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlsys.algo.batch import BatchTotals
from rlsys.algo.divergence import kl_loss
from rlsys.algo.importance import bounded_exp, segment_sum
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import local_slope, random_case, token_drift
from rlsys.lab.claims.outcome import Outcome, at_least, equal
from rlsys.lab.estimate import mean, ratio_of_means
from rlsys.lab.estimators import Situation
from rlsys.lab.tree import Tree, make_tree, random_policy, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chain_rule(tasks: int) -> Outcome:
    """The KL of a response is the sum of the expected KLs of its tokens, and so grows linearly with T.

    KL(π‖π') = E_π Σ_t [log π(y_t|s_t) − log π'(y_t|s_t)] = Σ_s d^π(s) KL(π(·|s)‖π'(·|s)). With the same ε at every
    prefix this is ε·E_π|y|: a line of slope ε at fixed length. The prefixes must be those of π, not of π'. Falsified
    by any gap beyond rounding; with the prefixes of π' the gap is real.
    """
    gaps, wrong = [], []
    for vocabulary, horizon, ends in ((2, 6, False), (3, 5, True), (6, 4, False), (4, 5, True)):
        for seed in range(tasks // 2):
            case = random_case(vocabulary, horizon, 4, seed, ends=ends)
            other = case.policy + 0.7 * case.direction
            kl, per_token = exact.sequence_kl(case.tree, case.policy, other), exact.token_kl(case.policy, other)
            gaps.append(abs(float(exact.occupancy(case.tree, case.policy) @ per_token / kl) - 1))
            wrong.append(abs(float(exact.occupancy(case.tree, other) @ per_token / kl) - 1))
    horizons = (1, 2, 3, 4, 5, 6)
    row, move = torch.randn(2, 4, generator=seeded(4), dtype=torch.float64)
    epsilon = float(exact.token_kl((row + move)[None], row[None]))
    fixed = [_same_kl_everywhere(make_tree(4, t), row, move) for t in horizons]
    ended = [_same_kl_everywhere(make_tree(4, t, ends=True), row, move) for t in horizons]
    varied = [_random_kls(t, 4 * tasks) for t in horizons]

    return Outcome(
        checks=(
            equal("largest relative gap of the chain rule", 0.0, gaps, 1e-12),
            equal(
                "largest relative error of KL = ε T",
                0.0,
                (abs(kl / (epsilon * t) - 1) for t, (kl, _) in zip(horizons, fixed, strict=True)),
                1e-12,
            ),
            equal(
                "largest relative error of KL = ε E|y|, responses that may end",
                0.0,
                (abs(kl / (epsilon * length) - 1) for kl, length in ended),
                1e-12,
            ),
            equal("prefix-dependent: KL at T = 6 over T = 3", 2.0, ratio_of_means(varied[5], varied[2]), 0.3),
            at_least("smallest gap with the prefixes of the other policy (the measurement can tell)", 1e-4, wrong),
        ),
        draw=lambda figure: _draw_chain_rule(figure, epsilon, fixed, ended, varied),
    )


def _draw_chain_rule(
    figure: "Figure",
    epsilon: float,
    fixed: list[tuple[float, float]],
    ended: list[tuple[float, float]],
    varied: list[list[float]],
) -> None:
    horizons = range(1, len(fixed) + 1)
    left, right = plots.panels(figure, 2)
    left.plot(horizons, [epsilon * t for t in horizons], color=plots.GREY, linewidth=1, label=f"ε T, ε = {epsilon:.3f}")
    left.plot(horizons, [kl for kl, _ in fixed], "o", color=plots.BLUE, label="fixed length")
    left.plot(horizons, [epsilon * length for _, length in ended], color=plots.ORANGE, linewidth=1, label="ε E|y|")
    left.plot(horizons, [kl for kl, _ in ended], "s", color=plots.ORANGE, label="responses that may end")
    left.set(title="The same KL at every prefix", xlabel="longest length T", ylabel="sequence KL (nats)")
    left.legend()
    for seed in range(min(12, len(varied[0]))):
        right.plot(horizons, [v[seed] for v in varied], color=plots.SCALE[1], linewidth=0.8, alpha=0.7)
    right.plot(horizons, [sum(v) / len(v) for v in varied], "o-", color=plots.BLUE, label="mean of random policies")
    right.set(title="KLs that depend on the prefix", xlabel="length T", ylabel="sequence KL (nats)")
    right.legend()


def _same_kl_everywhere(tree: Tree, row: Tensor, move: Tensor) -> tuple[float, float]:
    """Sequence KL of softmax(row + move) against softmax(row) at every prefix, and E|y| of the first."""
    policy, other = ((row + shift).expand(tree.prefixes, tree.vocabulary) for shift in (move, 0 * move))
    return float(exact.sequence_kl(tree, policy, other)), float(exact.occupancy(tree, policy).sum())


def _random_kls(horizon: int, seeds: int) -> list[float]:
    tree = make_tree(3, horizon)
    pairs = [
        (random_policy(tree, seeded(4, 1, seed)), random_policy(tree, seeded(4, 2, seed), 0.5)) for seed in range(seeds)
    ]
    return [float(exact.sequence_kl(tree, policy, policy + move)) for policy, move in pairs]


class KlEstimates(NamedTuple):
    """What three sample means of log π/π_ref under μ tend to, and the truth; nats per response."""

    plain: float
    token: float
    sequence: float
    truth: float
    token_part: float
    """Σ_s d^μ(s) KL(π(·|s)‖π_ref(·|s)): the KL with the prefixes of μ."""
    drift: float


def off_policy_kl(tasks: int) -> Outcome:
    """Off-policy the sample mean of log π/π_ref is not the KL(π‖π_ref); w(y) repairs it, r_t only the token part.

    E_μ[w(y) Σ_t log π/π_ref] = KL exactly. E_μ[Σ_t r_t log π/π_ref] = Σ_s d^μ(s) KL(π(·|s)‖π_ref(·|s)): right tokens,
    wrong prefixes. Unweighted both are wrong; both biases start linearly in the drift. The r_t-weighted mean is the
    value of `kl_loss` with k1. Falsified by a w-weighted mean off the KL, an r_t-weighted one off the fixed-prefix sum
    or (for T > 1) on the KL, or biases of another order.
    """
    seeds = range(tasks)
    far = [_estimates(3, 4, seed, 0.8) for seed in seeds]
    single = [_estimates(4, 1, seed, 0.8) for seed in seeds]
    drifts = [10 ** (e / 4) for e in range(-8, 2)]
    curve = [_estimates(3, 4, 1, h) for h in drifts]

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        kinds = (("plain", plots.RED), ("token", plots.ORANGE), ("sequence", plots.BLUE))
        labels = {"plain": "unweighted", "token": "weighted by r", "sequence": "weighted by w"}
        x = [e.drift for e in curve]
        left.axhline(curve[0].truth, color=plots.GREY, linewidth=1, label="KL(π‖π_ref)")
        for kind, color in kinds:
            left.semilogx(x, [getattr(e, kind) for e in curve], "o-", color=color, label=labels[kind])
            if kind != "sequence":
                right.loglog(x, [abs(getattr(e, kind) - e.truth) for e in curve], "o-", color=color, label=labels[kind])
        left.set(title="What the sample mean tends to", xlabel="token drift √E(r−1)²", ylabel="nats per response")
        right.set(title="Its bias, linear in the drift", xlabel="token drift √E(r−1)²", ylabel="|bias| (nats)")
        for axes in (left, right):
            axes.legend()

    return Outcome(
        checks=(
            equal("weighted by w: largest |bias| (nats)", 0.0, (abs(e.sequence - e.truth) for e in far), 1e-10),
            equal(
                "weighted by r: largest distance from the fixed-prefix KL (nats)",
                0.0,
                (abs(e.token - e.token_part) for e in far),
                1e-10,
            ),
            equal("weighted by r, T = 1: largest |bias| (nats)", 0.0, (abs(e.token - e.truth) for e in single), 1e-10),
            at_least("weighted by r, T = 4: mean |bias| / KL", 0.02, mean([abs(e.token / e.truth - 1) for e in far])),
            at_least("unweighted, T = 4: mean |bias| / KL", 0.02, mean([abs(e.plain / e.truth - 1) for e in far])),
            equal("order of the unweighted bias in the drift (root mean square)", 1.0, _order("plain", seeds), 0.02),
            equal("order of the r-weighted bias in the drift (root mean square)", 1.0, _order("token", seeds), 0.02),
        ),
        draw=draw,
    )


def _order(kind: str, seeds: range) -> float:
    """Order in the drift of the root mean square over cases, which no case's change of sign can upset."""

    def size(h: float) -> float:
        found = [_estimates(3, 4, seed, h) for seed in seeds]
        return math.sqrt(fmean((getattr(e, kind) - e.truth) ** 2 for e in found))

    return local_slope(size(1e-3), size(5e-4))


def _estimates(vocabulary: int, horizon: int, seed: int, drift: float) -> KlEstimates:
    case = random_case(vocabulary, horizon, 16, seed)
    tree, policy = case.tree, case.policy
    behavior = policy + drift * case.direction
    reference = random_policy(tree, seeded(16, seed))
    under_mu = tree.probabilities(behavior)
    gain = segment_sum(tree.logprobs(policy) - tree.logprobs(reference), tree.response_index, tree.responses)
    weight = bounded_exp(tree.log_probabilities(policy) - tree.log_probabilities(behavior))
    return KlEstimates(
        plain=float(under_mu @ gain),
        token=_token_weighted(tree, policy, behavior, reference),
        sequence=float(under_mu @ (weight * gain)),
        truth=float(exact.sequence_kl(tree, policy, reference)),
        token_part=float(exact.occupancy(tree, behavior) @ exact.token_kl(policy, reference)),
        drift=token_drift(tree, policy, behavior),
    )


def _token_weighted(tree: Tree, policy: Tensor, behavior: Tensor, reference: Tensor) -> float:
    """E_μ of the value of `kl_loss` with k1 on one response, Σ_t min(r_t, cap)·log π/π_ref, cap out of the way."""
    none = torch.zeros(tree.responses, dtype=torch.float64)
    situation = Situation(tree=tree, behavior=behavior, policy=policy, rewards=none)
    one = BatchTotals(tokens=1, responses=1, max_tokens=1)
    total = 0.0
    for response, probability in enumerate(tree.probabilities(behavior).tolist()):
        positions, index = tree.tokens_of(torch.tensor([response]))
        batch = replace(
            situation.batch("reinforce", positions, index, 1), reference_logprobs=tree.logprobs(reference, positions)
        )
        value = kl_loss(batch, one, estimator="k1", reduce="constant", coef=1.0, cap=torch.inf).loss
        total += probability * float(value.detach())
    return total
