"""Claims 12 and 13: groups without signal, and sampling until enough responses are accepted."""

import math
from itertools import product
from typing import TYPE_CHECKING

import torch

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.budgets import Done, Draw, ada_seq, signal_loss, stopped_pass_rate
from rlsys.lab import exact, plots
from rlsys.lab.claims.cases import Case, random_case, relative_error
from rlsys.lab.claims.outcome import Outcome, at_least, equal
from rlsys.lab.estimate import Estimate, mean, share
from rlsys.lab.estimators import Situation, response_coefficients, scores
from rlsys.lab.tree import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def silent_groups(tasks: int) -> Outcome:
    """A prompt of pass rate p = 0.1 gives no signal in 43% of groups of n = 8.

    All agree with probability p^n + (1−p)^n = 0.9^8 + 0.1^8, and then every group advantage is 0. Enumerated: the
    advantages of all 2^8 groups, weighted by their probability. Falsified by another probability, or by a group whose
    rewards differ and whose advantages are still all 0.
    """
    rates = [i / 40 for i in range(41)]
    sizes = (2, 4, 8, 12)
    curves = {n: [_silence("rloo", p, n) for p in rates] for n in sizes}
    predicted = 0.9**8 + 0.1**8
    groups = 50_000
    drawn = (torch.rand(groups * 8, generator=seeded(12), dtype=torch.float64) < 0.1).double()
    counted = compute_advantages("grpo", drawn, torch.arange(groups).repeat_interleave(8)).zero_variance_groups

    def draw(figure: "Figure") -> None:
        (axes,) = plots.panels(figure, 1)
        for (n, values), color in zip(curves.items(), plots.SCALE, strict=False):
            axes.plot(rates, values, color=color, label=f"n = {n}")
            axes.plot(rates, [signal_loss(p, n) for p in rates], ":", color=plots.INK, linewidth=1)
        axes.plot([0.1], [predicted], "o", color=plots.RED, markersize=8)
        axes.annotate(
            "p = 0.1, n = 8: 43%",
            (0.1, predicted),
            (0.16, 0.55),
            color=plots.RED,
            arrowprops={"arrowstyle": "-", "color": plots.RED},
        )
        axes.set(xlabel="pass rate of the prompt", ylabel="share of groups without signal", xlim=(0, 1), ylim=(0, 1.02))
        axes.plot([], [], ":", color=plots.INK, linewidth=1, label="p^n + (1−p)^n")
        axes.legend(loc="upper center")

    return Outcome(
        checks=(
            *(
                equal(f"silent groups under {name}, enumerated", predicted, _silence(name, 0.1, 8), 1e-12)
                for name in ("group_mean", "rloo", "grpo")
            ),
            equal("signal_loss(0.1, 8)", predicted, signal_loss(0.1, 8), 1e-12),
            equal("zero_variance_groups of sampled groups", predicted, share(counted, groups), 0.01),
        ),
        draw=draw,
    )


