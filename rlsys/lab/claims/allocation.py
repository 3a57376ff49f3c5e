"""Claims 14 and 15: dividing a budget of samples over prompts before drawing."""

import math
from collections.abc import Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.budgets import ada_est, gvm, log_optimal
from rlsys.algo.importance import segment_sum
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import Case, random_case, relative_error
from rlsys.lab.claims.outcome import Outcome, at_least, at_most, equal
from rlsys.lab.estimate import geometric_mean, mean, share
from rlsys.lab.estimators import Situation, moments, response_coefficients, score_norms, scores
from rlsys.lab.tree import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_allocation(tasks: int) -> Outcome:
    """n_i* ∝ √((1−p_i)/p_i) minimises the variance of the log objective under Σ n_i = N.

    Var Σ_i p̂_i/p_i = Σ_i (1−p_i)/(n_i p_i), and by Cauchy and Schwarz it is at least (Σ_i √((1−p_i)/p_i))²/N, which
    n_i* reaches. Brute force tries every allocation of N samples to m prompts, each at least one. Falsified by an
    allocation below the bound, or a brute-force best that n* and `log_optimal` do not match up to rounding.
    """
    problems = [_random_rates(3, 24, seed) for seed in range(tasks)]
    problems += [_random_rates(4, 30, 100 + seed) for seed in range(tasks // 2)]
    tried = [_brute_force(*problem) for problem in problems]
    rates, budget = (0.5, 0.05), 40

    def draw(figure: "Figure") -> None:
        left, right = plots.panels(figure, 2)
        n = range(1, budget)
        left.plot(n, [_log_variance(rates, (k, budget - k)) for k in n], color=plots.BLUE)
        ideal = _ideal(rates, budget)
        left.axvline(ideal[0], color=plots.RED, linewidth=1, label="n* ∝ √((1−p)/p)")
        left.axvline(budget / 2, color=plots.GREY, linewidth=1, linestyle="--", label="uniform")
        left.set(
            title="Two prompts, p = 0.5 and 0.05", xlabel="samples for p = 0.5, of 40", ylabel="variance", ylim=(0, 6)
        )
        best, found = [n for t in tried for n in t.best], [x for t in tried for x in t.ideal]
        right.plot(found, best, "o", color=plots.BLUE, alpha=0.6, markersize=4)
        right.plot([0, max(found)], [0, max(found)], color=plots.RED, linewidth=1)
        right.set(title="Every allocation tried", xlabel="n* (real-valued)", ylabel="best whole numbers, brute force")
        left.legend()

    return Outcome(
        checks=(
            at_least("smallest brute-force variance over the bound", 1.0 - 1e-12, (t.best_ratio for t in tried)),
            at_most("largest brute-force variance over the bound", 1.05, (t.best_ratio for t in tried)),
            at_most("largest |best whole number − n*|", 1.0, (t.distance for t in tried)),
            at_most("largest variance of `log_optimal` over the best", 1.02, (t.rounded_ratio for t in tried)),
            at_least("variance of uniform over the best, mean", 1.02, mean([t.uniform_ratio for t in tried])),
        ),
        draw=draw,
    )


class BruteForce(NamedTuple):
    ideal: list[float]
    best: tuple[int, ...]
    best_ratio: float
    """Variance of the best whole numbers over the bound."""
    distance: float
    rounded_ratio: float
    uniform_ratio: float


def _random_rates(prompts: int, budget: int, seed: int) -> tuple[tuple[float, ...], int]:
    draws = torch.rand(prompts, generator=seeded(14, seed), dtype=torch.float64)
    return tuple((0.03 + 0.92 * draws).tolist()), budget


def _log_variance(rates: Sequence[float], counts: Sequence[float]) -> float:
    return sum((1 - p) / (n * p) if n > 0 else math.inf for p, n in zip(rates, counts, strict=True))


def _ideal(rates: Sequence[float], budget: int) -> list[float]:
    roots = [math.sqrt((1 - p) / p) for p in rates]
    return [budget * root / sum(roots) for root in roots]


def _brute_force(rates: tuple[float, ...], budget: int) -> BruteForce:
    ideal = _ideal(rates, budget)
    bound = _log_variance(rates, ideal)
    cuts = combinations(range(1, budget), len(rates) - 1)
    every = (tuple(b - a for a, b in zip((0, *cut), (*cut, budget), strict=True)) for cut in cuts)
    best = min(every, key=lambda counts: _log_variance(rates, counts))
    least = _log_variance(rates, best)
    uniform = [budget / len(rates)] * len(rates)
    return BruteForce(
        ideal=ideal,
        best=best,
        best_ratio=least / bound,
        distance=max(abs(n - x) for n, x in zip(best, ideal, strict=True)),
        rounded_ratio=_log_variance(rates, log_optimal(rates, budget)) / least,
        uniform_ratio=_log_variance(rates, uniform) / least,
    )


def gvm_allocation(tasks: int) -> Outcome:
    """GVM's 1/(n_i p_i) Σ_accepted ∇log π is unbiased for ∇log p_i; its allocation lowers the variance.

    E = n_i·E[r ∇log π]/(n_i p_i) = ∇log p_i for any n_i, if p_i comes from elsewhere; with p̂_i of the same n draws the
    mean is (1 − (1−p)^n)·∇log p. The variance is v_i/n_i, v_i = E[r‖∇log π‖²]/p² − ‖∇log p‖², so n_i ∝ √v_i is best.
    G_i/√p_i (α = 0) leaves out the second term and comes near; 1/√p is its special case of equal norms G_i. Falsified
    by a bias, or if the allocation did not beat uniform and 1/√p where norms differ, or left 1/√p where they are equal.
    With α > 0 the rule starves prompts of p < √α on purpose, and there it loses: that setting is named.
    """
    cases = [random_case(3, 3, 15, seed, pass_rate=p) for seed in range(tasks // 4) for p in (0.1, 0.4)]
    errors = [_accepted_error(case) for case in cases]
    same_draws = [_same_draws_shrinkage(random_case(2, 3, 15, seed)) for seed in range(tasks // 4)]
    batches = [[_spread_prompt(b, i) for i in range(8)] for b in range(2 * tasks)]
    mixed = [_allocations(batch, alpha=0.0) for batch in batches]
    alike = [_allocations([_flat_prompt(b, i) for i in range(8)], alpha=0.0) for b in range(tasks // 3)]
    solvable = [_allocations([x for x in batch if x.pass_rate > 0.1], alpha=ALPHA) for batch in batches]
    hopeless = [_allocations(b, alpha=ALPHA) for b in batches if min(x.pass_rate for x in b) < math.sqrt(ALPHA) / 2]
    lost = share(sum(a.gvm > a.inverse_root for a in hopeless), len(hopeless))
    excess = geometric_mean([a.gvm / a.inverse_root for a in hopeless])

    return Outcome(
        checks=(
            equal("largest error of the mean against ∇log p", 0.0, errors, 1e-10),
            equal("p̂ from the same 3 draws: largest error of 1 − (1−p)³", 0.0, same_draws, 1e-10),
            at_most("variance of GVM over uniform", 0.9, geometric_mean([a.gvm / a.uniform for a in mixed])),
            at_most("variance of GVM over 1/√p", 1.0, geometric_mean([a.gvm / a.inverse_root for a in mixed])),
            at_most("variance of GVM over the best allocation", 1.02, geometric_mean([a.gvm / a.best for a in mixed])),
            equal("…over 1/√p where norms are equal (largest)", 1.0, (a.gvm / a.inverse_root for a in alike), 1e-4),
            at_most(
                "default α, prompts of p > 0.1: GVM over uniform",
                0.95,
                geometric_mean([a.gvm / a.uniform for a in solvable]),
            ),
            at_least("it fails: default α and a prompt of p < √α/2 (share of batches 1/√p wins)", 0.5, lost),
        ),
        draw=lambda figure: _draw_allocations(figure, [x for batch in batches for x in batch], mixed, hopeless),
        notes=(
            f"GVM had the lower variance in {sum(a.gvm < a.uniform for a in mixed)} of {len(mixed)} batches against "
            f"uniform, in {sum(a.gvm < a.inverse_root for a in mixed)} against 1/√p",
            f"fails: α = {ALPHA} and a prompt of p < √α/2 = {math.sqrt(ALPHA) / 2:.3f} in the batch: it gets too few "
            f"samples, and the variance is {excess.value:.1f} times that of 1/√p",
        ),
    )


ALPHA = 1e-3
"""The default of `gvm`."""


def _draw_allocations(
    figure: "Figure", prompts: list["Prompt"], mixed: list["Allocations"], hopeless: list["Allocations"]
) -> None:
    left, right = plots.panels(figure, 2)
    shown = [x for x in prompts if x.pass_rate > 1e-3]
    left.loglog(
        [x.norm / math.sqrt(x.pass_rate) for x in shown],
        [math.sqrt(x.variance) for x in shown],
        "o",
        color=plots.BLUE,
        markersize=4,
    )
    low, high = left.get_xlim()
    left.plot([low, high], [low, high], color=plots.RED, linewidth=1, label="equal")
    left.set(title="GVM's weight follows the best one", xlabel="G/√p", ylabel="√v")
    left.legend()
    series = (
        ([a.gvm / a.uniform for a in mixed], plots.BLUE, "-", "against uniform"),
        ([a.gvm / a.inverse_root for a in mixed], plots.ORANGE, "-", "against 1/√p"),
        ([a.gvm / a.best for a in mixed], plots.GREEN, "-", "against the best, √v"),
        ([a.gvm / a.inverse_root for a in hopeless], plots.ORANGE, ":", "1/√p; α = 0.001, a prompt of p < √α/2"),
    )
    for ratios, color, style, label in series:
        heights = [(k + 1) / len(ratios) for k in range(len(ratios))]
        right.step(sorted(ratios), heights, color=color, linestyle=style, label=label, where="post")
    right.axvline(1.0, color=plots.INK, linewidth=1)
    right.set_xscale("log")
    right.set(title="Variance of GVM over that of others", xlabel="ratio", ylabel="share of batches below")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


class Prompt(NamedTuple):
    pass_rate: float
    norm: float
    """G, mean ‖∇log π(y)‖ over accepted responses."""
    variance: float
    """v, variance of one draw's r ∇log π/p."""


class Allocations(NamedTuple):
    """Σ_i v_i/n_i of one batch under each allocation of the same number of samples."""

    gvm: float
    uniform: float
    inverse_root: float
    best: float


def _spread_prompt(batch: int, number: int) -> Prompt:
    """A prompt whose length, sharpness and pass rate are drawn at random."""
    u = torch.rand(3, generator=seeded(15, batch, number), dtype=torch.float64).tolist()
    case = random_case(3, 1 + int(4 * u[0]), 15, batch, number, pass_rate=0.05 + 0.5 * u[1])
    return _prompt(case, case.policy * (0.2 + 2.8 * u[2]))


def _flat_prompt(batch: int, number: int) -> Prompt:
    """A uniform policy of length 3: ‖∇log π(y)‖ is √(3·2/3) for every response; pass rates differ."""
    case = random_case(3, 3, 15, batch, number, pass_rate=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)[number])
    return _prompt(case, torch.zeros_like(case.policy))


def _prompt(case: Case, policy: Tensor) -> Prompt:
    tree = case.tree
    p = float(exact.expected_reward(tree, policy, case.rewards))
    norms = segment_sum(score_norms(tree, policy), tree.response_index, tree.responses).sqrt()
    accepted = tree.probabilities(policy) * case.rewards / p
    situation = Situation(tree=tree, behavior=policy, policy=policy, rewards=case.rewards)
    one = moments(tree, policy, policy, response_coefficients(situation, "raft") / p)
    return Prompt(pass_rate=p, norm=float(accepted @ norms), variance=one.variance)


def _allocations(prompts: list[Prompt], alpha: float) -> Allocations:
    """Under a budget so large that whole numbers stand for real ones."""
    budget = 1_000_000
    rates = [x.pass_rate for x in prompts]

    def variance(counts: Sequence[float]) -> float:
        return sum(x.variance / n for x, n in zip(prompts, counts, strict=True))

    roots = [math.sqrt(x.variance) for x in prompts]
    return Allocations(
        gvm=variance(gvm(rates, [x.norm for x in prompts], budget, alpha=alpha)),
        uniform=variance([budget / len(prompts)] * len(prompts)),
        inverse_root=variance(ada_est(rates, budget, lowest=1, highest=budget, eps=0.0)),
        best=variance([budget * root / sum(roots) for root in roots]),
    )


def _accepted_error(case: Case) -> float:
    """Relative error of R draws' mean Σ 1/(R p)·r ∇log π against ∇log p, with the advantage `accepted`."""
    tree, policy = case.tree, case.policy
    p = exact.expected_reward(tree, policy, case.rewards)
    group, rates = torch.zeros(tree.responses, dtype=torch.int64), p.expand(tree.responses)
    weights = compute_advantages("accepted", case.rewards, group, pass_rate=rates).advantages
    situation = Situation(tree=tree, behavior=policy, policy=policy, rewards=weights)
    one = moments(tree, policy, policy, response_coefficients(situation, "raft"))
    truth = exact.gradient(lambda z: exact.expected_reward(tree, z, case.rewards).log(), policy)
    return relative_error(tree.responses * one.mean, truth)


def _same_draws_shrinkage(case: Case, size: int = 3) -> float:
    """Distance of the mean with p̂ of the same draws from (1 − (1−p)^n)·∇log p, over every group of n."""
    tree, policy = case.tree, case.policy
    members = torch.tensor(list(product(range(tree.responses), repeat=size)))
    group = torch.arange(len(members)).repeat_interleave(size)
    rewards = case.rewards[members.flatten()]
    own_rate = case.rewards[members].mean(1).repeat_interleave(size)
    weights = compute_advantages("accepted", rewards, group, pass_rate=own_rate).advantages
    probability = tree.probabilities(policy)[members].prod(1).repeat_interleave(size)
    positions, index = tree.tokens_of(members.flatten())
    measured = scores(tree.prefix_ids[positions], tree.cells[positions], (probability * weights)[index], policy)
    p = float(exact.expected_reward(tree, policy, case.rewards))
    truth = exact.gradient(lambda z: exact.expected_reward(tree, z, case.rewards).log(), policy)
    return relative_error(measured, (1 - (1 - p) ** size) * truth)
