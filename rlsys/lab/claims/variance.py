"""Claims 10 and 11: what a baseline and per-step rewards do to the variance."""

from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlsys.algo.advantages import compute_advantages, step_advantages
from rlsys.algo.importance import bounded_exp, segment_sum
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import Case, random_case, relative_error, token_drift
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import mean
from rlsys.lab.estimators import (
    Moments,
    Situation,
    batch_gradients,
    coefficients,
    enumerated,
    moments,
    response_coefficients,
    score_norms,
)
from rlsys.lab.tree import Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def baseline(tasks: int) -> Outcome:
    """A baseline leaves the mean gradient as it is and lowers its variance.

    E_π[b ∇log π] = b ∇Σ_y π(y) = 0, and likewise E_μ[b w ∇log π] = 0. The variance is a parabola in b with its minimum
    at b* = E[‖∇log π‖² r]/E‖∇log π‖², so b* never hurts, and the mean reward seldom. The mean of the *other* responses
    (`rloo`) is exact in every group; the mean of all (`group_mean`) shrinks by 1 − 1/n. Falsified by a mean that moves,
    or a variance that does not fall. Without weights, off-policy, the mean does move.
    """
    problems = [(p, seed) for p in (0.05, 0.25, 0.5, 0.75, 0.95) for seed in range(tasks // 2)]
    shifts, off_policy, unweighted, ratios, best = [], [], [], {}, []
    for pass_rate, seed in problems:
        case = random_case(3, 4, 10, seed, pass_rate=pass_rate)
        truth = exact.reward_gradient(case.tree, case.policy, case.rewards)
        average = float(exact.expected_reward(case.tree, case.policy, case.rewards))
        plain = _with_baseline(case, 0.0)
        shifts.append(float((_with_baseline(case, average).mean - plain.mean).norm() / truth.norm()))
        ratios[average] = _with_baseline(case, average).variance / plain.variance
        best.append(_with_baseline(case, _best_baseline(case)).variance / plain.variance)
        moved = [_with_baseline(case, b, 0.5 * case.direction, "is_sequence").mean for b in (0.0, average)]
        off_policy.append(float((moved[1] - moved[0]).norm() / truth.norm()))
        moved = [_with_baseline(case, b, 0.5 * case.direction, "reinforce").mean for b in (0.0, average)]
        unweighted.append(float((moved[1] - moved[0]).norm() / truth.norm()))
    groups = [_group_baselines(random_case(2, 3, 10, seed)) for seed in range(tasks // 2)]

    return Outcome(
        checks=(
            equal("on-policy: largest shift of the mean gradient, over ‖∇J‖", 0.0, shifts, 1e-10),
            equal("off-policy, weighted by w: largest shift", 0.0, off_policy, 1e-10),
            equal("rloo, groups of 3: largest error of the mean", 0.0, (g.rloo for g in groups), 1e-10),
            equal("group_mean, groups of 3: largest error against 2/3 ∇J", 0.0, (g.group_mean for g in groups), 1e-10),
            at_most("best constant: largest variance ratio", 1.0, best),
            at_most("mean reward: variance ratio, mean over tasks", 0.95, mean(list(ratios.values()))),
            at_least("off-policy, unweighted: smallest shift (the measurement can tell)", 1e-3, unweighted),
        ),
        draw=lambda figure: _draw_baseline(figure, random_case(3, 4, 10, 0), ratios),
        notes=(
            f"a small group is a noisy baseline: rloo in groups of 3 has {fmean(g.ratio for g in groups):.2f} times "
            "the variance of no baseline at a pass rate of 0.25",
        ),
    )


def _draw_baseline(figure: "Figure", parabola: Case, ratios: dict[float, float]) -> None:
    points = [i / 20 for i in range(-4, 25)]
    left, right = plots.panels(figure, 2)
    left.plot(points, [_with_baseline(parabola, b).variance for b in points], color=plots.BLUE)
    average = float(exact.expected_reward(parabola.tree, parabola.policy, parabola.rewards))
    for b, color, label in (
        (0.0, plots.GREY, "no baseline"),
        (average, plots.ORANGE, "mean reward"),
        (_best_baseline(parabola), plots.GREEN, "best constant"),
    ):
        left.plot([b], [_with_baseline(parabola, b).variance], "o", color=color, markersize=8, label=label)
    left.set(title="Same mean, other variance", xlabel="baseline b", ylabel="variance per response")
    left.set_ylim(bottom=0)
    left.legend()
    right.plot(list(ratios), list(ratios.values()), "o", color=plots.ORANGE, alpha=0.7, label="mean reward / none")
    right.axhline(1.0, color=plots.INK, linewidth=1)
    right.set(
        title="What the mean reward saves", xlabel="pass rate of the prompt", ylabel="variance ratio", xlim=(0, 1)
    )
    right.set_ylim(bottom=0)
    right.legend()


def _with_baseline(case: Case, b: float, move: Tensor | float = 0.0, objective: str = "reinforce") -> Moments:
    behavior = case.policy + move
    return enumerated(
        Situation(tree=case.tree, behavior=behavior, policy=case.policy, rewards=case.rewards, baseline=b), objective
    )


def _best_baseline(case: Case) -> float:
    """b* = E[‖∇log π(y)‖² r]/E‖∇log π(y)‖², on-policy."""
    tree = case.tree
    norms = segment_sum(score_norms(tree, case.policy), tree.response_index, tree.responses)
    weight = tree.probabilities(case.policy) * norms
    return float(weight @ case.rewards / weight.sum())


class GroupBaselines(NamedTuple):
    rloo: float
    group_mean: float
    ratio: float
    """Variance of a group's gradient with `rloo` over that without a baseline."""


def _group_baselines(case: Case, size: int = 3) -> GroupBaselines:
    """Every group of `size` responses, with its probability: exact moments of estimators that look at groups."""
    tree = case.tree
    members = torch.tensor(list(product(range(tree.responses), repeat=size)))
    probability = tree.probabilities(case.policy)[members].prod(1)
    group = torch.arange(len(members)).repeat_interleave(size)
    positions, index = tree.tokens_of(members.flatten())
    rewards = case.rewards[members.flatten()]

    def estimate(advantages: Tensor) -> tuple[Tensor, float]:
        c = advantages[index] / size
        gradients = batch_gradients(tree, case.policy, positions, group[index], len(members), c)
        centre = torch.einsum("g,gsa->sa", probability, gradients)
        return centre, float(probability @ (gradients - centre).square().sum((1, 2)))

    truth = exact.reward_gradient(tree, case.policy, case.rewards)
    rloo, with_rloo = estimate(compute_advantages("rloo", rewards, group).advantages)
    centred, _ = estimate(compute_advantages("group_mean", rewards, group).advantages)
    _, without = estimate(rewards)
    return GroupBaselines(
        rloo=relative_error(rloo, truth),
        group_mean=relative_error(centred, (1 - 1 / size) * truth),
        ratio=with_rloo / without,
    )


class StepWeights(NamedTuple):
    """One setting of claim 11: the errors of both means, added; variances, per-step over whole-response."""

    kind: str
    horizon: int
    drift: float
    error: float
    value_ratio: float
    gradient_ratio: float


def step_rewards(tasks: int) -> Outcome:
    """With per-step rewards, per-step weights have lower variance than one weight for the whole response.

    E_π Σ_t ρ_t = E_μ[w(y) Σ_t ρ_t] = E_μ[Σ_t w_≤t ρ_t], w_≤t = Π_{u≤t} r_u: a reward needs no weights of later tokens,
    which only add variance. Typical, no theorem: where later rewards take earlier ones back the sum is calm and its
    parts are not. For the gradient: `is_token` with `step_advantages` against `is_sequence` with the summed reward.
    Falsified by a mean off the truth, or typical ratios that do not stay below 1.
    """
    kinds = ("signed", "positive", "taken back")
    horizons = (2, 4, 6)
    found = [
        _step_weights(kind, horizon, seed, h)
        for kind in kinds
        for horizon in horizons
        for seed in range(tasks // 2)
        for h in (0.2, 0.6)
    ]
    typical = [s for s in found if s.kind != "taken back"]
    contrary = [s for s in found if s.kind == "taken back"]

    return Outcome(
        checks=(
            equal("largest error of the means, over the spread of rewards", 0.0, (s.error for s in found), 1e-10),
            at_most(
                "variance ratio of the value, mean over typical settings", 0.95, mean([s.value_ratio for s in typical])
            ),
            at_most(
                f"…at T = {horizons[-1]}",
                0.9,
                mean([s.value_ratio for s in typical if s.horizon == horizons[-1]]),
            ),
            at_most(
                "variance ratio of the gradient, mean over typical settings",
                0.95,
                mean([s.gradient_ratio for s in typical]),
            ),
            at_least(
                "no theorem: ratio of the value where rewards are taken back",
                1.0,
                mean([s.value_ratio for s in contrary]),
            ),
        ),
        draw=lambda figure: _draw_step_weights(figure, found),
        notes=(
            f"per-step weights had the lower variance in {_lower(typical)} typical settings, and in {_lower(contrary)} "
            "where a later reward takes an earlier one back",
        ),
    )


def _draw_step_weights(figure: "Figure", found: list[StepWeights]) -> None:
    colors = {"signed": plots.BLUE, "positive": plots.GREEN, "taken back": plots.RED}
    left, right = plots.panels(figure, 2, sharey=True)
    for kind, color in colors.items():
        own = [s for s in found if s.kind == kind]
        for axes, ratios in ((left, [s.value_ratio for s in own]), (right, [s.gradient_ratio for s in own])):
            axes.loglog(
                [s.drift for s in own], ratios, "o", color=color, alpha=0.7, markersize=4, label=f"{kind} rewards"
            )
    for axes in (left, right):
        axes.axhline(1.0, color=plots.INK, linewidth=1)
        axes.set(xlabel="token drift √E(r−1)²")
    left.set(title="Estimate of E Σρ", ylabel="variance: per step / whole response")
    right.set(title="Gradient: is_token / is_sequence")
    left.legend()


def _lower(settings: list[StepWeights]) -> str:
    return f"{sum(s.value_ratio < 1 for s in settings)} of {len(settings)}"


def _step_weights(kind: str, horizon: int, seed: int, drift: float) -> StepWeights:
    case = random_case(3, horizon, 11, seed)
    tree, policy, behavior = case.tree, case.policy, case.policy + drift * case.direction
    rho = _token_rewards(kind, case)
    total = segment_sum(rho, tree.response_index, tree.responses)
    log_ratio = tree.logprobs(policy) - tree.logprobs(behavior)
    so_far = bounded_exp(log_ratio.view(tree.responses, horizon).cumsum(1)).flatten()
    whole = so_far.view(tree.responses, horizon)[:, -1] * total
    stepwise = segment_sum(so_far * rho, tree.response_index, tree.responses)
    under_mu, truth = tree.probabilities(behavior), tree.probabilities(policy) @ total
    spread = float((tree.probabilities(policy) @ (total - truth).square()).sqrt()) or 1.0
    return StepWeights(
        kind=kind,
        horizon=horizon,
        drift=token_drift(tree, policy, behavior),
        error=sum(abs(float(under_mu @ value - truth)) for value in (whole, stepwise)) / spread,
        value_ratio=_variance(under_mu, stepwise) / _variance(under_mu, whole),
        gradient_ratio=_gradient_ratio(case, behavior, rho, total),
    )


def _token_rewards(kind: str, case: Case) -> Tensor:
    """ρ(s, a) of every token, [N]: normal; uniform on [0, 1]; or normal with each second one taking the first back."""
    tree = case.tree
    table = torch.randn(tree.prefixes * tree.vocabulary, generator=case.generator, dtype=torch.float64)
    if kind == "positive":
        table = torch.special.ndtr(table)
    rho = table[tree.cells]
    if kind != "taken back":
        return rho
    pairs = rho.view(tree.responses, tree.horizon).clone()
    pairs[:, 1::2] = 0.1 * pairs[:, 1::2] - pairs[:, ::2]
    return pairs.flatten()


def _variance(probability: Tensor, values: Tensor) -> float:
    return float(probability @ (values - probability @ values).square())


def _gradient_ratio(case: Case, behavior: Tensor, rho: Tensor, total: Tensor) -> float:
    tree: Tree = case.tree
    situation = Situation(tree=tree, behavior=behavior, policy=case.policy, rewards=total)
    whole = moments(tree, behavior, case.policy, response_coefficients(situation, "is_sequence"))
    batch = situation.every_response("is_token")
    to_go = step_advantages(rho, batch.loss_mask, batch.response_index, batch.responses)
    stepwise = moments(tree, behavior, case.policy, coefficients(replace(batch, advantages=to_go), "is_token"))
    return stepwise.variance / whole.variance