def _silence(name: str, pass_rate: float, n: int) -> float:
    """P(every advantage of a group of n is 0), over all 2^n outcomes."""
    outcomes = torch.tensor(list(product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    group = torch.arange(len(outcomes)).repeat_interleave(n)
    advantages = compute_advantages(name, outcomes.flatten(), group).advantages.view(-1, n)
    passed = outcomes.sum(1)
    probability = pass_rate**passed * (1 - pass_rate) ** (n - passed)
    return float(probability[(advantages == 0).all(1)].sum())


def log_objective(tasks: int) -> Outcome:
    """E[log p] weights prompts by 1/p; sampling until K successes does it without dividing, at a cost of K/p.

    ∇log p = ∇p/p = E_π[∇log π(y) | accepted]. Drawing one at a time until K are accepted leaves the accepted ones
    independent draws of π(·|accepted), so their K scores (`raft`) sum to K∇log p in expectation, and N is negative
    binomial with mean K/p. Rounds of M overshoot. K/N is biased upward, (K−1)/(N−1) is not. Falsified by another mean
    gradient, cost or bias.
    """
    cases = [random_case(3, 4, 13, seed, pass_rate=p) for seed in range(tasks // 3) for p in (0.05, 0.25, 0.6)]
    weights, accepted = zip(*(_log_gradients(case) for case in cases), strict=True)
    prompts = 2_000
    simulated = {p: _draws_until(4, p, 1, prompts) for p in (0.1, 0.3, 0.7)}
    rounds = {m: _expected_draws(4, 0.1, m) for m in (1, 2, 4, 8, 16)}
    measured_rounds = _draws_until(4, 0.1, 4, prompts)
    unbiased, naive = _stopped_rates(4, 0.1)
    rates = [10 ** (i / 10) for i in range(-27, 1)]

    def draw(figure: "Figure") -> None:
        left, middle, right = plots.panels(figure, 3)
        left.loglog(rates, [1 / p for p in rates], color=plots.BLUE, label="E[log p]: 1/p")
        left.axhline(1.0, color=plots.GREY, label="E[p]: 1")
        left.plot(
            [float(w) for w, _ in weights], [float(f) for _, f in weights], "o", color=plots.ORANGE, label="measured"
        )
        left.set(title="Weight of a prompt", xlabel="pass rate p", ylabel="weight of ∇p")
        middle.loglog(rates, [4 / p for p in rates], color=plots.BLUE, label="K/p")
        counts = list(simulated.values())
        plots.with_intervals(middle, list(simulated), counts, "o", color=plots.ORANGE, label="ada_seq, one at a time")
        middle.set(title="Draws until K = 4", xlabel="pass rate p", ylabel="E[N]")
        right.plot(list(rounds), list(rounds.values()), "o-", color=plots.BLUE, label="exact")
        right.axhline(40, color=plots.GREY, linewidth=1, label="K/p = 40")
        right.set(title="In rounds of M (p = 0.1)", xlabel="M", ylabel="E[N]", ylim=(38, None))
        for axes in (left, middle, right):
            axes.legend()

    return Outcome(
        checks=(
            equal("largest error of ∇log p = ∇p/p", 0.0, (abs(f * p - 1) for p, f in weights), 1e-10),
            equal("largest error of E[Σ over accepted]/K = ∇log p", 0.0, accepted, 1e-10),
            equal("E[N], K = 4, p = 0.1, one at a time", 40.0, rounds[1], 1e-9),
            equal("…of the real `ada_seq`", 40.0, simulated[0.1], 1.5),
            equal("E[N], K = 4, p = 0.1, rounds of 4", 41.5, rounds[4], 0.05),
            equal("…of the real `ada_seq`", rounds[4], measured_rounds, 1.5),
            equal("E[(K−1)/(N−1)], p = 0.1", 0.1, unbiased, 1e-9),
            at_least("E[K/N], p = 0.1: biased upward", 0.12, naive),
        ),
        draw=draw,
    )


def _log_gradients(case: Case) -> tuple[tuple[float, float], float]:
    """(p, weight of ∇p in ∇log p), and the error of the mean score over accepted responses against ∇log p."""
    tree, policy = case.tree, case.policy
    p = float(exact.expected_reward(tree, policy, case.rewards))
    rise = exact.reward_gradient(tree, policy, case.rewards)
    log_rise = exact.gradient(lambda z: exact.expected_reward(tree, z, case.rewards).log(), policy)
    situation = Situation(tree=tree, behavior=policy, policy=policy, rewards=case.rewards)
    given_accepted = (tree.probabilities(policy) * case.rewards / p)[tree.response_index]
    c = given_accepted * response_coefficients(situation, "raft")
    factor = float((log_rise * rise).sum() / rise.square().sum())
    return (p, factor), relative_error(scores(tree.prefix_ids, tree.cells, c, policy), log_rise)


def _draws_until(positives: int, pass_rate: float, per_round: int, prompts: int) -> Estimate:
    """Mean number of draws that `ada_seq` really asks for."""
    generator = seeded(13, per_round, round(100 * pass_rate))

    def draws() -> float:
        rewards: list[float] = []
        while True:
            match ada_seq(rewards, n=8, positives=positives, per_round=per_round, max_rounds=100_000):
                case Draw(n):
                    rewards += (torch.rand(n, generator=generator) < pass_rate).double().tolist()
                case Done():
                    return float(len(rewards))

    return mean([draws() for _ in range(prompts)])


def _expected_draws(positives: int, pass_rate: float, per_round: int) -> float:
    """E[N] in rounds of M until K successes, from E_k = M + Σ_j Bin(j; M, p) E_{k−j}, E_{≤0} = 0."""
    chance = [math.comb(per_round, j) * pass_rate**j * (1 - pass_rate) ** (per_round - j) for j in range(per_round + 1)]
    missing = [0.0]
    for k in range(1, positives + 1):
        later = sum(chance[j] * missing[k - j] for j in range(1, min(k, per_round) + 1))
        missing.append((per_round + later) / (1 - chance[0]))
    return missing[positives]


def _stopped_rates(positives: int, pass_rate: float) -> tuple[float, float]:
    """E[(K−1)/(N−1)] and E[K/N] over the negative binomial law of N; the tail left out is below 1e-12."""
    unbiased = naive = 0.0
    for drawn in range(positives, 1000):
        chance = math.comb(drawn - 1, positives - 1) * pass_rate**positives * (1 - pass_rate) ** (drawn - positives)
        unbiased += chance * stopped_pass_rate(positives, drawn)
        naive += chance * positives / drawn
    return unbiased, naive
